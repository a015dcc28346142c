"""How far the weights move, estimated from a sample of them."""

from __future__ import annotations

import math

import torch

from ..core.plan import Plan
from ..es.weights import sample


class Movement:
    """Euclidean norms of what updates did to the weights as they are stored, rounding included: an update that 16 bits
    lose shows as none. From up to weights.DRIFT_SAMPLE weights of each whole, contiguous tensor, each standing for its
    share of the tensor. To be called while no member is in place. Of weights in shards nothing is told.
    """

    def __init__(self, plan: Plan):
        found = [] if plan.sharded else sample(plan)
        self._views = [(view, window.shape[0]) for _, view, window in found]  # weights, and for how many
        self._initial = self._last = self._read()

    def norms(self) -> dict[str, float]:
        """`update_norm` since the last call, and `distance` from the weights that there were at first; {} if no tensor
        can be sampled."""
        if not self._views:
            return {}
        now = self._read()
        result = {"update_norm": self._norm(now, self._last), "distance": self._norm(now, self._initial)}
        self._last = now
        return result

    def _read(self) -> list[torch.Tensor]:
        return [view.to("cpu", torch.float64, copy=True) for view, _ in self._views]

    def _norm(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        squares = ((x - y).square().mean().item() for x, y in zip(a, b, strict=True))
        return math.sqrt(math.fsum(s * n for s, (_, n) in zip(squares, self._views, strict=True)))
