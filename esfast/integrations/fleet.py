"""ESTrainer with its weights in a Fleet of vLLM engines, and none in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..core.plan import Plan
from ..es.es import ES
from ..es.population import Member, Population
from ..rewards.scorer import RewardFunc
from ..trainer.config import ESConfig
from ..trainer.trainer import ESTrainer
from ..update.updater import Generation, Rule
from ..utils.errors import BadState, BadValue
from ..utils.files import whole_folder
from .ray import Fleet


class FleetPlan(Plan):
    """The weights of a Fleet, none of which are in this process: what ES and its journal ask of a plan."""

    def __init__(self, fleet: Fleet):
        self.fleet, self._stated = fleet, fleet.describe()
        self._held, self._sharded, self._gathering, self._private = [], [], [], True
        self.device, self.low = torch.device("cpu"), None
        self._finish()

    sharded = True  # nothing here to make a checkpoint of: the journal holds all
    config = property(lambda self: SimpleNamespace(_name_or_path=self.fleet.model))

    @property
    def layout(self) -> str:
        return self._stated["layout"]

    @property
    def names(self) -> list[str]:
        return self._stated["names"]

    @property
    def numel(self) -> int:
        return self._stated["numel"]

    whole_numel, whole_names = numel, names

    def fingerprint(self) -> str:
        return self.fleet.fingerprint()

    def save_pretrained(self, folder: str | Path) -> None:
        self.fleet.save(folder)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"FleetPlan({len(self)} tensors, {self.numel:,} weights, in each of {len(self.fleet.alive)} engines)"


class FleetWeights:
    """A weight mode whose weights are in the engines, which make members by themselves."""

    mode = "base"

    def __init__(self, plan: FleetPlan, rule: Rule, backend: str = "auto"):
        self.plan, self.fleet, self.updater = plan, plan.fleet, self
        self.fleet.begin(rule, self.mode)

    def __call__(self, record: Generation) -> None:
        self.fleet.update(record)

    update = __call__

    def settle(self) -> None:
        """Engines do so after every update."""

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        raise BadState("the members of a Fleet are in its engines: ask for their completions with Fleet.members")

    def restore(self) -> None: ...

    def changed_elsewhere(self) -> bool:
        """Not from here: an engine refuses an update when its own weights were changed."""
        return False


class FleetEvaluator:
    """The MemberEvaluator whose members the engines of a fleet make, several at a time."""

    def __init__(self, fleet: Fleet):
        self.engine = fleet

    @property
    def tokens(self) -> int:
        return self.engine.tokens

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Iterator[tuple[Member, list[str]]]:
        yield from self.engine.members(list(members.handed_out()), members.sigma, prompts, seeds)

    def close(self) -> None:
        self.engine.close()


class FleetES(ES):
    modes = {name: type(f"Fleet_{name}", (FleetWeights,), {"mode": name}) for name in ("base", "master", "host")}


class FleetTrainer(ESTrainer):
    """ESTrainer over vLLM engines: `esfast train --engine vllm`. Journal, resume and what it leaves in the run folder
    are ESTrainer's; the journal replays on the Hugging Face model.

    Args:
        model: Hugging Face folder or name.
        num_engines, tensor_parallel_size, dtype: as for Fleet.
        engine_options: further arguments of vllm.LLM.
        all others: as for ESTrainer.

    Raises ValueError for settings that need the weights in this process (kl_to_base, perturb_rounding, include,
    exclude, weights="inplace" or "auto"), before an engine is started.
    """

    es_class = FleetES

    def __init__(
        self,
        model: str | Path,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: ESConfig | None = None,
        num_engines: int = 1,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        engine_options: Mapping[str, Any] | None = None,
        processing_class=None,
        **others,
    ):
        args = args if args is not None else ESConfig()
        for name, only in (
            ("kl_to_base", False),
            ("perturb_rounding", "nearest"),
            ("include", None),
            ("exclude", None),
        ):
            if getattr(args, name) != only:
                raise BadValue(
                    f"{name}: with the weights in vLLM engines only {only!r} works, got {getattr(args, name)!r}"
                )
        if args.weights not in FleetES.modes:
            known = ", ".join(map(repr, FleetES.modes))
            raise BadValue(f"weights: with vLLM engines expected one of {known}, got {args.weights!r}")
        fleet = Fleet(
            model, args.max_completion_length, num_engines, tensor_parallel_size, args.temperature or 1.0, dtype,
            processing_class, **(engine_options or {}),
        )  # fmt: skip
        fleet.prompts.length_setting = "max_completion_length"
        try:
            super().__init__(
                FleetPlan(fleet),
                reward_funcs,
                args,
                processing_class=fleet.prompts.tokenizer,
                evaluator=FleetEvaluator(fleet),
                **others,
            )
        except BaseException:
            fleet.close()
            raise

    def _write_model(self, path: Path) -> None:
        """Once `train` has ended, and the engines with it, this copies the model that train saved."""
        if self.engine.alive:
            super()._write_model(path)
            return
        saved = self.folder.model
        if self.summary.get("generations") != self.es.generation or not saved.is_dir():
            raise BadState(
                "save_model: the engines ended with train(), which saved no model: resume the run "
                f"(ESConfig(resume=True)), or make the model with `esfast replay {self.folder.journal}`"
            )
        if path.resolve() != saved.resolve():
            with whole_folder(path) as unfinished:
                shutil.copytree(saved, unfinished, dirs_exist_ok=True)
