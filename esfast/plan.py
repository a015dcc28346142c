"""Which weights: a Plan is validated once, then every call over it is cheap."""

from __future__ import annotations

import difflib
import fnmatch
import math
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .noise import check_int, tensor_id

# The codes of csrc/dtypes.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Columns of the segment table, the fields of csrc/cpu.h's Segment.
FIELDS = ("dst", "src", "rows", "cols", "dst_stride", "src_stride", "index_stride", "first", "tensor_id", "dtype")
MAX_SEGMENTS_PER_TENSOR = 65536
MAX_NUMEL = 2**62  # of a whole: tiles end behind the last element, and their numbers must fit an int64


@dataclass(frozen=True)
class Slice:
    """Where a tensor lies in a larger one: `tensor = whole[offset[0] : offset[0] + tensor.shape[0], ...]`.

    It gets the noise that these elements have in the whole: shards of a matrix, and the parts of a fused one, are
    perturbed exactly as the matrix they come from.

    Args:
        shape: shape of the whole tensor.
        offset: index of the tensor's first element in the whole, one number a dimension.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a plan: `tensor` holds the elements `window` of the whole tensor called `name`."""

    name: str
    tensor: torch.Tensor
    window: Slice

    def same_place(self, other: Entry) -> bool:
        return (self.name, self.window, self.tensor.shape, self.tensor.dtype, self.tensor.device) == (
            other.name, other.window, other.tensor.shape, other.tensor.dtype, other.tensor.device
        )  # fmt: skip


class Plan:
    """The weights that ES changes: float32, bfloat16 and float16 tensors on one device, each with its name.

    Args:
        source: an nn.Module (its parameters under their `named_parameters` names, whether or not they require grad; no
            buffers), or an iterable of (name, tensor) or (name, tensor, Slice). Tied weights, that is tensors that are
            the same memory, are one tensor under the name that comes first. Any strides will do, but rows that are not
            contiguous are slow.
        include: glob pattern or patterns (fnmatch); only the names that match one are taken. Default: all.
        exclude: glob pattern or patterns; names that match one are left out.

    Raises:
        TypeError, ValueError: what can't be perturbed is refused by name, with what to do: other dtypes, meta, sparse
            and wrapper tensors, several devices, tensors without elements, overlapping memory, one name twice, names
            with the same 32-bit id, slices outside their whole, patterns that match nothing, nothing left.

    Attributes: `names` (list of str), `tensors` (list), `numel` (weights in all), `nbytes`, `device`.
    """

    def __init__(
        self,
        source: torch.nn.Module | Iterable[tuple],
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ):
        entries = _select(_entries(source), include, exclude)
        for entry in entries:
            _check_tensor(entry)
        self.entries = _merge_tied(entries)
        _check_names(self.entries)
        self._tensors = [e.tensor for e in self.entries]
        self._private = False  # of a clone no module knows, so nothing moves its tensors
        devices = {e.tensor.device for e in self.entries}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"Plan: all tensors must be on one device, found {found}. Make one Plan per device.")
        self.device = devices.pop()
        self._paired: tuple[weakref.ref[Plan], np.ndarray] | None = None  # the base last used; not kept alive
        self._table = _table(self.entries, self.entries)
        self._addresses = self._current_addresses()
        _check_overlap(self.entries, self._table)

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
    def nbytes(self) -> int:
        return sum(e.tensor.numel() * e.tensor.element_size() for e in self.entries)

    @property
    def layout(self) -> str:
        """Eight hex digits for names, shapes, places and dtypes: what the noise, and so a journal, depends on."""
        return f"{zlib.crc32(repr([_describe(e) for e in self.entries]).encode()):08x}"

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors}))
        return f"Plan({len(self)} tensors, {self.numel:,} weights, {dtypes}, {self.device})"

    def clone(self) -> Plan:
        """A plan of the same names over copies of the tensors: the base that members are written from."""
        copy = Plan([(e.name, e.tensor.detach().clone(), e.window) for e in self.entries])
        copy._private = True
        return copy

    def table(self, base: Plan | None = None) -> np.ndarray:
        """The segments of csrc/cpu.h: int64 array (segments, 10), destinations in this plan, sources in `base`.

        Raises:
            TypeError, ValueError: `base` is no plan of the same tensors, or shares memory with this one.
            RuntimeError: a tensor was moved or replaced since its plan was made.
        """
        self._check_addresses()
        if base is None or base is self:
            return self._table
        if not isinstance(base, Plan):
            raise TypeError(f"base: expected a Plan (for example plan.clone()), got {type(base).__name__}")
        base._check_addresses()
        if self._paired is None or self._paired[0]() is not base:
            self._check_base(base)
            self._paired = (weakref.ref(base), _table(self.entries, base.entries))
        return self._paired[1]

    def _check_base(self, base: Plan) -> None:
        for mine, theirs in zip(self.entries, base.entries, strict=False):
            if not mine.same_place(theirs):
                raise ValueError(
                    f"base: its {_describe(theirs)} stands where the plan has {_describe(mine)}; "
                    "base must hold the same tensors in the same order, as plan.clone() does"
                )
        if len(self) != len(base):
            raise ValueError(f"base: expected {len(self)} tensors as in the plan, got {len(base)}")
        _check_overlap(self.entries + base.entries, np.concatenate([self._table, base._table]))

    def _current_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))  # on every call: 400 take 22 us, in a loop 29

    def _check_addresses(self) -> None:
        if self._private:
            return
        now = self._current_addresses()
        if now != self._addresses:
            name = next(e.name for e, a, b in zip(self.entries, now, self._addresses, strict=True) if a != b)
            raise RuntimeError(
                f"Plan: the memory of {name!r} moved since the plan was made (model.to(...), or a new .data?). "
                "Make the Plan after the model is where it stays."
            )


def _entries(source) -> list[Entry]:
    if isinstance(source, torch.nn.Module):
        items: Iterable = source.named_parameters()
    elif isinstance(source, Iterable) and not isinstance(source, (torch.Tensor, str, dict)):
        items = source
    else:
        hint = " (pass .items())" if isinstance(source, dict) else ""
        raise TypeError(
            f"Plan: expected an nn.Module or an iterable of (name, tensor) pairs, got {type(source).__name__}{hint}"
        )
    entries = []
    for item in items:
        if not isinstance(item, tuple) or len(item) not in (2, 3):
            raise TypeError(f"Plan: expected (name, tensor) or (name, tensor, Slice), got {item!r:.80}")
        name, tensor = item[:2]
        if not isinstance(name, str) or not name:
            raise TypeError(f"Plan: a tensor's name must be a non-empty str, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"Plan: {name!r} must be a torch.Tensor, got {type(tensor).__name__}")
        window = item[2] if len(item) == 3 else None
        entries.append(Entry(name, tensor, _check_window(name, tensor, window)))
    return entries


def _check_window(name: str, tensor: torch.Tensor, window: Slice | None) -> Slice:
    if window is None:
        return Slice(tuple(tensor.shape), (0,) * tensor.dim())
    if not isinstance(window, Slice):
        raise TypeError(f"Plan: the third item of {name!r} must be an esfast.Slice, got {type(window).__name__}")
    if not all(isinstance(x, Iterable) for x in (window.shape, window.offset)):
        raise TypeError(
            f"Plan: the Slice of {name!r} needs one number a dimension, "
            f"got shape {window.shape!r} and offset {window.offset!r}"
        )
    shape = tuple(check_int(f"Slice.shape of {name!r}", n, 0, 2**63) for n in window.shape)
    offset = tuple(check_int(f"Slice.offset of {name!r}", n, 0, 2**63) for n in window.offset)
    if not len(shape) == len(offset) == tensor.dim():
        raise ValueError(
            f"Plan: {name!r} has {tensor.dim()} dimensions, but its Slice has shape {shape} and offset {offset}"
        )
    for d, (size, start, whole) in enumerate(zip(tensor.shape, offset, shape, strict=True)):
        if start + size > whole:
            raise ValueError(
                f"Plan: {name!r} reaches outside its whole in dimension {d}: offset {start} + size {size} > {whole}"
            )
    if math.prod(shape) > MAX_NUMEL:
        raise ValueError(f"Plan: the whole of {name!r}, {shape}, has more than 2**62 elements, too many to number")
    return Slice(shape, offset)


def _select(entries: list[Entry], include, exclude) -> list[Entry]:
    names = [e.name for e in entries]

    def matching(what: str, patterns) -> set[str]:
        found: set[str] = set()
        globs = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
        if not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"Plan: {what}: expected a glob pattern or a list of them, got {patterns!r:.80}")
        for pattern in globs:
            hits = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
            if not hits:
                close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
                example = f"; a name here is {(close or names)[0]!r}" if names else ""
                raise ValueError(f"Plan: the {what} pattern {pattern!r} matches no tensor{example}")
            found |= hits
        return found

    kept = matching("include", include) if include is not None else set(names)
    kept -= matching("exclude", exclude) if exclude is not None else set()
    selected = [e for e in entries if e.name in kept]
    if not selected:
        raise ValueError(
            "Plan: no tensors selected" + (" (include and exclude leave nothing)" if names else ": the source has none")
        )
    return selected


def _check_tensor(entry: Entry) -> None:
    name, tensor = entry.name, entry.tensor
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"Plan: {name!r} is a {type(tensor).__name__}, which wraps other tensors; "
            "pass the tensors inside it, with a Slice where they are shards, or exclude it"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"Plan: {name!r} has layout {tensor.layout}; only dense (strided) tensors can be perturbed")
    if tensor.is_meta:
        raise ValueError(f"Plan: {name!r} is on the meta device and has no memory; load the weights first")
    if tensor.dtype not in DTYPES:
        why = "arithmetic is in float32" if tensor.dtype is torch.float64 else "only float weights can be perturbed"
        raise TypeError(
            f"Plan: {name!r} is {tensor.dtype}, expected float32, bfloat16 or float16 ({why}); "
            "convert it, or leave it out with exclude="
        )
    if tensor.is_neg():
        raise TypeError(f"Plan: {name!r} is a view whose sign is only turned on reading; pass .resolve_neg() of it")
    if tensor.numel() == 0:
        raise ValueError(
            f"Plan: {name!r} has no elements (shape {tuple(tensor.shape)}); if its values were repacked elsewhere "
            "they would be missed. Leave it out with exclude= if that is meant"
        )


def _merge_tied(entries: list[Entry]) -> list[Entry]:
    """Tied weights once, under their first name."""
    first: dict[tuple, Entry] = {}
    for e in entries:
        t = e.tensor
        first.setdefault((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype), e)
    return list(first.values())


def _check_names(entries: list[Entry]) -> None:
    by_name: dict[str, list[Entry]] = {}
    by_id: dict[int, str] = {}
    for e in entries:
        other = by_id.setdefault(tensor_id(e.name), e.name)
        if other != e.name:
            raise ValueError(
                f"Plan: the names {other!r} and {e.name!r} have the same 32-bit id {tensor_id(e.name):08x}, "
                "so they would get the same noise; rename one"
            )
        for twin in by_name.setdefault(e.name, []):
            if twin.window.shape != e.window.shape or _windows_meet(twin, e):
                raise ValueError(
                    f"Plan: the name {e.name!r} is given twice, for {_describe(twin)} and {_describe(e)}; "
                    "only disjoint slices of one whole may share a name"
                )
        by_name[e.name].append(e)


def _windows_meet(a: Entry, b: Entry) -> bool:
    return all(
        x < y + m and y < x + n
        for x, y, n, m in zip(a.window.offset, b.window.offset, a.tensor.shape, b.tensor.shape, strict=True)
    )


def _describe(e: Entry) -> str:
    window = f" at {e.window.offset} of {e.window.shape}" if tuple(e.tensor.shape) != e.window.shape else ""
    return f"{e.name!r} {tuple(e.tensor.shape)} {str(e.tensor.dtype).removeprefix('torch.')}{window}"


def _table(dst: list[Entry], src: list[Entry]) -> np.ndarray:
    rows = [row for d, s in zip(dst, src, strict=True) for row in _segments(d, s)]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(FIELDS))


def _segments(dst: Entry, src: Entry) -> list[tuple[int, ...]]:
    """The tensor as matrices whose rows are contiguous in both memories and in the numbering of the whole.

    Each dimension is (size, stride in dst, stride in src, stride in the numbering). A dimension that continues the
    next one in all three is merged with it; what is left beyond a matrix is enumerated.
    """
    shape, window, size = dst.tensor.shape, dst.window, dst.tensor.element_size()
    numbering = [math.prod(window.shape[d + 1 :]) for d in range(len(shape))]
    first = sum(o * n for o, n in zip(window.offset, numbering, strict=True))
    dims: list[tuple[int, int, int, int]] = []
    for n, *strides in reversed(list(zip(shape, dst.tensor.stride(), src.tensor.stride(), numbering, strict=True))):
        if n == 1:
            continue
        if dims and all(s == dims[0][0] * t for s, t in zip(strides, dims[0][1:], strict=True)):
            dims[0] = (n * dims[0][0], *dims[0][1:])
        else:
            dims.insert(0, (n, *strides))
    if not dims or dims[-1][1:] != (1, 1, 1):
        dims.append((1, 1, 1, 1))  # a column: rows of one element
    if len(dims) == 1:
        dims.insert(0, (1, 0, 0, 0))
    *outer, (rows, dst_stride, src_stride, index_stride), (cols, *_) = dims
    if math.prod(d[0] for d in outer) > MAX_SEGMENTS_PER_TENSOR:
        raise ValueError(
            f"Plan: {dst.name!r} with strides {dst.tensor.stride()} is scattered over more than "
            f"{MAX_SEGMENTS_PER_TENSOR} matrices; make it .contiguous()"
        )
    segments = []
    for place in np.ndindex(*(d[0] for d in outer)):
        d, s, i = (int(sum(p * dim[k] for p, dim in zip(place, outer, strict=True))) for k in (1, 2, 3))
        segments.append(
            (dst.tensor.data_ptr() + d * size, src.tensor.data_ptr() + s * size, rows, cols, dst_stride, src_stride,
             index_stride, first + i, tensor_id(dst.name), DTYPES[dst.tensor.dtype])
        )  # fmt: skip
    return segments


def _check_overlap(entries: list[Entry], table: np.ndarray) -> None:
    """No byte may belong to two tensors, or twice to one: it would be perturbed twice."""
    owner = np.repeat(np.arange(len(entries)), [len(_segments(e, e)) for e in entries])
    size = np.array([e.tensor.element_size() for e in entries])[owner]
    start, rows, stride = table[:, 0], table[:, 2], table[:, 4] * size
    length = table[:, 3] * size
    end = start + (rows - 1) * stride + length
    order = np.argsort(start, kind="stable")
    clear = start[order][1:] >= np.maximum.accumulate(end[order])[:-1]
    suspect = np.zeros(len(order), dtype=bool)  # extents that meet; their rows may still be disjoint, as columns are
    suspect[order[1:][~clear]] = True
    suspect[order[:-1][~clear]] = True
    suspect |= (rows > 1) & (stride < length)
    if not suspect.any():
        return
    # an extent that meets an earlier one may meet it across others: take all that lie under any suspect's extent
    low, high = start[suspect].min(), end[suspect].max()
    suspect |= (start < high) & (end > low)
    starts = np.concatenate([start[i] + stride[i] * np.arange(rows[i]) for i in np.flatnonzero(suspect)])
    ends = starts + np.repeat(length[suspect], rows[suspect])
    who = np.repeat(owner[suspect], rows[suspect])
    order = np.argsort(starts, kind="stable")
    starts, ends, who = starts[order], ends[order], who[order]
    reach = np.maximum.accumulate(ends)
    bad = np.flatnonzero(starts[1:] < reach[:-1])
    if len(bad):
        a, b = entries[who[bad[0]]], entries[who[bad[0] + 1]]
        where = f"{_describe(a)} overlaps itself" if a is b else f"{_describe(a)} and {_describe(b)} overlap"
        raise ValueError(
            f"Plan: {where} in memory, so some weights would be perturbed twice; pass each weight once "
            "(tied weights of equal shape and strides are recognised)"
        )
