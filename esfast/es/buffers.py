"""Puts back the buffers that a member changed: BatchNorm's statistics, counters, tables.

Every member must begin with the same model, and a population must leave the model as it was, also in train mode. Copies
of the buffers are made once, not once a member. At a member's end the buffers are compared with the copies, and written
only where they differ.
"""

from __future__ import annotations

import logging

import torch

from ..core.plan import Plan
from ..utils.changes import same_bits, version
from ..utils.interrupts import defer_sigint

log = logging.getLogger(__name__)

# Bytes that copies may take even if the weights are small.
LEAST_BUDGET = 64 * 2**20
# Copies of buffers may take one part in so many of the weights' bytes.
WEIGHTS_SHARE = 8
# Attributes of a module that are not restored: the user decides about train mode.
KEPT_AS_IT_IS = frozenset({"training"})


class Buffers:
    """The buffers of a plan's module, if there is a plan and it was made of one.

        buffers = Buffers(plan)
        buffers.note()       # remembers the buffers as they are now
        ...                  # members run
        buffers.put_back()   # restores them; may be called any number of times

    Restored are values, also those changed through `.data`, and buffers that a module replaced, added or removed. With
    the latter the module's other attributes are restored too, since they may describe the buffers (for which length a
    table was made). The smallest buffers are copied first, until the copies take an eighth of the weights' bytes (at
    least 64 MiB). For the rest (caches, quantized weights) a change shows in the version counter; it stays, and a
    warning names it once.
    """

    def __init__(self, plan: Plan | None):
        self._module = plan.module if plan is not None else None
        self._budget = max(LEAST_BUDGET, plan.nbytes // WEIGHTS_SHARE) if plan is not None else 0
        self._places: list[_Place] = []
        self._kept: dict[int, _Kept] = {}
        self._told: set[int] = set()

    def note(self) -> None:
        """Remembers the buffers as they are now, for `put_back`."""
        if self._module is None:
            return
        self._places = [_Place(module) for module in self._module.modules()]
        tensors = {id(t): t for place in self._places for t in place.buffers.values() if t is not None}
        before, self._kept, room = self._kept, {}, self._budget
        for key, tensor in sorted(tensors.items(), key=lambda item: _size(item[1])):
            room -= _size(tensor)
            # The old entry keeps the tensor alive, so that no other tensor has its id.
            kept = before.get(key)
            self._kept[key] = kept if kept is not None else _Kept(tensor, copied=room >= 0)
            self._kept[key].note()

    def put_back(self) -> None:
        """Restores the buffers as they were at `note`."""
        if self._module is None:
            return
        with defer_sigint(), torch.no_grad():
            for place in self._places:
                place.put_back()
            stayed = [key for key, kept in self._kept.items() if not kept.put_back()]
        self._tell([key for key in stayed if key not in self._told])

    def _tell(self, keys: list[int]) -> None:
        names = [name for name, tensor in self._module.named_buffers() if id(tensor) in keys]
        for name in names:
            log.warning("the buffer %r, which a member changed, is too large to be copied and stays as it is now", name)
        self._told.update(keys)


class _Place:
    """A module: which tensors are its buffers, and its attributes."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.buffers, self.attributes = module, dict(module._buffers), dict(vars(module))
        self.transient = set(module._non_persistent_buffers_set)

    def put_back(self) -> None:
        now, before = self.module._buffers, self.buffers
        if now.keys() == before.keys() and all(now[name] is before[name] for name in before):
            return
        attributes = vars(self.module)
        for name in attributes.keys() - self.attributes.keys() - KEPT_AS_IT_IS:
            del attributes[name]
        attributes.update({n: v for n, v in self.attributes.items() if n not in KEPT_AS_IT_IS})
        self.module._buffers.clear()
        self.module._buffers.update(before)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.transient)


class _Kept:
    """A buffer's tensor: its memory, its version, and a copy of its values if there is room for one."""

    def __init__(self, tensor: torch.Tensor, copied: bool):
        self.tensor, self.copied = tensor, copied and _is_plain(tensor)
        self.memory: torch.Tensor | None = None
        self.copy: torch.Tensor | None = None
        self.version: int | None = None

    def note(self) -> None:
        if self.copied and not (self.memory is not None and self._in_place() and self._same()):
            self.memory, self.copy = self.tensor.detach(), self.tensor.detach().clone()
        self.version = version(self.tensor)

    def put_back(self) -> bool:
        """Restores the values. False if they were changed and there is no copy."""
        if not self.copied:
            before, self.version = self.version, version(self.tensor)
            return before == self.version
        if not self._in_place():
            self.tensor.data = self.memory
        if not self._same():
            # Outside inference mode such a tensor can't be written.
            with torch.inference_mode(self.tensor.is_inference()):
                self.tensor.copy_(self.copy)
            self.version = version(self.tensor)
        return True

    def _same(self) -> bool:
        return version(self.tensor) == self.version and same_bits(self.tensor, self.copy)

    def _in_place(self) -> bool:
        """Whether the tensor still has its memory and size; `.data = ...` and a resize change them."""
        t, m = self.tensor, self.memory
        return (t.data_ptr(), t.shape, t.stride(), t.dtype) == (m.data_ptr(), m.shape, m.stride(), m.dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be copied and compared: no wrapper, no sparse or quantized tensor, and not on "meta"."""
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return known and not tensor.is_meta and not tensor.is_quantized


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() if _is_plain(tensor) else 0
