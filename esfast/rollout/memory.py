"""Measures how much memory work takes at its peak, and tells what rows of a batch take by it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that `work` makes and that exist at the same time, at most. What operations allocate inside
    themselves is not counted."""
    with _Allocations() as made:
        work()
    return made.peak


class RowBytes(NamedTuple):
    """Bytes that a row takes while its text is generated.

    held     from its prompt to its last token: keys and values, tokens
    reading  beside that, while its prompt is read. Prompts can be read by parts, a few rows at once
    step     beside that, in a step, which is of all rows
    """

    held: int
    reading: int = 0
    step: int = 0

    @property
    def whole(self) -> int:
        """If the prompts of all rows are read at once."""
        return self.held + max(self.reading, self.step)

    def transient(self, rows: int, read_at_once: int) -> int:
        """What so many rows take beside `held`, at most: it is taken and freed again in each forward pass."""
        return max(min(rows, read_at_once) * self.reading, rows * self.step)

    def of(self, rows: int, read_at_once: int) -> int:
        return rows * self.held + self.transient(rows, read_at_once)

    def fitting(self, memory: int, read_at_once: int) -> int:
        """How many rows such a memory holds."""
        by_parts = min((memory - read_at_once * self.reading) // max(1, self.held), memory // (self.held + self.step))
        return max(memory // self.whole, by_parts)


class _Allocations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._alive: dict[int, weakref.finalize] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A view of a weight makes no memory.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _freed(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self._now -= size


def _storages(values) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
