"""Groups of weights with a sigma and an lr of their own. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.errors import BadType, BadValue
from ..utils.suggest import unknown


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
