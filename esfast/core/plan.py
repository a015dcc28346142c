"""Plan: the weights that calls work on. A Plan is validated once; then every call over it is cheap."""

from __future__ import annotations

import itertools
import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence

import torch

from ..utils.errors import BadState, BadType, BadValue
from . import dtensors as shards
from .fingerprint import MASK, window_sums
from .plan_source import check_factor_names, check_names, check_tensor, entries, merge_tied, missing_parameter, select
from .segments import BFLOAT16, FLOAT16, FLOAT32, SPLIT, Entry, Slice, Table, check_overlap, describe, lay_out

__all__ = ["Entry", "Plan", "Slice"]

_Formats = dict[int, tuple[int, ...]]
# For each format of weights: formats of the base that they may be computed from, and of the anchor that they may decay
# to.
_BASES: _Formats = {FLOAT32: (FLOAT32,), BFLOAT16: (BFLOAT16, SPLIT, FLOAT32), FLOAT16: (FLOAT16, FLOAT32), SPLIT: ()}
_ANCHORS: _Formats = {FLOAT32: (FLOAT32,), BFLOAT16: (BFLOAT16,), FLOAT16: (FLOAT16,), SPLIT: (BFLOAT16,)}
PLANS: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Plan:
    """The weights that ES changes: float32, bfloat16 and float16 tensors on one device, each with a name.

    Args:
        source: an nn.Module (its parameters under their `named_parameters` names, whether or not they require a
            gradient; no buffers), or an iterable of (name, tensor) or (name, tensor, Slice). Tied weights (tensors with
            the same memory) count once, under the first name. Any strides work; rows that are not contiguous are slow.
            Of a DTensor the plan takes the part on this rank, which may be empty (core/dtensors.py).
        include: glob pattern or patterns (fnmatch): selects the names that match one. Default: all.
        exclude: glob pattern or patterns: leaves out the names that match one.

    Raises:
        TypeError, ValueError: something can't be perturbed; the message names it and says what to do. Refused are other
            dtypes, meta, sparse and wrapper tensors, several devices, tensors without elements, overlapping memory,
            a name that stands twice, names with the same 32-bit id, slices outside their whole tensor, patterns that
            match nothing, and an empty selection.

    Attributes: `names` (list of str), `tensors` (list), `numel` (number of weights), `nbytes` and `device`, all of the
    parts on this rank; `flat_numel`, elements of a flat buffer with one number for each weight; `module`, the nn.Module
    that the plan was made of, or None.
    """

    module: torch.nn.Module | None = None

    def __init__(
        self,
        source: torch.nn.Module | Iterable[tuple],
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ):
        self.module = source if isinstance(source, torch.nn.Module) else None
        self._gathering = shards.fsdp_modules(source)
        self._reshard()
        given = select(entries(source), include, exclude)
        self._sharded = [(e.name, e.tensor) for e in given if shards.is_dtensor(e.tensor)]
        held = [part for e in given for part in (shards.local_entries(e) if shards.is_dtensor(e.tensor) else [e])]
        for entry in held:
            check_tensor(entry)
        self._held, self.flat_numel = lay_out(merge_tied(held))
        check_names(self._held)
        # True for a clone: no module holds its tensors, so nothing can move them.
        self._private = False
        devices = {e.tensor.device for e in self._held}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise BadValue(f"Plan: all tensors must be on one device, found {found}. Make one Plan per device.")
        self.device = devices.pop()
        # In a split plan, the flat buffer with the low halves of all weights.
        self.low: torch.Tensor | None = None
        self._finish()
        check_overlap(self.entries, self._table)

    def _finish(self) -> None:
        # Without empty shards. Even all shards on this rank may be empty.
        self.entries = [e for e in self._held if e.tensor.numel()]
        self._tensors = [e.tensor for e in self.entries]
        self._tables: list[
            tuple[weakref.ref[Plan], weakref.ref[Plan] | None, bool, Table]
            # Weak references: other plans aren't kept alive.
        ] = []
        self._table = Table(self.entries, self.entries)
        # A traced call finds the plan by this number.
        self.number = next(_numbers)
        PLANS[self.number] = self
        self._addresses = self._current_addresses()

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.entries]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._tensors)

    @property
    def numel(self) -> int:
        return sum(e.tensor.numel() for e in self.entries)

    @property
    def whole_numel(self) -> int:
        """Number of weights of the whole tensors; `numel` of them lie on this rank."""
        return sum({e.name: math.prod(e.window.shape) for e in self._held}.values())

    @property
    def whole_names(self) -> list[str]:
        """Names of the whole tensors, also of those without a part on this rank."""
        return list(dict.fromkeys(e.name for e in self._held))

    @property
    def sharded(self) -> bool:
        """Whether some of the tensors are DTensors, so that other ranks hold other parts."""
        return bool(self._sharded)

    @property
    def nbytes(self) -> int:
        return sum(e.tensor.numel() * e.tensor.element_size() for e in self.entries)

    @property
    def layout(self) -> str:
        """Checksum of the names, shapes and dtypes of the whole tensors, in order: eight hex digits. A journal can be
        replayed on plans with the same layout. Sharding does not change it."""
        wholes = dict.fromkeys(describe(e, whole=True) for e in self._held)
        return f"{zlib.crc32(repr(list(wholes)).encode()):08x}"

    def fingerprint(self) -> str:
        """Checksum of the bits of all weights, 16 hex digits: the same on every device and for every sharding. See
        esfast.core.fingerprint. It reads the weights once and takes 8 MiB (128 MiB on a GPU).

        With DTensors it is a collective call of the ranks of their meshes; RuntimeError if replicas differ."""
        self._check_addresses()
        places = ((e.name, e.window.offset, tuple(e.tensor.shape)) for e in self.entries)
        sums = dict(zip(places, window_sums(self.entries, self.low), strict=True))
        return f"{sum(shards.gather([t for _, t in self._sharded], sums).values()) & MASK:016x}"

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors}))
        of = f" of {self.whole_numel:,}" if self.sharded else ""
        return f"Plan({len(self)} tensors, {self.numel:,}{of} weights, {dtypes}, {self.device})"

    def clone(self) -> Plan:
        """A plan of the same names over copies of the tensors, for example the base that members are written from."""
        return self._copy(
            lambda e: (e.tensor.detach().clone(), e.split), None if self.low is None else self.low.clone()
        )

    def master(self) -> Plan:
        """A plan of the same names over float32 copies, which updates change without rounding to 16 bits.

        A bfloat16 tensor becomes a split one. Its upper 16 bits are a bfloat16 tensor (`high()`), from which members
        are written at 2 bytes a weight; the lower 16 bits are in a buffer that only updates read. The arithmetic is
        that of float32, to the bit. A float16 tensor becomes a float32 one: 2^30 floats round to zero in float16, and
        16 further bits can't tell them apart. A float32 tensor is copied.
        """

        def as_master(e: Entry) -> tuple[torch.Tensor, bool]:
            if e.format == BFLOAT16:
                return e.tensor.detach().clone(), True
            return e.tensor.detach().to(torch.float32, copy=True), False

        splits = any(e.format == BFLOAT16 for e in self.entries)
        low = torch.zeros(self.flat_numel, dtype=torch.int16, device=self.device) if splits else None
        return self._copy(as_master, low)

    def subset(self, which: Sequence[int]) -> Plan:
        """A plan of some of the tensors, given by their numbers, over the same memory and the same flat buffers."""
        part = self._copy(lambda e: (e.tensor, e.split), self.low, [self.entries[i] for i in which])
        part._private, part._gathering = self._private, self._gathering
        return part

    def anchor(self) -> Plan:
        """A copy of the weights as the target of weight decay; of split tensors only the upper halves."""
        return (self if self.low is None else self.high()).clone()

    def high(self) -> Plan:
        """A plan over the same memory without the low halves of split tensors."""
        return self._copy(lambda e: (e.tensor, False), None)

    def _copy(
        self,
        tensor_of: Callable[[Entry], tuple[torch.Tensor, bool]],
        low: torch.Tensor | None,
        entries: list[Entry] | None = None,
    ) -> Plan:
        copy = object.__new__(Plan)
        copy._held = [
            Entry(e.name, tensor, e.window, split, e.flat)
            for e in (self._held if entries is None else entries)
            for tensor, split in [tensor_of(e)]
        ]
        copy.device, copy.flat_numel, copy._private = self.device, self.flat_numel, True
        copy._gathering, copy._sharded = [], self._sharded
        copy.low = low
        copy._finish()
        return copy

    def table(self, base: Plan | None = None, anchor: Plan | None = None, matrices: bool = False) -> Table:
        """The segments that a pass over the weights needs: destinations here, sources in `base` (default: here too),
        and the weights that it decays to in `anchor`. `matrices`: cut for low-rank noise.

        Raises:
            TypeError, ValueError: `base` or `anchor` is no plan of the same tensors, is of a format that can't be
                converted, or shares memory with this one; low-rank noise of two tensors would be the same.
            RuntimeError: a tensor was moved or replaced since its plan was made.
        """
        self._check_addresses()
        self._reshard()
        base = self if base is None else base
        if base is self and anchor is None and not matrices:
            return self._table
        for what, other in (("base", base), ("anchor", anchor)):
            if other is not None and other is not self:
                if not isinstance(other, Plan):
                    raise BadType(f"{what}: expected a Plan (for example plan.clone()), got {type(other).__name__}")
                other._check_addresses()
        for b, a, cut, table in self._tables:
            if b() is base and (anchor is None if a is None else a() is anchor) and cut == matrices:
                return table
        self._check_other("base", base, _BASES)
        if anchor is not None:
            self._check_other("anchor", anchor, _ANCHORS)
        if matrices:
            check_factor_names(self._held)
        table = Table(self.entries, base.entries, anchor.entries if anchor is not None else None, matrices)
        alive = [t for t in self._tables if t[0]() is not None and (t[1] is None or t[1]() is not None)]
        self._tables = [
            *alive,
            (weakref.ref(base), weakref.ref(anchor) if anchor is not None else None, matrices, table),
        ]
        return table

    def _check_other(self, what: str, other: Plan, formats: dict[int, tuple[int, ...]]) -> None:
        if other is self:
            return
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if not mine.same_place(theirs) or theirs.format not in formats[mine.format]:
                raise BadValue(
                    f"{what}: its {describe(theirs)} stands where the plan has {describe(mine)}; "
                    f"{what} must hold the same tensors in the same order, as plan.clone() does"
                )
        if len(self) != len(other):
            raise BadValue(f"{what}: expected {len(self)} tensors as in the plan, got {len(other)}")
        check_overlap(self.entries + other.entries, self._table, other._table)

    def _reshard(self) -> None:
        shards.reshard(self._gathering)

    def _current_addresses(self) -> list[int]:
        # This runs on every call. It takes 22 us for 400 tensors; a loop would take 29.
        addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        return addresses + [shards.local_tensor(t).data_ptr() for _, t in self._sharded]

    def check_module(self) -> None:
        """RuntimeError if the module now has other parameters, as after `load_state_dict(..., assign=True)`: noise
        would go into tensors that nobody reads. Parameters that FSDP gathers are not checked."""
        if self.module is None or self.sharded or self._gathering:
            return
        if name := missing_parameter(self.module, self.names, self._tensors):
            raise BadState(
                f"Plan: {name!r} is no longer a parameter of the module (load_state_dict with assign=True, or a layer "
                "that was replaced?); make a new Plan, or a new ES, of the model as it is"
            )

    def _check_addresses(self) -> None:
        if self._private:
            return
        now = self._current_addresses()
        if now != self._addresses:
            names = self.names + [name for name, _ in self._sharded]
            name = next(n for n, a, b in zip(names, now, self._addresses, strict=True) if a != b)
            raise BadState(
                f"Plan: the memory of {name!r} moved since the plan was made (model.to(...), or a new .data?). "
                "Make the Plan after the model is where it stays."
            )
