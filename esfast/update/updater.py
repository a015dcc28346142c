"""How a generation changes the weights: the optimizer's rule, and the Updater that training and replay share.

Optimizers are in esfast.update.optimizers, and what one must do in esfast.update.optimizer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.kinds import check_kind, check_rank
from ..core.ops import add_noise_
from ..core.plan import Plan
from ..utils.errors import BadValue
from ..utils.names import DECAY_TO, ROUNDINGS
from .optimizer import find_optimizer
from .optimizers import OPTIMIZERS, SGD, Adam, Group, Momentum, Optimizer, check_groups, check_optimizer

__all__ = [
    "DECAY_TO",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "Generation",
    "Group",
    "Momentum",
    "Optimizer",
    "Rule",
    "UpdateRecord",
    "Updater",
    "check_groups",
    "check_optimizer",
]


@dataclass(frozen=True)
class UpdateRecord:
    """The record of one `ES.step`. The weights first decayed by the fraction `decay`, towards zero or the initial
    weights; then the optimizer moved them along sum_j coeffs[j] * noise(seeds[j])."""

    generation: int
    seeds: list[int]
    # float32 values. They contain lr, except with Adam, whose step is not proportional to the gradient.
    coeffs: list[float]
    rewards: list[float | None]  # None: the member was set aside
    sigma: float
    lr: float
    decay: float = 0.0  # a float32 value


# The earlier name of UpdateRecord, which still works.
Generation = UpdateRecord

# The group of weights that no pattern matches.
REST = Group("*")


@dataclass(frozen=True)
class Rule:
    """The settings that, with a generation's seeds and coefficients, determine an update.

    noise, rank, rounding: as in `add_noise_`. decay_to: "zero", or "initial" for the weights before the first update.
    groups: the first group whose pattern matches a name counts. Raises TypeError or ValueError for anything else.
    """

    noise: str = "gaussian"
    rounding: str = "nearest"
    optimizer: Optimizer = SGD()
    decay_to: str = "zero"
    groups: tuple[Group, ...] = ()
    rank: int = 1

    def __post_init__(self):
        # A plain int, as journals need it, whatever kind of number was given.
        object.__setattr__(self, "rank", check_rank(check_kind(self.noise), self.rank))
        for what, value, known in (("rounding", self.rounding, ROUNDINGS), ("decay_to", self.decay_to, DECAY_TO)):
            if value not in known:
                raise BadValue(f"{what}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        check_optimizer(self.optimizer)

    def gradient_lr(self, lr: float) -> float:
        """The factor of g in a generation's coefficients: lr, or 1 for an optimizer that applies lr itself."""
        return lr if self.optimizer.lr_in_coeffs else 1.0

    def extra_bytes(self, plan: Plan) -> int:
        """Bytes that an Updater takes: the optimizer's state and the anchor."""
        return self.optimizer.bytes_per_weight * plan.flat_numel + (plan.nbytes if self.decay_to == "initial" else 0)

    @property
    def noise_options(self) -> dict:
        """The arguments of `add_noise_` that say which noise."""
        return {"noise": self.noise, "rank": self.rank}

    def by_group(self, *plans: Plan | None) -> list[tuple]:
        """Divides plans of the same tensors by group: for each group (group, *parts), a part of each plan. Without
        groups there is one part, the whole plans. Noise is a function of names, so the division does not change it."""
        if not self.groups:
            return [(REST, *plans)]
        numbers: dict[Group, list[int]] = {}
        for i, name in enumerate(plans[0].names):
            numbers.setdefault(self.group_of(name), []).append(i)
        return [(g, *(p.subset(which) if p is not None else None for p in plans)) for g, which in numbers.items()]

    def group_of(self, name: str) -> Group:
        """The first group whose pattern matches a tensor's name; without one, factors of 1."""
        return next((g for g in self.groups if fnmatch.fnmatchcase(name, g.pattern)), REST)

    def check_names(self, names: Sequence[str]) -> None:
        """ValueError if the pattern of a group matches none of the names, or the groups freeze all of them."""
        if self.groups and all(self.group_of(name).frozen for name in names):
            raise BadValue(
                f"groups: they freeze every tensor (sigma=0,lr=0), such as {names[0]!r}: nothing is to be tuned"
            )
        for group in self.groups:
            if not any(fnmatch.fnmatchcase(name, group.pattern) for name in names):
                raise BadValue(f"groups: the pattern {group.pattern!r} matches no tensor; a name here is {names[0]!r}")

    def largest(self, factor: str) -> float:
        """The largest factor of "sigma" or "lr" that any group has."""
        return max([1.0, *(getattr(group, factor) for group in self.groups)])

    def to_json(self) -> dict:
        optimizer = self.optimizer.to_json()
        fields: dict[str, Any] = {
            "noise": self.noise,
            "rounding": self.rounding,
            "optimizer": optimizer,
            "decay_to": self.decay_to,
        }
        groups = {"groups": [[g.pattern, g.sigma, g.lr] for g in self.groups]}
        fields |= {"rank": self.rank} if self.noise == "low_rank" else {}
        # Without groups the line is as in journals of older versions.
        return fields | (groups if self.groups else {})

    @classmethod
    def from_json(cls, fields: dict) -> Rule:
        """The inverse of `to_json`. Ignores other fields; KeyError or TypeError if one is missing or wrong."""
        optimizer = dict(fields["optimizer"])
        made = find_optimizer(optimizer.pop("name"))(**optimizer)
        groups = tuple(Group(*group) for group in fields.get("groups", ()))
        rank = fields["rank"] if fields["noise"] == "low_rank" else 1
        return cls(fields["noise"], fields["rounding"], made, fields["decay_to"], groups, rank)


class Updater:
    """Applies generations, in order, to the weights of a plan. ES.step and a replay both use it.

    It holds the optimizer's `state` between generations, and with decay_to="initial" `anchor`, a plan of the initial
    weights (of a float32 master, their upper halves).
    """

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        self.plan, self.rule, self.backend = plan, rule, backend
        if rule.noise == "low_rank":
            # Make the table now: if it refuses the plan, it must do so before any weight has changed.
            plan.table(matrices=True)
        self.anchor = plan.anchor() if rule.decay_to == "initial" else None
        self.state = rule.optimizer.allocate_state(plan)
        self._parts = rule.by_group(self.plan, self.anchor)

    def __call__(self, record: UpdateRecord) -> None:
        rule = self.rule
        for group, plan, anchor in self._parts:
            if group.frozen:
                continue
            seeds, coeffs, epilogue = rule.optimizer.step(self.state, record, group.lr)
            add_noise_(
                plan,
                seeds,
                coeffs,
                rounding=rule.rounding,
                backend=self.backend,
                decay=group.lr * record.decay,
                anchor=anchor,
                epilogue=epilogue,
                **rule.noise_options,
            )
        self.note_applied(record)

    def subset(self, which: Sequence[int]) -> Updater:
        """An Updater of some of the tensors, given by their numbers, in the same memory and with the same state."""
        part = Updater.__new__(Updater)
        part.plan, part.rule, part.backend = self.plan.subset(which), self.rule, self.backend
        part.anchor = self.anchor.subset(which) if self.anchor is not None else None
        part.state = self.state
        part._parts = self.rule.by_group(part.plan, part.anchor)
        return part

    def note_applied(self, record: UpdateRecord) -> None:
        """Notes a generation that is already in the weights, for the optimizer's state."""
        self.state.past.appendleft(record)
