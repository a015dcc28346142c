"""ESTrainer with its weights in a fleet of vLLM engines, and none in this process."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..es.population import Member, Population
from ..es.store import WeightStore
from ..rewards.scorer import RewardFunc
from ..rollout.completion import Complete
from ..rollout.engine import Engine
from ..rollout.evaluator import SequentialEvaluator
from ..trainer.config import ESConfig
from ..trainer.run_folder import RunFolder
from ..trainer.trainer import ESTrainer
from ..trainer.tuned import check_store_settings
from ..update.updater import Group, Rule, UpdateRecord, check_groups
from ..utils.errors import BadState, BadValue
from ..utils.files import whole_folder
from .ray import Fleet
from .vllm_members import lora_options

log = logging.getLogger(__name__)

# What vLLM runs at the same time on most devices, and adapters that it is asked to hold.
REQUESTS_AT_ONCE, MOST_SLOTS = 256, 64


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
    """A MemberEvaluator over a Fleet: each engine takes members when it is free.

    Args:
        fleet: the engines.
        at_once: how many members an engine takes at a time, to answer in one batch as LoRA adapters. 1: one after
            another, each written into the engine's weights.
        measure: try both ways in the first four generations, and keep the one that takes less time a token. The first
            two are not counted, since the first call of either loads code.

    `way` is "at once" or "one by one", None while it is measured.
    """

    engine: Engine
    TRIED = ("at once", "one by one") * 2

    def __init__(self, fleet: Fleet, at_once: int = 1, measure: bool = False):
        self.engine = self._fleet = fleet
        self._alone, self.at_once = SequentialEvaluator(fleet), at_once
        self._seconds: list[float] = []
        self.way: str | None = "at once" if at_once > 1 else "one by one"
        if measure and at_once > 1:
            self.way = None

    @property
    def tokens(self) -> int:
        return self._fleet.tokens

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Generator[tuple[Member, list[str]], None, None]:
        yield from self._measured(
            lambda: self._fleet.packets(members.packets(self.at_once), members.sigma, prompts, seeds),
            lambda: self._fleet.members(members.handed_out(), members.sigma, prompts, seeds),
        )

    def placed(self, members: Population, sampled: bool) -> Iterator[tuple[list[Member], Complete]]:
        """See esfast.rollout.episodes.Places. All engines share the texts of the members in a list."""
        yield from self._measured(lambda: self._adapters(members), lambda: self._alone.placed(members, sampled))

    def _adapters(self, members: Population) -> Iterator[tuple[list[Member], Complete]]:
        for packet in members.packets(self.at_once):
            pairs = [(member.seed, member.sign * members.sigma) for member in packet]
            members.on_placed()
            yield packet, functools.partial(self._fleet.complete_members, pairs)

    def _measured(self, at_once: Callable[[], Iterator], one_by_one: Callable[[], Iterator]) -> Generator:
        way = self.way or self.TRIED[len(self._seconds)]
        began, tokens = time.perf_counter(), self.tokens
        yield from at_once() if way == "at once" else one_by_one()
        if self.way is None:
            self._seconds.append((time.perf_counter() - began) / max(1, self.tokens - tokens))
            self._choose()

    def _choose(self) -> None:
        if len(self._seconds) < len(self.TRIED):
            return
        together, apart = self._seconds[-2:]
        self.way = "at once" if together <= apart else "one by one"
        log.info(
            "members_at_once: %s (%d members in one batch: %.3g ms a token, one after another: %.3g ms)",
            self.way,
            self.at_once,
            together * 1e3,
            apart * 1e3,
        )

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
        engine_timeout: as for Fleet.
        all others: as for ESTrainer.

    With noise="low_rank" and members_at_once="auto" or a number above 1, several members answer in one batch of an
    engine, as LoRA adapters (docs/how-to/vllm.md). What vLLM's LoRA slots do not carry (norms, biases, some embeddings)
    is then frozen, by groups that are added to the config's.

    Raises:
        ValueError: a setting needs the weights in this process (kl_to_base, perturb_rounding, include, exclude,
            weights="inplace" or "auto"), or members_at_once a kind of noise that slots do not hold. No engine was
            started.
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
        engine_timeout: float | None = None,
        **others,
    ):
        args = args if args is not None else ESConfig()
        check_store_settings(args, "vLLM engines")
        if args.weights not in MODES:
            known = ", ".join(map(repr, MODES))
            raise BadValue(f"weights: with vLLM engines expected one of {known}, got {args.weights!r}")
        # Members that play episodes are asked many times: all engines share the requests of all that play.
        at_once = members_of_an_engine(args, num_engines if others.get("environment") is None else 1)
        options = dict(engine_options or {})
        if at_once > 1:
            options = slot_options(args, at_once, options) | options
        fleet = Fleet(
            model,
            args.max_completion_length,
            num_engines,
            tensor_parallel_size,
            args.temperature or 1.0,
            dtype,
            processing_class,
            engine_timeout,
            **options,
        )
        fleet.prompts.length_setting = "max_completion_length"
        self._fleet = fleet
        evaluator: Any = FleetEvaluator(fleet, at_once, args.members_at_once == "auto")
        try:
            store = FleetStore(fleet, args.weights)
            if at_once > 1:
                groups = with_frozen(args, fleet, store.whole_names)
                check_resumed(args, groups)
                args = dataclasses.replace(args, groups=groups)
            super().__init__(
                store,
                reward_funcs,
                args,
                processing_class=fleet.prompts.tokenizer,
                evaluator=evaluator,
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


def members_of_an_engine(args: ESConfig, engines: int) -> int:
    """How many members an engine takes at a time, for ESConfig.members_at_once: 1 for noise that LoRA slots do not
    hold. ValueError for a number above 1 with such noise."""
    given = args.members_at_once
    if args.noise != "low_rank":
        if given not in ("auto", "1"):
            raise BadValue(
                "members_at_once: several members in one vLLM engine are LoRA adapters, which hold noise='low_rank' "
                f"alone, got noise={args.noise!r}; or leave it at 'auto'"
            )
        return 1
    share = -(-args.population_size // engines)
    return min(args.population_size, int(given)) if given != "auto" else share


def slot_options(args: ESConfig, at_once: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vllm.LLM for so many members at once. vLLM keeps requests back whose member has no slot."""
    responses = args.prompts_per_generation * args.num_generations
    # As many as may run at the same time, since all requests of a member come before those of the next.
    running = 1 + -(-int(given.get("max_num_seqs", REQUESTS_AT_ONCE)) // responses)
    return lora_options(args.rank, min(at_once, running, MOST_SLOTS))


def check_resumed(args: ESConfig, groups: Sequence[str]) -> None:
    """ValueError for a run whose members went one after another, and so tunes what `groups` freeze."""
    folder = RunFolder(args.output_dir)
    if not args.resume or not folder.begun():
        return
    found, given = (groups or [] for groups in (folder.read_config().get("groups"), args.groups))
    if list(found) == list(given) != list(groups):
        raise BadValue(
            "members_at_once: the run that is resumed tunes weights that vLLM's LoRA slots do not carry, and its "
            "members went one after another; set members_at_once to 1 to go on with it"
        )


def with_frozen(args: ESConfig, fleet: Fleet, names: Sequence[str]) -> list[str]:
    """The config's groups, after those that freeze what LoRA slots do not carry. ValueError for a group of the config
    that would then have no weights."""
    mine = check_groups(args.groups or ())
    frozen = [Group.parse(text) for text in fleet.adapters()["frozen"]]
    rule, before = Rule(groups=tuple(frozen)), Rule(groups=mine)
    left = [name for name in names if not rule.group_of(name).frozen]
    for group in mine:
        if not group.frozen and not any(fnmatch.fnmatchcase(name, group.pattern) for name in left):
            raise BadValue(
                f"groups: {group.pattern!r} has weights that members in LoRA slots leave as they are, or none: leave "
                "it out, or set members_at_once to 1"
            )
    # A resumed run's groups have them already.
    added = [str(g) for g in frozen if not all(before.group_of(n).frozen for n in names if rule.group_of(n) == g)]
    if added:
        log.info("members_at_once: vLLM's LoRA slots do not carry %s: frozen", ", ".join(g.pattern for g in frozen))
    return [*added, *map(str, mine)]
