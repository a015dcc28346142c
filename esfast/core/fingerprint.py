"""A checksum of the weights' bits, independent of device, order and sharding: the sums of shards add up to the whole's.

    sum over all elements of row(tensor, i) * col(j) * bits   mod 2^64

`bits` is the element as a signed integer, i its row and j its column in the whole tensor (the last dimension is the
columns, the others together are the rows). row and col are odd 64-bit hashes. A flipped bit always changes the sum,
since an odd number times 2^k is no multiple of 2^64. Two elements that swap places change it with a probability of at
least 1 - 2^-32. The checksum guards against accidents, not against somebody who looks for a collision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .noise import tensor_id
from .segments import Entry, Slice

MASK = 2**64 - 1
_INTEGERS = {4: torch.int32, 2: torch.int16}
# Elements at once, as int64: enough work for every core between barriers.
_CHUNK = {"cpu": 2**20, "cuda": 2**24}


def window_sums(entries: Sequence[Entry], low: torch.Tensor | None = None) -> list[int]:
    """The sum of each entry's elements, 0 <= sum < 2^64. A split entry (float32 weights held as two halves) is summed
    as float32; `low` is the flat buffer of the low halves."""
    if not entries:
        return []
    device = entries[0].tensor.device
    most = min(_CHUNK.get(device.type, _CHUNK["cpu"]), max(e.tensor.numel() for e in entries))
    buffer = torch.empty(most, dtype=torch.int64, device=device)
    sums = []
    for e in entries:
        t = e.tensor.detach()
        total = _sum(t.view(_INTEGERS[t.element_size()]), e.name, e.window, buffer)
        if e.split:
            halves = low[e.flat : e.flat + t.numel()].view(t.shape)
            total = total * 2**16 + _sum(halves, e.name, e.window, buffer)  # both halves are signed, see csrc/dtypes.h
        sums.append(total)
    # Waits for the GPU, once.
    return [s & MASK for s in torch.stack(sums).tolist()]


def _sum(bits: torch.Tensor, name: str, window: Slice, buffer: torch.Tensor) -> torch.Tensor:
    if bits.dim() == 0:
        bits, window = bits.view(1), Slice((1,), (0,))
    whole, offset = window.shape, window.offset
    # How many rows of the whole tensor a step along each dimension passes over.
    outer = [int(np.prod(whole[d + 1 : -1], dtype=object)) for d in range(len(whole) - 1)]
    seed = _mix(np.array([tensor_id(name)], dtype=np.uint64))
    columns = bits.shape[-1]
    width = min(columns, len(buffer))
    height = len(buffer) // width
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for matrix, start in _matrices(bits):
        for c in range(0, columns, width):
            col = _weights(
                np.arange(c, min(c + width, columns), dtype=np.uint64) + np.uint64(offset[-1]), buffer.device
            )
            for r in range(0, len(matrix), height):
                part = matrix[r : r + height, c : c + width]
                place = np.unravel_index(np.arange(start + r, start + r + len(part)), bits.shape[:-1] or (1,))
                rows = sum(
                    ((p + o) * step for p, o, step in zip(place, offset[:-1], outer, strict=False)),
                    start=np.zeros(len(part), dtype=np.int64),
                )
                wide = buffer[: part.numel()].view(part.shape).copy_(part)
                total += wide.mul_(col).sum(1).mul_(_weights(seed + rows.view(np.uint64), buffer.device)).sum()
    return total


def _matrices(bits: torch.Tensor, start: int = 0) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields the tensor as matrices, without a copy, each with the number of its first row."""
    try:
        yield bits.view(-1, bits.shape[-1]), start
    except RuntimeError:
        # The strides do not allow a view with two dimensions.
        for i, part in enumerate(bits):
            yield from _matrices(part, start + i * (part.numel() // part.shape[-1]))


def _weights(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy((_mix(numbers) | np.uint64(1)).view(np.int64)).to(device, non_blocking=True)


def _mix(x: np.ndarray) -> np.ndarray:
    """The x-th output of SplitMix64 (Steele, Lea and Flood, 2014), uint64."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
