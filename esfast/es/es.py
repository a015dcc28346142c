"""Evolution strategies: seeds, mirrored sampling, fitness shaping and coefficients as pure functions, and `ES`.

The method is that of "Evolution Strategies at Scale" (arXiv 2509.24372): theta += lr / N * sum_n z_n eps_n, where z are
the shaped rewards of N members theta + sigma eps_n, and 1/sigma is absorbed into lr.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from ..core.kinds import check_seed
from ..core.plan import Plan
from ..distributed.team import SharedUpdates, Team
from ..journal.journal import header_of
from ..update.updater import Group, Optimizer, Rule, UpdateRecord, check_groups, check_optimizer
from ..utils.errors import BadState, BadValue
from ..utils.interrupts import defer_sigint
from ..utils.names import ROUNDINGS
from ..utils.settings import check_int
from ..utils.settings import check_positive as _check_positive
from .buffers import Buffers
from .history import History
from .population import Member, Packets, Population, member_seed
from .shaping import SHAPINGS, centered_rank, centred, zscore  # noqa: F401
from .store import WeightStore
from .weights import MODES, open_store


def coefficients(members: Sequence[Member], shaped: Sequence[float], lr: float) -> tuple[list[int], list[float]]:
    """Seeds, and for each its float32 coefficient lr / N * (sum of sign * shaped reward over the seed's members)."""
    total: dict[int, float] = {}
    for m, z in zip(members, shaped, strict=True):
        total[m.seed] = total.get(m.seed, 0.0) + m.sign * z
    # ES.step refuses coefficients that are not finite.
    with np.errstate(over="ignore"):
        return list(total), [float(np.float32(lr / len(members) * t)) for t in total.values()]


class ES:
    """Evolution strategies over the weights of a model, used like an optimizer of torch.optim.

        es = ES(model, sigma=1e-3, lr=5e-4, population_size=30)
        for generation in range(100):
            for member in es.population():        # inside the body the model IS that member
                member.reward = evaluate(model)
            es.step()

    Between populations the weights belong to ES: change them only through it. If something else has changed them, the
    next call raises RuntimeError. Buffers, such as BatchNorm's statistics, are put back after each member (see
    esfast.es.buffers).

    Args:
        model: an nn.Module, a Plan, or an iterable of (name, tensor); its weights are changed in place. Or a
            WeightStore, which holds weights elsewhere; `weights` must then be its mode.
        sigma: standard deviation of the perturbation, in units of the weights. > 0.
        lr: step size of the update (alpha in the paper). > 0.
        population_size: members a generation, at least 2; an even number if mirrored.
        seed: the run's seed, 0 <= seed < 2**64. The same seed and the same rewards give the same weights to the bit.
        mirrored: members come in pairs, +noise and -noise of one seed.
        noise: "gaussian", "rademacher" or "low_rank"; see `add_noise_`.
        shaping: "zscore", "centered_rank", or a function from the list of rewards to a list of as many numbers.
        weights: where members are written from and restored to. "base": exact; one extra copy of the weights. "master":
            exact, and updates are not rounded to 16 bits; two extra copies. "host": exact; the copy is in host memory.
            "inplace": no extra memory and not exact; bfloat16 weights drift by about as much as they learn. "auto": the
            most exact mode that fits, which it logs. See esfast.es.weights.
        rounding: of updates, "nearest" or "stochastic"; see `add_noise_`.
        perturb_rounding: of members, likewise.
        weight_decay: an update first moves the weights by lr * weight_decay of their way to `decay_to`. >= 0.
        decay_to: "zero", or "initial": the weights that the model has now; ES then keeps a further copy of them.
        optimizer: "sgd" (the paper's), "momentum", "adam", or an esfast.Momentum or esfast.Adam with its own numbers;
            see esfast.update.
        groups: esfast.Group objects, or texts such as "*embed*:lr=0.1", which give weights their own sigma and lr. The
            first group whose pattern matches a name counts.
        rank: of low-rank noise, 1 to 256.
        backend: as in `add_noise_`.
        journal: path of the journal. Every step is appended to it before the weights change. See esfast.journal.
        team: an esfast.Team of several processes. Each scores some members of a population, and `step` collects the
            rewards. See esfast.distributed.
        resume: continue where the journal ends, if there is one. The model must be the one that the run began with.
        checkpoints: folder that `checkpoint()` writes to and a resume reads from.

    Raises:
        TypeError, ValueError: an argument outside the above; weights that Plan refuses, or that are NaN or infinite. No
            weight has changed.
        FileExistsError: there is a journal already and no `resume`, or another process uses it (InUse).

    Attributes: `store`, which holds the weights; `plan`, the weights in this process; `generation`, the number of steps
    taken; `members` of the current generation; `sigma` and `lr`, which may be changed between generations.
    """

    def __init__(
        self,
        model: torch.nn.Module | Plan | Iterable[tuple] | WeightStore,
        sigma: float = 1e-3,
        lr: float = 5e-4,
        *,
        population_size: int = 30,
        seed: int = 0,
        mirrored: bool = False,
        noise: str = "gaussian",
        shaping: str | Callable[[Sequence[float]], Sequence[float]] = "zscore",
        weights: str = "base",
        backend: str = "auto",
        journal: str | Path | None = None,
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        decay_to: str = "zero",
        optimizer: str | Optimizer = "sgd",
        perturb_rounding: str = "nearest",
        team: Team | None = None,
        resume: bool = False,
        checkpoints: str | Path | None = None,
        groups: Sequence[Group | str] = (),
        rank: int = 1,
    ):
        self.sigma, self.lr = _check_positive("sigma", sigma), _check_positive("lr", lr)
        self.population_size = check_int("population_size", population_size, 2, 2**32)
        if mirrored and population_size % 2:
            raise BadValue(f"population_size: mirrored sampling needs an even number, got {population_size}")
        self.seed, self.mirrored = check_seed(seed), bool(mirrored)
        self._shape = _check_shaping(shaping)
        if not isinstance(weights, str) or weights not in (*MODES, "auto"):
            raise BadValue(f"weights: expected one of {', '.join(map(repr, (*MODES, 'auto')))}, got {weights!r}")
        if perturb_rounding not in ROUNDINGS:
            known = ", ".join(map(repr, ROUNDINGS))
            raise BadValue(f"perturb_rounding: expected one of {known}, got {perturb_rounding!r}")
        if weight_decay != 0:
            _check_positive("weight_decay", weight_decay)
        self.weight_decay, self.perturb_rounding = float(weight_decay), perturb_rounding
        self.rule = Rule(noise, rounding, check_optimizer(optimizer), decay_to, check_groups(groups), rank)
        source = model if isinstance(model, (Plan, WeightStore)) else Plan(model)
        self.rule.check_names(source.whole_names)
        self.team = team if team is not None else Team()
        self._prefix = self.team.unique_prefix()
        self.store = self._open(source, weights, backend)
        self.plan = self.store.plan
        self.generation = 0
        self.members: list[Member] = []
        self._inside: Member | None = None
        self._buffers = Buffers(self.plan)
        self._asked = 0
        self._mine: list[Member] = []
        self._history = History(self.team, self._prefix, checkpoints)
        if journal is not None:
            header = header_of(self.rule, self.seed, self.store.mode, self.store)
            self.generation = self._history.begin(Path(journal), header, resume, self.store)
        # Share updates only from here on. Before, each process replays alone, and may begin at a checkpoint of its own.
        if self.team.size > 1 and self.store.updater is not None:
            self.store.updater = SharedUpdates(self.store.updater, self.team, self._prefix)

    def _open(self, source: Plan | WeightStore, weights: str, backend: str) -> WeightStore:
        """The store that was given, or one of this mode for a plan."""
        if isinstance(source, WeightStore):
            if weights != source.mode:
                raise BadValue(f"weights: those of {source!r} are of mode {source.mode!r}, asked for is {weights!r}")
            source.begin(self.rule)
            return source
        if source.sharded and self.team.size > 1 and self.team.shards == 1:
            raise BadValue("the weights are in shards: say how many processes hold a model: Team.join(device, shards=)")
        store = open_store(source, self.rule, weights, backend)
        if self.team.size > 1 and store.mode == "inplace":
            raise BadValue('weights: "inplace" drifts apart in several processes; take "base", "master" or "host"')
        return store

    @overload
    def population(self, at_once: None = None) -> Population: ...

    @overload
    def population(self, at_once: int) -> Packets: ...

    def population(self, at_once: int | None = None) -> Population | Packets:
        """The members of this generation: iterate over it, directly or in a `with` block.

            with es.population() as members:      # restored when the block is left, on any interpreter
                for member in members: ...

        With `at_once` it gives lists of so many members, the last one perhaps shorter, for a body that evaluates them
        together, with esfast.stacked for example. The weights stay unperturbed. Members and their seeds are the same.

        If it is called again before `step`, the same generation begins anew.
        """
        if at_once is not None:
            check_int("at_once", at_once, 1, 2**32)
        population = self._new_population("population()", [self._member(i) for i in range(self.population_size)])
        return population if at_once is None else Packets(population, at_once)

    @contextlib.contextmanager
    def trial(self, members: Sequence[Member], sigma: float) -> Iterator[Population]:
        """A block with members of the caller's choice, to look at what they answer. No step follows: afterwards there
        is no population, and sigma is as before. A member of sign 0 is the unperturbed model."""
        before = self.sigma
        try:
            self.sigma = _check_positive("sigma", sigma)
            with self._new_population("trial()", list(members)) as population:
                yield population
        finally:
            self.sigma, self.members = before, []
            self.team.at_work = False

    @contextlib.contextmanager
    def stepped(self, terms: Mapping[int, float]) -> Iterator[None]:
        """A block in which the weights have moved by the sum of coefficient * noise(seed), as an update by plain
        addition moves them; afterwards they have their bits again. For stores with `tries_steps`."""
        self._check_own("stepped()")
        self._buffers.note()
        try:
            self.store.try_step(terms)
            yield
        finally:
            self._leave()

    def collect(self, mine: Mapping[int, float | None], count: int) -> list[float | None]:
        """Collects `count` numbers that belong to the present members, from `mine` of each process of the team, by
        index. In each process the result is the same."""
        return self.team.exchange(f"{self._turn}/numbers", mine if self.team.is_group_leader else {}, count)

    def _new_population(self, what: str, members: list[Member]) -> Population:
        if self._inside is not None:
            raise BadState(f"{what}: member {self._inside.index} is still in place; leave its loop first")
        self._check_own(what)
        self.members, self._mine = members, []
        self._asked += 1
        self.team.at_work = True
        return Population(self, self.members)

    def _member(self, index: int) -> Member:
        pair, sign = (index // 2, 1 - 2 * (index % 2)) if self.mirrored else (index, 1)
        return Member(index, member_seed(self.seed, self.generation, pair), sign)

    def step(self, set_aside: bool = False, families: Sequence[int] | None = None) -> UpdateRecord:
        """Moves the weights along the reward-weighted noise of the population, in one fused pass.

        Args:
            set_aside: leave out members whose reward is None. The update is that of the others, at least two.
            families: a number for each member, for members that were asked different things: rewards are compared
                within a family alone, so each counts as its difference from the mean of those with the same number.
                The record holds the rewards as they were set. None: all are compared with all.

        Raises:
            RuntimeError: no population was evaluated, `step` is called from inside a member's body, or something else
                changed the weights since ES last wrote them.
            ValueError: a reward is missing or not finite (the message names the member), or the shaping function does
                not return as many finite numbers. No weight has changed.
        """
        if self._inside is not None:
            raise BadState(f"step(): member {self._inside.index} is still in place; leave its loop first")
        if not self.members:
            raise BadState("step(): no population to learn from; iterate over population() first")
        self._check_own("step()")
        self._exchange(set_aside)
        scored = [m for m in self.members if m.reward is not None] if set_aside else self.members
        rewards = {m.index: _check_reward(m) for m in scored}
        if len(scored) < 2:
            raise BadValue(f"step(): only {len(scored)} of {len(self.members)} members have a reward; two are needed")
        compared = list(rewards.values())
        if families is not None:
            if len(families) != len(self.members):
                raise BadValue(
                    f"families: expected a number for each of {len(self.members)} members, got {families!r:.80}"
                )
            compared = centred(compared, [families[index] for index in rewards])
        shaped = self._shape(compared)
        sigma, lr = _check_positive("sigma", self.sigma), _check_positive("lr", self.lr)
        seeds, coeffs = coefficients(scored, shaped, self.rule.gradient_lr(lr))
        # Check the group with the largest lr before any group moves.
        most = self.rule.largest("lr")
        if not most * max(map(abs, coeffs)) <= float(np.finfo(np.float32).max):
            raise BadValue(f"step(): lr {self.lr} and the shaped rewards give coefficients that are not finite")
        decay = float(np.float32(lr * self.weight_decay))
        if not most * decay <= 1:
            raise BadValue(f"step(): lr {lr} times weight_decay {self.weight_decay} is more than all of the weights")
        record = UpdateRecord(
            self.generation, seeds, coeffs, [rewards.get(m.index) for m in self.members], sigma, lr, decay
        )
        # All or nothing: a step that was interrupted halfway would be taken again.
        with defer_sigint():
            # The journal first: if it can't be written, no weight changes.
            self._history.append(record)
            self.store.update(record)
            self.generation += 1
            self.members = []
        self.team.at_work = False
        return record

    def _exchange(self, set_aside: bool) -> None:
        """Exchanges rewards with the other processes of the team, so that all members have one."""
        if self.team.size == 1:
            return
        # Of the processes that hold a model together only the first reports.
        scored = self._mine if self.team.is_group_leader else ()
        mine = {m.index: None if set_aside and m.reward is None else _check_reward(m) for m in scored}
        found = self.team.exchange(self._turn, mine, self.population_size)
        for member, reward in zip(self.members, found, strict=True):
            member.reward = reward

    @property
    def _turn(self) -> str:
        return f"{self._prefix}: {self.generation}.{self._asked}"

    def record_fingerprint(self) -> None:
        """Writes the weights' fingerprint into the journal, so that a replay can compare. In a team all processes call
        it; RuntimeError if their weights differ."""
        with self.team.working():
            found = self.store.fingerprint()
        self.team.assert_equal_on_all_ranks(f"{self._prefix}: fingerprint after generation {self.generation}", found)
        self._history.check(self.generation, found)

    # The earlier name, which still works.
    vouch = record_fingerprint

    def checkpoint(self) -> None:
        """Saves the full state in `checkpoints`, and its fingerprint in the journal. OSError if it can't be written.

        Of a model in shards, the processes of the first group save a part each, and the same number of shards resumes
        from them. A sharded model without a team is not saved: it resumes from the journal alone.
        """
        updater, shards = self.store.updater, self.team.shards
        if updater is not None and self.team.rank < shards and (shards > 1 or not self.plan.sharded):
            self._history.save(self.generation, updater)
        self.record_fingerprint()

    def drift(self) -> float | None:
        """With weights="inplace", the RMS distance of sampled weights from exact float32 arithmetic, in units of the
        weights (see esfast.es.weights). None in the modes that restore exactly."""
        return self.store.drift()

    @property
    def journal_seconds(self) -> float:
        """Seconds spent so far waiting for lines of the journal to be on disk."""
        return self._history.seconds

    def _enter(self, member: Member) -> None:
        if self._inside is None:
            self._check_own(f"member {member.index}")
            self._buffers.note()
        else:
            self._buffers.put_back()
        self._inside = member
        sigma = _check_positive("sigma", self.sigma)
        _check_positive("sigma, times the largest factor of a group,", sigma * self.rule.largest("sigma"))
        coeff = member.sign * sigma
        self.store.perturb(member.seed, coeff, self.perturb_rounding)

    def _leave(self) -> None:
        try:
            self._restore()
        except KeyboardInterrupt:
            # Ctrl-C while restoring: finish the restore, then raise.
            self._restore()
            raise
        finally:
            self._inside = None

    def _restore(self) -> None:
        self.store.restore()
        self._buffers.put_back()

    def _check_own(self, what: str) -> None:
        if self.store.changed_elsewhere():
            raise BadState(
                f"{what}: the weights were changed since ES last wrote them, by something else (load_state_dict?); ES "
                "would undo that. Make a new ES of the model as it is"
            )


def _check_shaping(shaping) -> Callable[[Sequence[float]], list[float]]:
    if isinstance(shaping, str) and shaping in SHAPINGS:
        return SHAPINGS[shaping]
    if not callable(shaping):
        known = ", ".join(map(repr, SHAPINGS))
        raise BadValue(f"shaping: expected one of {known}, or a function of the rewards, got {shaping!r}")

    def checked(rewards: Sequence[float]) -> list[float]:
        shaped = [float(z) for z in shaping(rewards)]
        if len(shaped) != len(rewards) or not np.isfinite(shaped).all():
            raise BadValue(f"shaping: expected {len(rewards)} finite numbers from the function, got {shaped!r:.80}")
        return shaped

    return checked


def _check_reward(member: Member) -> float:
    if member.reward is None:
        raise BadValue(f"step(): member {member.index} has no reward; set member.reward in the loop's body")
    try:
        reward = float(member.reward if not isinstance(member.reward, str) else None)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # RuntimeError is PyTorch's, for a tensor of several numbers.
        raise BadValue(f"step(): the reward of member {member.index} is {member.reward!r}, no number") from None
    if not math.isfinite(reward):
        raise BadValue(f"step(): the reward of member {member.index} is {reward}, not a finite number")
    return reward
