"""The optimizers and the groups of weights as settings: numbers that are checked, no tensors.

What an update makes of them is in esfast.update. This module does not import torch, nor does `esfast train --help`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.noise import check_int
from ..utils.suggest import unknown


@dataclass(frozen=True)
class SGD:
    """theta += lr g: the paper's update."""


@dataclass(frozen=True)
class Momentum:
    """Momentum without a buffer: the seeds of the last `window` generations are replayed in every update.

    beta: share of the velocity that is kept from one generation to the next, 0 < beta < 1.
    window: generations that are replayed, at least 2; beta^window of the velocity is forgotten.
    """

    beta: float = 0.9
    window: int = 10

    def __post_init__(self):
        _check_share("Momentum.beta", self.beta)
        check_int("Momentum.window", self.window, 2, 2**20)


@dataclass(frozen=True)
class Adam:
    """Adam over the estimated gradient, with float32 moments: 8 bytes a weight.

    beta1, beta2: what the running means of g and g^2 keep, 0 < beta < 1. eps: added to sqrt(v), > 0. The gradient is
    that of z-scored rewards, about 1/sqrt(N) in size, whatever the scale of the rewards.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check_share("Adam.beta1", self.beta1)
        _check_share("Adam.beta2", self.beta2)
        if not isinstance(self.eps, (int, float)) or not 1e-30 <= self.eps < math.inf:
            raise ValueError(f"Adam.eps: expected a positive number of at least 1e-30, got {self.eps!r}")


Optimizer = SGD | Momentum | Adam
OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


@dataclass(frozen=True)
class Group:
    """Weights with a sigma and an lr of their own: those whose names match the glob pattern, times these factors.

    sigma, lr: factors of the run's, > 0. Weights that shall stay as they are do not belong in the plan (`exclude`).
    """

    pattern: str
    sigma: float = 1.0
    lr: float = 1.0

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TypeError(f"Group.pattern: expected a pattern of names, got {self.pattern!r}")
        for name in ("sigma", "lr"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"Group.{name} of {self.pattern!r}: expected a positive factor, got {value!r}")

    def __str__(self) -> str:
        """The text that `parse` makes the same group of."""
        return f"{self.pattern}:sigma={float(self.sigma)!r},lr={float(self.lr)!r}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """`PATTERN:sigma=X,lr=Y`, either of them or both; ValueError for anything else."""
        pattern, colon, factors = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        named = [factor.partition("=") for factor in factors.split(",")]
        try:
            numbers = {name.strip(): float(value) for name, _, value in named}
        except ValueError:
            numbers = {}
        if not colon or len(numbers) != len(named):
            raise ValueError(f"group: expected PATTERN:sigma=X,lr=Y, such as '*embed*:lr=0.1', got {text!r}")
        for name in numbers:
            if name not in ("sigma", "lr"):
                raise ValueError(f"group: {unknown('factor', name, ('sigma', 'lr'))} in {text!r}")
        return cls(pattern, **numbers)


def check_groups(groups: Sequence[Group | str]) -> tuple[Group, ...]:
    """Groups, or texts of them as `Group.parse` reads them. TypeError or ValueError for anything else."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups: expected a list of esfast.Group, or of PATTERN:sigma=X,lr=Y, got {groups!r:.80}")
    return tuple(g if isinstance(g, Group) else Group.parse(g) for g in groups)


def check_optimizer(value) -> Optimizer:
    """An optimizer, or the default one of that name."""
    if isinstance(value, str) and value in OPTIMIZERS:
        return OPTIMIZERS[value]()
    if isinstance(value, str):
        raise ValueError(f"optimizer: expected one of {', '.join(map(repr, OPTIMIZERS))}, got {value!r}")
    return value  # Rule looks at it


def _check_share(what: str, value) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{what}: expected a number between 0 and 1, got {value!r}")
