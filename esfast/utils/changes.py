"""Detects writes to a tensor: by PyTorch's version counters, and by comparing bits where these don't help.

In-place operations, `load_state_dict` among them, increment a tensor's version. Writes through `.data`, by esfast's
kernels, and by BatchNorm to its statistics don't. And a write may leave the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(tensor: torch.Tensor) -> int | None:
    """The tensor's version counter; None for a tensor made in inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version


def versions(tensors: Iterable[torch.Tensor]) -> list[int | None]:
    return list(map(version, tensors))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are equal: 0.0 differs from -0.0, and a NaN equals itself. Waits for a GPU."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    integers = _INTEGERS[a.dtype.itemsize]
    return torch.equal(a.view(integers), b.view(integers))
