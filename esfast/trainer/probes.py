"""Probes: tasks that a run evaluates and does not train on, to see what the model forgets."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..rewards.scorer import RewardFunc, Scorer, check_metrics, judge
from ..rollout.engine import Engine
from ..rollout.prompts import check_prompts
from ..tasks import Task
from ..utils.errors import BadType, BadValue
from ..utils.rows import Rows, check_rows
from .held_out import HeldOut
from .run_folder import RunFolder

PREFIX = "eval_probe/"


@dataclass(frozen=True)
class Probe:
    """Prompts that the model is asked at every evaluation, beside those of the task that it is trained on.

    Attributes:
        rows: as for ESTrainer's eval_dataset.
        reward_funcs: one or several, of ESTrainer's form; their rewards are added.
        metrics: further functions, by name.
    """

    rows: Rows
    reward_funcs: Sequence[RewardFunc]
    metrics: Mapping[str, RewardFunc] = field(default_factory=dict)

    @classmethod
    def of_task(cls, task: Task, count: int) -> Probe:
        """At most `count` of the task's held-out problems. ValueError for a task of several turns."""
        if task.environment is not None:
            raise BadValue(f"probe: {task.name} has an environment; only tasks of single responses can be probed")
        return cls(
            task.eval_rows(count), task.reward_funcs, {} if task.accuracy is None else {"accuracy": task.accuracy}
        )

    @property
    def functions(self) -> list[RewardFunc]:
        return [*self.reward_funcs, *self.metrics.values()]


def name_of(task: str) -> str:
    """A task's name as a part of a metric's: gym:lcm?level=2 gives gym-lcm-level-2."""
    return re.sub(r"[^\w.-]+", "-", task).strip("-.")[:60]


def open_probes(probes: Mapping[str, Probe] | None, eval_dataset: Rows | None) -> dict[str, Probe]:
    """The probes of ESTrainer; TypeError or ValueError, which names the probe, if they can't be evaluated."""
    found = dict(probes or {})
    if found and eval_dataset is None:
        raise BadValue("probes: they are asked when eval_dataset is; there is none")
    for name, probe in found.items():
        if not isinstance(name, str) or name != name_of(name) or not name:
            raise BadValue(f"probes: expected a name of letters, digits and . _ -, got {name!r:.80}")
        if not isinstance(probe, Probe):
            raise BadType(f"probes: expected an esfast.trainer.probes.Probe as {name!r}, got {type(probe).__name__}")
        check_rows(f"probes: {name}", probe.rows)
        check_metrics(probe.metrics)
        if not probe.reward_funcs or not all(map(callable, probe.functions)):
            raise BadType(f"probes: {name}: expected reward functions, got {probe.reward_funcs!r:.60}")
    return found


class Probes:
    """Evaluates probes. Each metric is eval_probe/NAME/METRIC: reward, reward_se, the probe's own, and `forgotten`, by
    how much the reward is below the base model's."""

    def __init__(
        self,
        probes: Mapping[str, Probe],
        texts: Callable[[Rows], list[str]],
        engine: Engine,
        scorer: Scorer,
        folder: RunFolder,
        skips: bool,
    ):
        self._probes = {}
        for name, probe in probes.items():
            weights = [1.0] * len(probe.reward_funcs)
            judges = functools.partial(judge, scorer, probe.reward_funcs, weights, probe.metrics, skip=skips)
            self._probes[name] = probe.rows, HeldOut(texts, engine, judges, None, folder, 0)

    def __call__(
        self, generation: int, base: Mapping[str, Any], in_process_0: Callable[[Callable[[], dict]], dict]
    ) -> dict[str, float]:
        """The metrics of the model after this many generations. `base` has the base model's."""
        metrics: dict[str, float] = {}
        for name, (rows, held_out) in self._probes.items():
            found = held_out(rows, generation, in_process_0)
            metrics |= {f"{PREFIX}{name}/{k.removeprefix('eval_')}": v for k, v in found.items() if k != "eval_length"}
            reward = f"{PREFIX}{name}/reward"
            if generation and reward in base and reward in metrics:
                metrics[f"{PREFIX}{name}/forgotten"] = base[reward] - metrics[reward]
        return metrics


def check_probes(
    probes: Mapping[str, Probe], texts: Callable[[Rows], list[str]], engine: Engine, progress: bool
) -> None:
    """Checks all prompts before the run begins; ValueError names the probe and the row."""
    for name, probe in probes.items():
        check_prompts(f"probes: {name}", probe.rows, texts, engine, progress)
