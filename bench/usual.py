"""The usual code's numerics as a weight mode, so that ES, ESTrainer and the benchmarks run it like any other."""

from __future__ import annotations

import torch

from ..core.plan import Plan
from ..es.store import LocalStore
from ..update.updater import Rule, UpdateRecord
from . import rivals, today


class UsualWeights(LocalStore):
    """Adds and subtracts noise from torch.randn in the weights' dtype, in place. An update adds the members one by one,
    as es-at-scale v0.1.0 does, or with `summed` their float32 sum, as v1.0.0 does. Every step is rounded to the
    dtype."""

    mode = "inplace"

    def __init__(self, plan: Plan, noise: str = "gaussian", summed: bool = False):
        super().__init__(plan, Rule(noise))
        self.noise, self.summed = noise, summed
        self._code = rivals.Today(plan.tensors, noise, empties_cache=False)
        self._applied: tuple[int, float] | None = None

    @torch.no_grad()
    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        self.restore()
        self._code.perturb_self_weights(seed, coeff)
        self._applied = seed, coeff

    @torch.no_grad()
    def restore(self) -> None:
        if self._applied is not None:
            self._code.restore_self_weights(*self._applied)
            self._applied = None

    @torch.no_grad()
    def update(self, record: UpdateRecord) -> None:
        if record.decay:
            raise ValueError("the usual code has no weight decay")
        self.restore()
        if self.summed:
            today.update_(self.plan.tensors, record.seeds, record.coeffs, self.noise)
        else:
            self._code.update_member_by_member(record.seeds, record.coeffs, alpha=1.0, population_size=1)
