"""Groups of weights with a sigma and an lr of their own. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..utils.errors import BadType, BadValue
from ..utils.suggest import unknown


@dataclass(frozen=True)
class Group:
    """Gives the weights whose names match a glob pattern their own sigma and lr.

    sigma, lr: factors of the run's sigma and lr, > 0. With both 0 the weights are frozen: no member and no update
    changes them. Unlike `exclude`, which keeps them out of the plan, the journal then says so, and a replay needs no
    options.
    """

    pattern: str
    sigma: float = 1.0
    lr: float = 1.0

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise BadType(f"Group.pattern: expected a pattern of names, got {self.pattern!r}")
        for name in ("sigma", "lr"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 < value < math.inf or self.frozen):
                raise BadValue(
                    f"Group.{name} of {self.pattern!r}: expected a positive factor, got {value!r}; sigma=0,lr=0 (both) "
                    "leaves weights as they are"
                )

    @property
    def frozen(self) -> bool:
        """Whether these weights stay as they are, in members and in updates."""
        return self.sigma == 0 and self.lr == 0

    def noise_of(
        self, terms: Iterable[tuple[int, float]], factor: float | None = None
    ) -> tuple[list[int], list[float]]:
        """Seeds and coefficients of this group's noise, for (seed, coefficient) of the run's. `factor` is the group's
        sigma unless it is given. Nothing if the group is frozen: noise times 0 would still turn a weight of -0.0 into
        0.0."""
        kept, factor = [] if self.frozen else list(terms), self.sigma if factor is None else factor
        return [seed for seed, _ in kept], [factor * coeff for _, coeff in kept]

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
