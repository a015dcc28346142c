"""Measures how much memory work takes at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that `work` makes and that exist at the same time, at most. What operations allocate inside
    themselves is not counted."""
    with _Allocations() as made:
        work()
    return made.peak


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
