"""The rivals of `esfast bench gpu`: today's ES code, and a copy. A fused rival is in randn4x.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .today import draw_factors


class Today:
    """The three methods by which a worker of es-at-scale v1.0.0 (June 2026), the library of arXiv 2509.24372, changes
    its weights.

    For each parameter it seeds a generator, with the same seed, draws noise in the weights' dtype, multiplies it into a
    temporary and adds it. Restoring subtracts it. An update sums the members in float32 and adds the sum, rounded to
    the weights' dtype. Each method ends with a synchronisation, and empties the allocator's cache, which itself costs
    time; without `empties_cache` it does not. `update_member_by_member` is the update of v0.1.0 (October 2025), which
    rounds the weights after every member.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], kind: str, empties_cache: bool):
        self.parameters, self.kind, self.empties_cache = list(parameters), kind, empties_cache

    def perturb_self_weights(self, seed: int, noise_scale: float, negate: bool = False) -> None:
        for p in self.parameters:
            self._add(p, seed, -noise_scale if negate else noise_scale)
        self._finish()

    def restore_self_weights(self, seed: int, sigma: float) -> None:
        self.perturb_self_weights(seed, sigma, negate=True)

    def update_weights_from_seeds(
        self, seeds: Sequence[int], coeffs: Sequence[float], alpha: float, population_size: int
    ) -> None:
        for p in self.parameters:
            total = torch.zeros_like(p.data, dtype=torch.float32)
            for seed, coeff in zip(seeds, coeffs, strict=True):
                if self._has_factors(p):
                    a, b = draw_factors(p, self._generator(p, seed))
                    total.flatten(1).addmm_(a.float(), b.float(), alpha=coeff)
                else:
                    total.add_(self._draw(p, seed).to(torch.float32) * coeff)
            p.data.add_(total.mul_(alpha / population_size).to(p.dtype))
        self._finish()

    def update_member_by_member(
        self, seeds: Sequence[int], coeffs: Sequence[float], alpha: float, population_size: int
    ) -> None:
        for seed, coeff in zip(seeds, coeffs, strict=True):
            for p in self.parameters:
                self._add(p, seed, alpha / population_size * coeff)
        self._finish()

    def fill_cache(self) -> None:
        """Fills the allocator's cache as in the middle of a run, after another contender emptied it."""
        for p in (max(self.parameters, key=torch.numel), min(self.parameters, key=torch.numel)):
            self._add(p, 0, 0.0)

    # es-at-scale has gaussian noise alone; this is how one would add others there.

    def _has_factors(self, p: torch.Tensor) -> bool:
        return self.kind == "low_rank" and p.dim() > 1

    def _generator(self, p: torch.Tensor, seed: int) -> torch.Generator:
        return torch.Generator(device=p.device).manual_seed(seed)

    def _add(self, p: torch.Tensor, seed: int, scale: float) -> None:
        if self._has_factors(p):
            p.data.flatten(1).addmm_(*draw_factors(p, self._generator(p, seed)), alpha=scale)
        else:
            p.data.add_(scale * self._draw(p, seed))

    def _draw(self, p: torch.Tensor, seed: int) -> torch.Tensor:
        generator = self._generator(p, seed)
        if self.kind != "rademacher":
            return torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device, generator=generator).mul_(2).sub_(1)

    def _finish(self) -> None:
        if self.empties_cache and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def copy_each(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(destinations, sources, strict=True):
        mine.copy_(theirs)


def copy_flat(flat: torch.Tensor) -> None:
    """Reads and writes as many bytes as `flat` has, with two copies of half of it onto the other half, so that no
    further memory is needed."""
    low, high = flat.chunk(2)
    low.copy_(high)
    high.copy_(low)
