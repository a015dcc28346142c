"""Today's ES code on plain PyTorch, the rival of most benchmarks.

For each tensor it seeds the generator, draws the noise in the weights' dtype, scales it and adds it. Restoring
subtracts it. An update sums coeff * noise in a float32 tensor and adds that in the weights' dtype, as es-at-scale does
since v1.0.0. Low-rank noise (of rank 1) is a torch.randn for each of a matrix's two factors, and an addmm_. It is not
the fastest that PyTorch can do; that is in afternoon.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def perturb_(tensors: Iterable[torch.Tensor], seed: int, sigma: float, kind: str) -> None:
    """weights += sigma * noise(seed), in place; with -sigma it is the usual restore, which rounding leaves inexact."""
    for p in tensors:
        generator = torch.Generator(p.device).manual_seed(seed)
        if kind == "low_rank" and p.dim() > 1:
            p.flatten(1).addmm_(*draw_factors(p, generator), alpha=sigma)
        else:
            p.add_(_draw(p, generator, kind).mul_(sigma))


def update_(tensors: Iterable[torch.Tensor], seeds: Sequence[int], coeffs: Sequence[float], kind: str) -> None:
    """weights += sum_j coeffs[j] * noise(seeds[j]), in place."""
    for p in tensors:
        generator = torch.Generator(p.device)
        total = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for seed, coeff in zip(seeds, coeffs, strict=True):
            generator.manual_seed(seed)
            if kind == "low_rank" and p.dim() > 1:
                a, b = draw_factors(p, generator)
                total.flatten(1).addmm_(a.float(), b.float(), alpha=coeff)
            else:
                total.add_(_draw(p, generator, kind), alpha=coeff)
        p.add_(total.to(p.dtype))


def draw_factors(p: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A column and a row of standard normal numbers in the dtype of p, whose product has p's shape, flattened to two
    dimensions."""
    rows, cols = p.flatten(1).shape
    a, b = (torch.randn(n, dtype=p.dtype, device=p.device, generator=generator) for n in (rows, cols))
    return a[:, None], b[None]


def _draw(p: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    # With low-rank noise only matrices have factors; vectors get gaussian noise.
    if kind != "rademacher":
        return torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
    # three times as fast on a CPU as torch.empty_like(p).bernoulli_()
    return torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device, generator=generator).mul_(2).sub_(1)
