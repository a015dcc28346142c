"""What a kernel may touch. Every access is checked: inside what was handed to it, aligned to its width, without races."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from .program import PtxError

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MemoryFault(PtxError):
    """An access that a GPU would refuse, or that no kernel of ours may make."""


class Extents:
    """Disjoint ranges of addresses."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        merged: list[list[int]] = []
        for begin, end in sorted(set(ranges)):
            if merged and begin < merged[-1][1]:  # neighbours stay apart: no access may reach across two tensors
                merged[-1][1] = max(merged[-1][1], end)
            elif end > begin:
                merged.append([begin, end])
        self.begins, self.ends = (np.array([m[i] for m in merged], dtype=np.uint64) for i in (0, 1))

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if not len(self.begins):
            return np.zeros(len(addresses), dtype=bool)
        at = np.searchsorted(self.begins, addresses, "right") - 1
        return (at >= 0) & (addresses + np.uint64(size) <= self.ends[at])


class GlobalMemory:
    """Memory of this process at its own addresses. `readable` and `writable`: (begin, end) of what a kernel was given."""

    def __init__(self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]):
        writable = list(writable)
        self.readable, self.writable = Extents([*readable, *writable]), Extents(writable)
        # One array from the lowest address to the highest. Most of it is not mapped; `_index` keeps accesses out of
        # that.
        self.base = int(self.readable.begins[0]) & ~15
        size = (int(self.readable.ends[-1]) - self.base + 15) // 16 * 16
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        self.views = {size: flat.view(dtype) for size, dtype in UNSIGNED.items()}

    def _index(self, what: str, allowed: Extents, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        check_alignment(what, addresses, size * count)
        inside = allowed.holds(addresses, size * count)
        if not inside.all():
            raise MemoryFault(f"{what}: out of bounds, at address {int(addresses[~inside][0]):#x}")
        first = ((addresses - np.uint64(self.base)) // np.uint64(size)).astype(np.int64)
        return first + np.arange(count)[:, None]

    def load(self, what: str, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """(count, lanes) words of `size` bytes from uint64 addresses."""
        return self.views[size][self._index(what, self.readable, addresses, size, count)]

    def store(self, what: str, addresses: np.ndarray, values: np.ndarray) -> None:
        size, count = values.itemsize, len(values)
        self.views[size][self._index(what, self.writable, addresses, size, count)] = values


def check_alignment(what: str, addresses: np.ndarray, size: int) -> None:
    off = addresses % np.uint64(size) != 0
    if off.any():
        raise MemoryFault(f"{what}: address {int(addresses[off][0]):#x} is not aligned to {size} bytes")


class SharedMemory:
    """A few KiB for each block of threads, in which a race is an error.

    All lanes of the machine run in step, so that a missing barrier changes no value here as it would on a GPU. So each
    byte remembers which warp touched it since the block's last barrier: only that warp may touch it again before the
    next one, unless all of them read.
    """

    def __init__(self, blocks: int, size: int):
        self.size = size
        self.bytes = np.zeros(blocks * size, dtype=np.uint8)
        self.epoch = np.zeros(blocks, dtype=np.int64)  # barriers that the block has passed
        nobody = -np.ones((2, blocks * size), dtype=np.int64)
        self.written, self.read = nobody.copy(), nobody.copy()  # rows: epoch and warp of the last access

    def index(self, what: str, addresses: np.ndarray, lanes: tuple[np.ndarray, np.ndarray], size: int, store: bool):
        """Index (size, lanes) of each byte; `lanes`: block and warp of each."""
        check_alignment(what, addresses, size)
        if (addresses + np.uint64(size) > np.uint64(self.size)).any():
            raise MemoryFault(f"{what}: out of bounds, past the {self.size} bytes of shared memory")
        block, warp = lanes
        index = addresses.astype(np.int64) + block * self.size + np.arange(size)[:, None]
        epoch = self.epoch[block]
        for access in (self.written, self.read) if store else (self.written,):
            if ((access[0][index] == epoch) & (access[1][index] != warp)).any():
                raise MemoryFault(f"{what}: a race in shared memory, with no barrier since another warp's access")
        touched = self.written if store else self.read
        if not store:  # a byte that several warps read belongs to none of them
            others = (touched[0][index] == epoch) & (touched[1][index] != warp)
            warp = np.where(others, -2, warp)
        touched[0][index], touched[1][index] = np.broadcast_to(epoch, index.shape), np.broadcast_to(warp, index.shape)
        return index

    def load(self, what: str, addresses: np.ndarray, lanes, size: int, count: int) -> np.ndarray:
        found = self.bytes[self.index(what, addresses, lanes, size * count, False)]
        return np.ascontiguousarray(found.T).view(UNSIGNED[size]).T

    def store(self, what: str, addresses: np.ndarray, lanes, values: np.ndarray) -> None:
        flat = np.ascontiguousarray(values.T).view(np.uint8).T
        index = self.index(what, addresses, lanes, len(flat), True)
        self.bytes[index] = flat
        if (self.bytes[index] != flat).any():  # the same value twice does no harm
            raise MemoryFault(f"{what}: a race in shared memory, where two warps write at once")

    def barrier(self, blocks: np.ndarray) -> None:
        self.epoch[blocks] += 1
