"""Weights that are numbers: a run that begins with a NaN or an infinite weight can only lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plan import Plan

SHOWN = 3  # names in a message


def check_finite(plan: Plan) -> None:
    """ValueError, which names them, if there are weights that are NaN or infinite. It reads all weights once."""
    names = [e.name for e in plan.entries if not _is_finite(e.tensor)]
    if names:
        raise ValueError(
            f"{len(names)} of {len(plan)} tensors hold NaN or infinite weights: {some(names)}. No update mends them: "
            "take an undamaged checkpoint, or leave them out (exclude=) if they are meant to be so"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # a NaN anywhere makes both of them NaN, and unlike a sum they don't overflow
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) and torch.isfinite(most))


def some(names: Sequence[str]) -> str:
    """Names for a message, the first of them."""
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
