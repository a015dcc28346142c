"""add_noise_ as a torch custom op, for code that torch.compile traces. Eager calls skip the dispatcher.

The op gets the tensors and the number of their plan, which knows the tensors' names and slices. PyTorch may pass copies
of the tensors (functionalisation); the op then works on the copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..utils.errors import BadState
from .kinds import check_kind, check_rank, check_seed
from .plan import PLANS, Plan


@torch.library.custom_op("esfast::add_noise_", mutates_args=("tensors",))
def add_noise_op(
    tensors: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    plan: int,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    noise: str,
    rounding: str,
    backend: str,
    decay: float,
    rank: int = 1,
) -> None:
    from .ops import add_noise_

    whole = PLANS[plan]
    source = _over(whole, base) if base else None
    add_noise_(
        _over(whole, tensors),
        [s % 2**64 for s in seeds],
        coeffs,
        source,
        noise,
        rounding,
        backend,
        decay=decay,
        rank=rank,
    )


@add_noise_op.register_fake
def _(tensors, base, plan, seeds, coeffs, noise, rounding, backend, decay, rank=1) -> None:
    return None


def _over(plan: Plan, tensors: Sequence[torch.Tensor]) -> Plan:
    """The plan itself if the tensors are its own; otherwise a plan of the same names and slices over these tensors."""
    if [t.data_ptr() for t in tensors] == [t.data_ptr() for t in plan._tensors]:
        return plan
    return Plan([(e.name, t, e.window) for e, t in zip(plan.entries, tensors, strict=True)])


def traced(plan: Plan, seeds, coeffs, base, noise, rounding, backend, decay, anchor, adam, rank) -> None:
    """Takes the place of `add_noise_` while torch.compile traces: records a call of the custom op."""
    if anchor is not None or adam is not None or plan.low is not None or (base is not None and base.low is not None):
        raise BadState("add_noise_: under torch.compile without anchor, adam and split masters; call it outside")
    # The ints of an op are signed 64-bit numbers, into which a seed outside the range would be folded unnoticed. A
    # tensor of seeds, which only GPUs take, holds such numbers.
    on_device = isinstance(seeds, torch.Tensor) and plan.device.type != "cpu"
    keys = [int(s) % 2**64 for s in seeds] if on_device else list(map(check_seed, seeds))
    signed = [s - 2**64 if s >= 2**63 else s for s in keys]
    add_noise_op(
        plan._tensors,
        base._tensors if base is not None and base is not plan else [],
        plan.number,
        signed,
        [float(c) for c in coeffs],
        noise,
        rounding,
        backend,
        float(decay),
        check_rank(check_kind(noise), rank),
    )
