"""Refuses weights that are NaN or infinite: no run can learn from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..utils.errors import BadValue

# Names that a message shows, at most.
SHOWN = 3


def check_finite(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ValueError, with their names, if weights are NaN or infinite. It reads all weights once."""
    named = list(named)
    names = [name for name, tensor in named if tensor.numel() and not _is_finite(tensor)]
    if names:
        raise BadValue(
            f"{len(names)} of {len(named)} tensors hold NaN or infinite weights: {some(names)}. No update mends them: "
            "take an undamaged checkpoint, or leave them out (exclude=) if they are meant to be so"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # Minimum and maximum are NaN if any weight is, and unlike a sum they can't overflow.
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) and torch.isfinite(most))


def some(names: Sequence[str]) -> str:
    """Names for a message, the first of them."""
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
