"""Whether somebody wrote a tensor: by PyTorch's version counters, and by bits where those say nothing.

In-place operations count a tensor's version up, `load_state_dict` among them. Writes through `.data`, esfast's own
kernels, and BatchNorm's to its statistics do not; and a write may leave the bits that were there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(tensor: torch.Tensor) -> int | None:
    """How often it was written, None of a tensor that was made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def versions(tensors: Iterable[torch.Tensor]) -> list[int | None]:
    return list(map(version, tensors))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit: 0.0 is not -0.0, and a NaN is itself. On a GPU it waits for the result."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    integers = _INTEGERS[a.dtype.itemsize]
    return torch.equal(a.view(integers), b.view(integers))
