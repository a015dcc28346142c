"""Tensors as kernels see them: a table of matrices with their addresses, strides and element numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.errors import BadValue
from .noise import MAX_RANK, factor_names, matrices_of, tensor_id

# The formats of csrc/dtypes.h. SPLIT is a float32 held as a bfloat16 tensor and, in the plan's flat buffer, the 16 bits
# that this leaves out.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT32, BFLOAT16, FLOAT16, SPLIT = range(4)
# Columns of the segment table, the fields of csrc/cpu.h's Segment.
FIELDS = (
    "dst",
    "src",
    "anchor",
    "rows",
    "cols",
    "dst_stride",
    "src_stride",
    "anchor_stride",
    "index_stride",
    "first",
    "flat",
    "tensor_id",
    "src_format",
    "dst_format",
    "flat_stride",
    "a_id",
    "b_id",
    "a_first",
    "b_first",
    "a_step",
    "b_step",
)
MAX_SEGMENTS_PER_TENSOR = 65536


@dataclass(frozen=True)
class Slice:
    """Says that a tensor is a part of a larger one: `tensor = whole[offset[0] : offset[0] + tensor.shape[0], ...]`.

    The tensor gets the noise that its elements have in the whole. So shards of a matrix, and the parts of a fused
    matrix, are perturbed exactly as the matrix that they come from.

    Args:
        shape: shape of the whole tensor.
        offset: index of the tensor's first element in the whole, one number a dimension.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a plan: `tensor` holds the elements `window` of the whole tensor called `name`.

    With `split` it holds the upper halves of float32 weights, and the plan's flat buffer the lower ones. `flat` is
    where it begins in the plan's flat buffers (low halves, moments).
    """

    name: str
    tensor: torch.Tensor
    window: Slice
    split: bool = False
    flat: int = 0

    @property
    def format(self) -> int:
        return SPLIT if self.split else FORMATS[self.tensor.dtype]

    def same_place(self, other: Entry) -> bool:
        return (self.name, self.window, self.tensor.shape, self.tensor.device) == (
            other.name,
            other.window,
            other.tensor.shape,
            other.tensor.device,
        )


def describe(e: Entry, whole: bool = False) -> str:
    """Name, shape, dtype and place of a tensor in words; with `whole`, those of the tensor that it is a part of."""
    shape = e.window.shape if whole else tuple(e.tensor.shape)
    window = f" at {e.window.offset} of {e.window.shape}" if shape != e.window.shape else ""
    return f"{e.name!r} {shape} {str(e.tensor.dtype).removeprefix('torch.')}{' split' * e.split}{window}"


class Table:
    """The segments of one pass over the weights, as csrc/cpu.h reads them.

    Attributes: `rows` (int64 array (segments, len(FIELDS))); `ends`, for each tensor the number of the segment behind
    its last; `device` is for what a backend makes of them there.

    With `matrices` they are cut for low-rank noise: each segment is a block of one matrix, or a piece of a vector. In a
    block, the noise of element (r, c) has factor q of its row at number a_first + q * a_step + r of the gaussian noise
    of tensor a_id, and that of its column at b_first + q * b_step + c of b_id. Of a vector these six are 0. Otherwise
    matrices whose rows follow one another are one long row, and the six are 0.
    """

    def __init__(self, dst: list[Entry], src: list[Entry], anchor: list[Entry] | None = None, matrices: bool = False):
        found = [_segments(*each, matrices) for each in zip(dst, src, anchor or [None] * len(dst), strict=True)]
        rows = list(itertools.chain.from_iterable(found))
        self.rows = np.array(rows, dtype=np.int64).reshape(len(rows), len(FIELDS))
        self.ends = np.cumsum(list(map(len, found)), dtype=np.int64)
        self.device: dict = {}

    def column(self, name: str) -> np.ndarray:
        return self.rows[:, FIELDS.index(name)]


def lay_out(entries: list[Entry]) -> tuple[list[Entry], int]:
    """Gives each tensor its place in the flat buffers; returns the entries and the buffers' length.

    Tensors begin at multiples of 16 elements, so that a GPU reads the buffers 128 bits at once.
    """
    ends = list(itertools.accumulate((e.tensor.numel() + 15) // 16 * 16 for e in entries))
    starts = [0, *ends[:-1]]
    return [dataclasses.replace(e, flat=start) for e, start in zip(entries, starts, strict=True)], ends[-1]


def _segments(dst: Entry, src: Entry, anchor: Entry | None, matrices: bool = False) -> list[tuple[int, ...]]:
    """Divides a tensor into matrices whose rows are contiguous in every memory and in the numbering of the whole
    tensor.

    A dimension is held as (size, strides). Its strides are those in dst, in src, in the anchor, in the numbering, in
    the flat buffers, and in factors A and B of low-rank noise; a stride that does not matter is 0. Neighbouring
    dimensions are merged if one continues the other in all of these. The last dimension becomes the columns, if it is
    contiguous. Of the others, the last one along which B stays the same becomes the rows. The rest is enumerated: one
    matrix for each index into the remaining dimensions.
    """
    shape, window, tensors = dst.tensor.shape, dst.window, [e.tensor for e in (dst, src, anchor or dst)]
    numbering, flat = _row_major(window.shape), _row_major(shape)
    factors = matrices_of(window.shape) if matrices else None
    a, b = _factor_strides(window.shape) if factors else ((0,) * len(shape), (0,) * len(shape))
    first, a_first, b_first = (sum(map(operator.mul, window.offset, strides)) for strides in (numbering, a, b))
    dims: list[tuple[int, ...]] = []
    for n, *strides in reversed(list(zip(shape, *(t.stride() for t in tensors), numbering, flat, a, b, strict=True))):
        if n == 1:
            continue
        if dims and all(s == dims[0][0] * t for s, t in zip(strides, dims[0][1:], strict=True)):
            dims[0] = (n * dims[0][0], *dims[0][1:])
        else:
            dims.insert(0, (n, *strides))
    cols, rows = 1, 1
    row_strides: Sequence[int] = (0,) * 7
    if dims and dims[-1][1:7] == (1, 1, 1, 1, 1, 0):
        cols = dims.pop()[0]
    # If no dimension is contiguous, each row has one element.
    if along := [d for d, dim in enumerate(dims) if dim[7] == 0]:
        rows, *row_strides = dims.pop(along[-1])
    if math.prod(d[0] for d in dims) > MAX_SEGMENTS_PER_TENSOR:
        raise BadValue(
            f"Plan: {dst.name!r} with strides {dst.tensor.stride()} is scattered over more than "
            f"{MAX_SEGMENTS_PER_TENSOR} matrices; make it .contiguous()"
        )
    ids: tuple[int, ...] = (0, 0)
    steps = (0, 0)
    if factors:
        ids = tuple(map(tensor_id, factor_names(dst.name)))
        steps = factors[0] * factors[1], factors[0] * factors[2]
    segments = []
    for place in np.ndindex(*(d[0] for d in dims)):
        *offsets, index, at_flat, at_a, at_b = (
            int(sum(p * dim[k] for p, dim in zip(place, dims, strict=True))) for k in range(1, 8)
        )
        at = [t.data_ptr() + o * t.element_size() for t, o in zip(tensors, offsets, strict=True)]
        segments.append(
            (
                *at[:2],
                at[2] if anchor else 0,
                rows,
                cols,
                *row_strides[:4],
                first + index,
                dst.flat + at_flat,
                tensor_id(dst.name),
                src.format,
                dst.format,
                row_strides[4],
                *ids,
                a_first + at_a,
                b_first + at_b,
                *steps,
            )
        )
    return segments


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _factor_strides(whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of the element numbers of factors A and B along each dimension of a whole tensor, for low-rank noise.
    ValueError if the numbers don't fit 64 bits."""
    matrices, rows, cols = matrices_of(whole)
    if matrices * max(rows, cols) * MAX_RANK > 2**62:
        raise BadValue(f"Plan: a whole of {whole} has factors of more than 2**62 numbers, too many for low-rank noise")
    if len(whole) == 3:
        return (rows, 1, 0), (cols, 0, 1)
    return (1, *(0,) * (len(whole) - 1)), (0, *_row_major(whole[1:]))


def check_overlap(entries: list[Entry], *tables: Table) -> None:
    """ValueError if a byte belongs to two tensors, or twice to one: it would be perturbed twice."""
    if not entries:
        return
    owner = np.repeat(np.arange(len(entries)), [len(_segments(e, e, None)) for e in entries])
    size = np.array([e.tensor.element_size() for e in entries])[owner]
    start, rows, cols, stride = (
        np.concatenate([t.column(name) for t in tables]) for name in ("dst", "rows", "cols", "dst_stride")
    )
    stride, length = stride * size, cols * size
    end = start + (rows - 1) * stride + length
    order = np.argsort(start, kind="stable")
    clear = start[order][1:] >= np.maximum.accumulate(end[order])[:-1]
    # Tensors whose extents overlap. Their rows may still be disjoint, as those of column slices are.
    suspect = np.zeros(len(order), dtype=bool)
    suspect[order[1:][~clear]] = True
    suspect[order[:-1][~clear]] = True
    suspect |= (rows > 1) & (stride < length)
    if not suspect.any():
        return
    # The suspects so far may overlap with tensors in between: add all whose extents meet that of any suspect.
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
        where = f"{describe(a)} overlaps itself" if a is b else f"{describe(a)} and {describe(b)} overlap"
        raise BadValue(
            f"Plan: {where} in memory, so some weights would be perturbed twice; pass each weight once "
            "(tied weights of equal shape and strides are recognised)"
        )
