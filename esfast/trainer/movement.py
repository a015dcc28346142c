"""How far the weights move, estimated from a sample of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core.plan import Plan
from ..es.weights import sample
from ..update.updater import Rule

_ALIKE = Rule()


class Movement:
    """Euclidean norms of the changes of the stored weights. Updates that bfloat16 rounds away count as zero.

    The norms are estimated from up to weights.DRIFT_SAMPLE weights of each whole, contiguous tensor, each of which
    stands for its share of the tensor. Call it while no member is in place. It reports nothing for
    sharded weights, nor without a plan. The groups of the run's rule say how far an update should move each tensor.
    """

    def __init__(self, plan: Plan | None, rule: Rule = _ALIKE):
        found = [] if plan is None or plan.sharded else sample(plan)
        # Sampled weights, and how many weights of the tensor they stand for.
        self._views = [(view, math.prod(window.shape)) for _, view, window in found]
        self._exact = math.fsum(math.prod(w.shape) * rule.group_of(name).lr ** 2 for name, _, w in found)
        self._initial = self._last = self._read()

    def norms(self, coeffs: Sequence[float] = ()) -> dict[str, float]:
        """`update_norm` since the last call, and `distance` from the first weights; {} if no tensor can be sampled.

        With the coefficients of an update's noise also `update_kept`: the norm divided by that of the same update in
        exact arithmetic. Far below 1, rounding has lost the update.
        """
        if not self._views:
            return {}
        now = self._read()
        result = {"update_norm": self._norm(now, self._last), "distance": self._norm(now, self._initial)}
        self._last = now
        # Each of a seed's numbers has variance 1, whatever the kind of noise.
        exact = math.sqrt(math.fsum(c * c for c in coeffs) * self._exact)
        return result | ({"update_kept": result["update_norm"] / exact} if exact else {})

    def _read(self) -> list[torch.Tensor]:
        return [view.to("cpu", torch.float64, copy=True) for view, _ in self._views]

    def _norm(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        squares = ((x - y).square().mean().item() for x, y in zip(a, b, strict=True))
        return math.sqrt(math.fsum(s * n for s, (_, n) in zip(squares, self._views, strict=True)))
