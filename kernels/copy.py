"""dst = src over all tensors of a plan, bit by bit, in one launch: what restores a model from its base."""

import triton
import triton.language as tl

from .memory import load, store


@triton.jit
def _copy(dst, src, begin, end, WHOLE: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr):
    element = tl.arange(0, TILE)
    inside = (element >= begin) & (element < end)
    store(dst, element, inside, WHOLE, TYPE, load(src, element, inside, WHOLE, TYPE))


@triton.jit
def copy_tiles_kernel(
    tiles,  # int64 [tiles, 4], as add_noise_kernel's
    SIZE: tl.constexpr,  # bytes of a weight, 2 or 4
    TILE: tl.constexpr,
):
    record = tiles + tl.program_id(0).to(tl.int64) * 4
    dst, src, span = tl.load(record), tl.load(record + 1), tl.load(record + 3).to(tl.int32)
    begin, end, whole = span & 0x7FFF, (span >> 15) & 0xFFFF, span < 0
    TYPE: tl.constexpr = tl.int32 if SIZE == 4 else tl.int16
    if whole:
        _copy(dst, src, begin, end, True, TYPE, TILE)
    else:
        _copy(dst, src, begin, end, False, TYPE, TILE)
