"""Settings of the optimizers and of the groups of weights: checked numbers, no tensors.

esfast.update.updater applies them. This module does not import torch, and so `esfast train --help` need not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.errors import BadType, BadValue
from ..utils.settings import check_int
from ..utils.suggest import unknown


@dataclass(frozen=True)
class SGD:
    """theta += lr g, the update of the paper; g is the reward-weighted noise. No state."""


@dataclass(frozen=True)
class Momentum:
    """Momentum without a buffer: every update replays the seeds of the last `window` generations.

    beta: fraction of the velocity that is kept from one generation to the next, 0 < beta < 1.
    window: generations that are replayed, at least 2. A fraction beta^window of the velocity is dropped.
    """

    beta: float = 0.9
    window: int = 10

    def __post_init__(self):
        _check_share("Momentum.beta", self.beta)
        check_int("Momentum.window", self.window, 2, 2**20)


@dataclass(frozen=True)
class Adam:
    """Adam over the estimated gradient g, with two float32 moments: 8 bytes a weight.

    beta1, beta2: fractions of the running means of g and g^2 that a step keeps, 0 < beta < 1.
    eps: added to sqrt(v), > 0. The gradient is that of z-scored rewards, so its size is about 1/sqrt(N), whatever the
        scale of the rewards.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check_share("Adam.beta1", self.beta1)
        _check_share("Adam.beta2", self.beta2)
        if not isinstance(self.eps, (int, float)) or not 1e-30 <= self.eps < math.inf:
            raise BadValue(f"Adam.eps: expected a positive number of at least 1e-30, got {self.eps!r}")


Optimizer = SGD | Momentum | Adam
OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


@dataclass(frozen=True)
class Group:
    """Gives the weights whose names match a glob pattern their own sigma and lr.

    sigma, lr: factors of the run's sigma and lr, > 0. To leave weights unchanged, keep them out of the plan
    (`exclude`).
    """

    pattern: str
    sigma: float = 1.0
    lr: float = 1.0

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise BadType(f"Group.pattern: expected a pattern of names, got {self.pattern!r}")
        for name in ("sigma", "lr"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise BadValue(f"Group.{name} of {self.pattern!r}: expected a positive factor, got {value!r}")

    def __str__(self) -> str:
        """The text that `parse` turns back into this group."""
        return f"{self.pattern}:sigma={float(self.sigma)!r},lr={float(self.lr)!r}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """The group of a text `PATTERN:sigma=X,lr=Y`, with either factor or both; ValueError for anything else."""
        pattern, colon, factors = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        named = [factor.partition("=") for factor in factors.split(",")]
        try:
            numbers = {name.strip(): float(value) for name, _, value in named}
        except ValueError:
            numbers = {}
        if not colon or len(numbers) != len(named):
            raise BadValue(f"group: expected PATTERN:sigma=X,lr=Y, such as '*embed*:lr=0.1', got {text!r}")
        for name in numbers:
            if name not in ("sigma", "lr"):
                raise BadValue(f"group: {unknown('factor', name, ('sigma', 'lr'))} in {text!r}")
        return cls(pattern, **numbers)


def check_groups(groups: Sequence[Group | str]) -> tuple[Group, ...]:
    """Groups from Group objects and texts (`Group.parse`). TypeError or ValueError for anything else."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise BadType(f"groups: expected a list of esfast.Group, or of PATTERN:sigma=X,lr=Y, got {groups!r:.80}")
    return tuple(g if isinstance(g, Group) else Group.parse(g) for g in groups)


def check_optimizer(value) -> Optimizer:
    """The optimizer itself, or the default one of a name."""
    if isinstance(value, str) and value in OPTIMIZERS:
        return OPTIMIZERS[value]()
    if isinstance(value, str):
        raise BadValue(f"optimizer: expected one of {', '.join(map(repr, OPTIMIZERS))}, got {value!r}")
    # Rule checks it.
    return value


def _check_share(what: str, value) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise BadValue(f"{what}: expected a number between 0 and 1, got {value!r}")
