"""ESTrainer with its weights in a fleet of vLLM engines, and none in this process."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..es.population import Member, Population
from ..es.store import WeightStore
from ..rewards.scorer import RewardFunc
from ..rollout.engine import Engine
from ..trainer.config import ESConfig
from ..trainer.trainer import ESTrainer
from ..trainer.tuned import check_store_settings
from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState, BadValue
from ..utils.files import whole_folder
from .ray import Fleet


class FleetStore(WeightStore):
    """A WeightStore over a Fleet: each engine has a copy of the weights, this process none.

        es = ES(FleetStore(fleet), sigma=1e-3, lr=5e-4)

    FleetEvaluator gives each engine a member of its own. In your own loop, `es.population()` makes all engines the same
    member, and `fleet.generate` divides its prompts among them.

    Args:
        fleet: the engines; their weights are compared with the model's files.
        mode: "base", "master" or "host", as in ES.
    """

    def __init__(self, fleet: Fleet, mode: str = "base"):
        self.fleet, self.mode, self.source = fleet, mode, fleet.model
        stated = fleet.describe()
        self.whole_names, self.whole_numel, self.layout = stated["names"], stated["numel"], stated["layout"]

    def begin(self, rule: Rule) -> None:
        self.fleet.begin(rule, self.mode)

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        if rounding != "nearest":
            raise BadValue(f"perturb_rounding: engines round members to the nearest weights, got {rounding!r}")
        self.fleet.perturb(seed, coeff)

    def restore(self) -> None:
        self.fleet.restore()

    def update(self, record: UpdateRecord) -> None:
        self.fleet.update(record)

    def fingerprint(self) -> str:
        return self.fleet.fingerprint()

    def save(self, folder: Path, gathered: Any = None) -> None:
        self.fleet.save(folder)

    def __repr__(self) -> str:
        engines = len(self.fleet.alive)
        return f"Fleet({len(self.whole_names)} tensors, {self.whole_numel:,} weights, in each of {engines} engines)"


class FleetEvaluator:
    """A MemberEvaluator over a Fleet: each engine makes a member, and the next one when it is free."""

    engine: Engine

    def __init__(self, fleet: Fleet):
        self.engine = self._fleet = fleet

    @property
    def tokens(self) -> int:
        return self._fleet.tokens

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Generator[tuple[Member, list[str]], None, None]:
        yield from self._fleet.members(members.handed_out(), members.sigma, prompts, seeds)

    def close(self) -> None:
        self.engine.close()


MODES = ("base", "master", "host")


class FleetTrainer(ESTrainer):
    """ESTrainer over vLLM engines: `esfast train --engine vllm`. Journal, resume and run folder are those of ESTrainer,
    and the journal replays on the Hugging Face model.

    Args:
        model: Hugging Face folder or name.
        num_engines, tensor_parallel_size, dtype: as for Fleet.
        engine_options: further arguments of vllm.LLM.
        all others: as for ESTrainer.

    Raises:
        ValueError: a setting needs the weights in this process (kl_to_base, perturb_rounding, include, exclude,
            weights="inplace" or "auto"). No engine was started.
    """

    def __init__(
        self,
        model: str | Path,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: ESConfig | None = None,
        num_engines: int = 1,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        engine_options: Mapping[str, Any] | None = None,
        processing_class=None,
        **others,
    ):
        args = args if args is not None else ESConfig()
        check_store_settings(args)
        if args.weights not in MODES:
            known = ", ".join(map(repr, MODES))
            raise BadValue(f"weights: with vLLM engines expected one of {known}, got {args.weights!r}")
        fleet = Fleet(
            model,
            args.max_completion_length,
            num_engines,
            tensor_parallel_size,
            args.temperature or 1.0,
            dtype,
            processing_class,
            **(engine_options or {}),
        )
        fleet.prompts.length_setting = "max_completion_length"
        self._fleet = fleet
        # Episodes ask many times of one member: all engines make the same one, and share its prompts.
        alone = others.get("environment") is None
        asked: dict[str, Any] = {"evaluator": FleetEvaluator(fleet)} if alone else {"engine": fleet}
        try:
            super().__init__(
                FleetStore(fleet, args.weights),
                reward_funcs,
                args,
                processing_class=fleet.prompts.tokenizer,
                **asked,
                **others,
            )
        except BaseException:
            fleet.close()
            raise

    def _write_model(self, path: Path) -> None:
        """After `train` has ended the engines have ended too, so this copies the model that train saved."""
        if self._fleet.alive:
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
