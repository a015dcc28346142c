"""How a generation changes the weights: the optimizer's rule, and the Updater that training and replay share.

An optimizer turns a generation's reward-weighted noise g = sum_j coeffs[j] * noise(seeds[j]) into a step:

| optimizer | step                                                        | extra memory     | work of an update     |
|-----------|-------------------------------------------------------------|------------------|-----------------------|
| SGD       | w += lr g, as in the paper                                  | none             | N members             |
| Momentum  | v = beta v + lr g;  w += v, the last `window` generations   | none             | up to window N members|
| Adam      | w += lr m / (sqrt(v) + eps), m and v running means          | 8 bytes a weight | N members             |

Momentum keeps no buffer. Noise is a function of its seed, so the velocity is computed again from the seeds of the last
`window` generations, each times beta to the power of its age (Sutskever et al., ICML 2013; the terms beyond the window,
a fraction beta^window, are dropped). Adam is that of Kingma and Ba (arXiv 1412.6980) with decoupled weight decay
(Loshchilov and Hutter, arXiv 1711.05101). Each update is one fused pass over the weights.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.kinds import check_kind, check_rank
from ..core.ops import AdamStep, add_noise_
from ..core.plan import Plan
from ..utils.errors import BadType, BadValue
from ..utils.names import DECAY_TO, ROUNDINGS
from .optimizers import OPTIMIZERS, SGD, Adam, Group, Momentum, Optimizer, check_groups, check_optimizer

__all__ = [
    "DECAY_TO", "OPTIMIZERS", "SGD", "Adam", "Generation", "Group", "Momentum", "Optimizer", "Rule", "Updater",
    "check_groups", "check_optimizer",
]  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """The record of one `ES.step`. The weights first decayed by the fraction `decay`, towards zero or the initial
    weights; then the optimizer moved them along sum_j coeffs[j] * noise(seeds[j])."""

    generation: int
    seeds: list[int]
    coeffs: list[float]  # float32 values, lr included (but for Adam, whose lr is no factor of the gradient)
    rewards: list[float | None]  # None: the member was set aside
    sigma: float
    lr: float
    decay: float = 0.0  # a float32 value


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
        check_rank(check_kind(self.noise), self.rank)
        for what, value, known in (("rounding", self.rounding, ROUNDINGS), ("decay_to", self.decay_to, DECAY_TO)):
            if value not in known:
                raise BadValue(f"{what}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        if not isinstance(self.optimizer, Optimizer):
            raise BadType(
                f"optimizer: expected {', '.join(map(repr, OPTIMIZERS))} or an esfast.SGD, Momentum or Adam, "
                f"got {self.optimizer!r:.80}"
            )

    def gradient_lr(self, lr: float) -> float:
        """The factor of g in a generation's coefficients: lr, or 1 for Adam, which applies lr itself."""
        return 1.0 if isinstance(self.optimizer, Adam) else lr

    def extra_bytes(self, plan: Plan) -> int:
        """Bytes that an Updater takes: the moments and the anchor."""
        moments = 8 * plan.flat_numel if isinstance(self.optimizer, Adam) else 0
        return moments + (plan.nbytes if self.decay_to == "initial" else 0)

    @property
    def noise_options(self) -> dict:
        """The arguments of `add_noise_` that say which noise."""
        return {"noise": self.noise, "rank": self.rank}

    def split(self, *plans: Plan | None) -> list[tuple]:
        """Divides plans of the same tensors by group: for each group (group, *parts), a part of each plan. Without
        groups there is one part, the whole plans. Noise is a function of names, so the division does not change it."""
        rest = Group("*")
        if not self.groups:
            return [(rest, *plans)]
        numbers: dict[Group, list[int]] = {}
        for i, name in enumerate(plans[0].names):
            group = next((g for g in self.groups if fnmatch.fnmatchcase(name, g.pattern)), rest)
            numbers.setdefault(group, []).append(i)
        return [(g, *(p.part(which) if p is not None else None for p in plans)) for g, which in numbers.items()]

    def check_names(self, names: Sequence[str]) -> None:
        """ValueError if the pattern of a group matches none of the names."""
        for group in self.groups:
            if not any(fnmatch.fnmatchcase(name, group.pattern) for name in names):
                raise BadValue(f"groups: the pattern {group.pattern!r} matches no tensor; a name here is {names[0]!r}")

    def largest(self, factor: str) -> float:
        """The largest factor of "sigma" or "lr" that any group has."""
        return max([1.0, *(getattr(group, factor) for group in self.groups)])

    def to_json(self) -> dict:
        name = next(n for n, kind in OPTIMIZERS.items() if type(self.optimizer) is kind)
        optimizer = {"name": name, **dataclasses.asdict(self.optimizer)}
        fields = {"noise": self.noise, "rounding": self.rounding, "optimizer": optimizer, "decay_to": self.decay_to}
        groups = {"groups": [[g.pattern, g.sigma, g.lr] for g in self.groups]}
        fields |= {"rank": self.rank} if self.noise == "low_rank" else {}
        # Without groups the line is as in journals of older versions.
        return fields | (groups if self.groups else {})

    @classmethod
    def from_json(cls, fields: dict) -> Rule:
        """The inverse of `to_json`. Ignores other fields; KeyError or TypeError if one is missing or wrong."""
        optimizer = dict(fields["optimizer"])
        made = OPTIMIZERS[optimizer.pop("name")](**optimizer)
        groups = tuple(Group(*group) for group in fields.get("groups", ()))
        rank = fields["rank"] if fields["noise"] == "low_rank" else 1
        return cls(fields["noise"], fields["rounding"], made, fields["decay_to"], groups, rank)


class Updater:
    """Applies generations, in order, to the weights of a plan. ES.step and a replay both use it.

    It holds the optimizer's state between generations. Momentum: `past`, seeds and coefficients. Adam: `moments`,
    float32 (2, plan.flat_numel). decay_to="initial": `anchor`, a plan of the initial weights (of a float32 master,
    their upper halves).
    """

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        self.plan, self.rule, self.backend = plan, rule, backend
        if rule.noise == "low_rank":
            # What it refuses must be refused before a part of the weights has changed.
            plan.table(matrices=True)
        self.anchor = plan.anchor() if rule.decay_to == "initial" else None
        self.moments: torch.Tensor | None = None
        if isinstance(rule.optimizer, Adam):
            self.moments = torch.zeros(2, plan.flat_numel, dtype=torch.float32, device=plan.device)
        window = rule.optimizer.window if isinstance(rule.optimizer, Momentum) else 1
        self.past: deque[tuple[list[int], list[float]]] = deque(maxlen=window - 1)
        self._parts = rule.split(self.plan, self.anchor)

    def __call__(self, record: Generation) -> None:
        rule, o = self.rule, self.rule.optimizer
        seeds, coeffs = self._with_past(record.seeds, record.coeffs)
        for group, plan, anchor in self._parts:
            adam, scaled = None, [group.lr * c for c in coeffs]
            if isinstance(o, Adam):
                lr = group.lr * record.lr
                adam, scaled = AdamStep.at(record.generation + 1, self.moments, lr, o.beta1, o.beta2, o.eps), coeffs
            add_noise_(
                plan, seeds, scaled, rounding=rule.rounding, backend=self.backend, **rule.noise_options,
                decay=group.lr * record.decay, anchor=anchor, adam=adam,
            )  # fmt: skip
        self.recall(record)

    def part(self, which: Sequence[int]) -> Updater:
        """An Updater of some of the tensors, given by their numbers, in the same memory and with the same state."""
        part = Updater.__new__(Updater)
        part.plan, part.rule, part.backend = self.plan.part(which), self.rule, self.backend
        part.anchor = self.anchor.part(which) if self.anchor is not None else None
        part.moments, part.past = self.moments, self.past
        part._parts = self.rule.split(part.plan, part.anchor)
        return part

    def recall(self, record: Generation) -> None:
        """Notes a generation that is already in the weights, for the optimizer's state."""
        self.past.appendleft((record.seeds, record.coeffs))

    def _with_past(self, seeds: list[int], coeffs: list[float]) -> tuple[list[int], list[float]]:
        seeds, coeffs = list(seeds), list(coeffs)
        for age, (earlier, values) in enumerate(self.past, start=1):
            seeds += earlier
            coeffs += [float(np.float32(self.rule.optimizer.beta**age * c)) for c in values]
        return seeds, coeffs
