"""How a member's weights are made and undone.

| mode    | extra memory | read + written per member, 16-bit weights | after the population                        |
|---------|--------------|-------------------------------------------|---------------------------------------------|
| base    | 1x weights   | 4 bytes a weight                          | the same bits as before                     |
| inplace | none         | 4 bytes a weight                          | rounding errors stay: a drift, in every dtype |
"""

from __future__ import annotations

from .interrupts import held
from .ops import add_noise_
from .plan import Plan


class BaseWeights:
    """Members are written from a copy that is only read, so nothing is ever subtracted and restoring is a copy.

    The base is the truth: whatever interrupts a member, `restore` gives back the bits.
    """

    def __init__(self, plan: Plan, noise: str, backend: str):
        self.plan, self.base = plan, plan.clone()
        self._options = {"noise": noise, "backend": backend}

    def perturb(self, seed: int, coeff: float) -> None:
        add_noise_(self.plan, [seed], [coeff], base=self.base, **self._options)

    def restore(self) -> None:
        add_noise_(self.plan, [], [], base=self.base, **self._options)

    def update(self, seeds: list[int], coeffs: list[float]) -> None:
        add_noise_(self.base, seeds, coeffs, **self._options)
        self.restore()


class InplaceWeights:
    """Members are made in place, each from the one before, and the noise is subtracted again. Not exact."""

    def __init__(self, plan: Plan, noise: str, backend: str):
        self.plan = plan
        self._options = {"noise": noise, "backend": backend}
        self._applied: list[tuple[int, float]] = []

    def perturb(self, seed: int, coeff: float) -> None:
        self._move([(seed, coeff)])

    def restore(self) -> None:
        self._move([])

    def update(self, seeds: list[int], coeffs: list[float]) -> None:
        self.restore()
        add_noise_(self.plan, seeds, coeffs, **self._options)

    def _move(self, target: list[tuple[int, float]]) -> None:
        terms = [(s, -c) for s, c in self._applied] + target
        with held():  # what is applied and what is noted down must not part
            if terms:  # from member to member in one pass, rounded once
                add_noise_(self.plan, [s for s, _ in terms], [c for _, c in terms], **self._options)
            self._applied = target


MODES = {"base": BaseWeights, "inplace": InplaceWeights}
