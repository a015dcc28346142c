"""WeightStore: the interface between ES and the weights that it tunes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.dtensors import in_shards, whole_state_dict
from ..core.plan import Plan
from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState, BadValue
from ..utils.unwrap import save_unwrapped


class WeightStore(abc.ABC):
    """Holds weights, turns them into a member and back, and applies updates. ES and ESTrainer use nothing else of it.

    The weight modes of esfast.es.weights hold the weights of a model in this process; ES makes one of them from a
    model. A store that is given to ES instead of a model may hold them elsewhere, for example in a fleet of engines:

        es = ES(store, sigma=1e-3)
        trainer = ESTrainer(store, reward, config, rows, evaluator=...)

    Attributes:
        mode: how updates are rounded, one of esfast.utils.names.WEIGHT_MODES. The journal records it.
        source: name or folder of the model that the weights came from; "" if unknown.
        whole_names: names of all tensors, as in a Plan of the Hugging Face model.
        whole_numel: number of weights of all tensors.
        layout: `Plan.layout` of the Hugging Face model.
        device: the device that does the work; clocks wait for it.
        plan: the weights in this process; None if there are none.
        updater: what a checkpoint saves; None if the run resumes from its journal alone.
        tries_steps: whether `try_step` works.
    """

    mode: str
    source: str = ""
    whole_names: list[str]
    whole_numel: int
    layout: str
    device: torch.device = torch.device("cpu")
    plan: Plan | None = None
    updater: Any = None
    tries_steps: bool = False

    @abc.abstractmethod
    def begin(self, rule: Rule) -> None:
        """ES calls this once, before anything else. Updates follow this rule and start from the present weights.
        ValueError for a rule that the store can't follow."""

    @abc.abstractmethod
    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        """Makes the weights base + coeff * noise(seed), whatever member was in place before. `coeff` is the member's
        sign times sigma. RuntimeError if the store's members are made elsewhere."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Takes the member away. It may be called without a member in place, and again after an interruption."""

    def try_step(self, terms: Mapping[int, float]) -> None:
        """Makes the weights what an update by plain addition would: base + the sum of coefficient * noise(seed).
        `restore` takes it away. RuntimeError if the store can't."""
        raise BadState(f"{type(self).__name__} makes members of one seed alone")

    @abc.abstractmethod
    def update(self, record: UpdateRecord) -> None:
        """Applies the next generation, all of it or nothing."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """`Plan.fingerprint` of the whole model, between members. A collective call of processes that hold shards."""

    @abc.abstractmethod
    def save(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the weights to an empty folder, for from_pretrained. `gathered` is the result of `gather`."""

    def gather(self, keep: bool) -> dict[str, torch.Tensor] | None:
        """Collects what `save` needs from other processes; None if it needs nothing. Processes that hold shards of the
        weights call it together, and only the one that saves keeps the result."""
        return None

    def replay(self, records: Sequence[UpdateRecord]) -> None:
        """Applies the generations of a resumed run. The weights must be up to date only after the last one."""
        for record in records:
            self.update(record)

    def note_applied(self, record: UpdateRecord) -> None:
        """Notes a generation that is in the weights already, because a checkpoint held it. Momentum needs it."""
        return

    def changed_elsewhere(self) -> bool:
        """Whether something else changed the weights since the store last wrote them, so that it would undo that.
        Called between members."""
        return False

    def drift(self) -> float | None:
        """RMS distance of the weights from those of exact arithmetic; None if the store restores exactly."""
        return None


class LocalStore(WeightStore):
    """The weights of a plan in this process. A subclass sets `updater`."""

    plan: Plan

    def __init__(self, plan: Plan, rule: Rule):
        self.plan, self.rule, self.device = plan, rule, plan.device
        self.whole_names, self.whole_numel, self.layout = plan.whole_names, plan.whole_numel, plan.layout
        self.source = getattr(getattr(plan.module, "config", None), "_name_or_path", "")

    @property
    def source_of_members(self) -> Plan:
        """The plan that members are written from; the live weights unless a mode keeps a base."""
        return self.plan

    def begin(self, rule: Rule) -> None:
        if rule != self.rule:
            raise BadValue(f"the weights follow {self.rule}, which was given when they were made, asked for is {rule}")

    def replay(self, records: Sequence[UpdateRecord]) -> None:
        assert self.updater is not None
        for record in records:
            self.updater(record)
        self.sync_live_weights()

    def sync_live_weights(self) -> None:
        """Brings the live weights, and copies of them, up to date after `updater` was called."""

    def note_applied(self, record: UpdateRecord) -> None:
        assert self.updater is not None
        self.updater.note_applied(record)

    def changed_elsewhere(self) -> bool:
        """RuntimeError if the module has other parameters than the plan."""
        self.plan.check_module()
        return False

    def fingerprint(self) -> str:
        return self.plan.fingerprint()

    def gather(self, keep: bool) -> dict[str, torch.Tensor] | None:
        module = self.plan.module
        return whole_state_dict(module, keep) if module is not None and in_shards(module) else None

    def save(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        if not hasattr(self.plan.module, "save_pretrained"):
            raise BadState("save: expected the weights of a Hugging Face model, which has save_pretrained")
        save_unwrapped(self.plan.module, folder, gathered)

    def __repr__(self) -> str:
        return repr(self.plan)
