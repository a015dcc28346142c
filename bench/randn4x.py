"""A rival: one fused launch over all tensors, like ours, but with Triton's own generator, tl.randn4x and tl.randint4x.

It is as good as one can write it with these. Each of the four numbers of a Philox call goes to another quarter of the
tile, so nothing is shuffled and accesses are wide; one call of tl.randint4x gives 32 signs. The noise depends on the
tiles of the launch, so no other backend can repeat it.
"""

import os

import numpy as np
import torch
import triton
import triton.language as tl

from ..core import segments
from ..core.backends.tiles import members_on, tiles_of
from ..core.kinds import DOMAINS
from ..core.plan import Plan

FLOAT32, BFLOAT16 = tl.constexpr(segments.FLOAT32), tl.constexpr(segments.BFLOAT16)
GAUSSIAN = tl.constexpr(DOMAINS["gaussian"])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDS = tl.constexpr(7)  # of Philox, as many as ours and fewer than Triton's default of 10
TILE = 4096
# Either may be faster: wider accesses and fewer instructions, or more warps at a time. Both are measured.
OPTIONS = {
    "4 warps": {"num_warps": 4, "maxnreg": 144, "enable_fp_fusion": True},
    "8 warps": {"num_warps": 8, "enable_fp_fusion": True},
}
if INTERPRETED:
    OPTIONS = {"interpreted": {}}


@triton.jit
def _pointers(address, element, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == FLOAT32:
        p = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == BFLOAT16:
        p = address.to(tl.pointer_type(tl.bfloat16))
    else:
        p = address.to(tl.pointer_type(tl.float16))
    if WHOLE:
        p = tl.multiple_of(p, 16)
    return p + element


@triton.jit
def _load(address, element, begin, end, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    p = _pointers(address, element, WHOLE, DTYPE)
    if WHOLE:
        return tl.load(p).to(tl.float32)
    return tl.load(p, mask=(element >= begin) & (element < end), other=0.0).to(tl.float32)


@triton.jit
def _store(address, element, begin, end, WHOLE: tl.constexpr, x, DTYPE: tl.constexpr):
    p = _pointers(address, element, WHOLE, DTYPE)
    if WHOLE:
        tl.store(p, x.to(p.dtype.element_ty))
    else:
        tl.store(p, x.to(p.dtype.element_ty), mask=(element >= begin) & (element < end))


@triton.jit
def _signed(coeff, word, bit):
    """coeff, or -coeff where the bit of the word is set."""
    sign = (word.to(tl.uint32, bitcast=True) << (31 - bit)) & 0x80000000
    return (coeff.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _tile(
    dst,
    src,
    number,
    begin,
    end,
    seeds,
    coeffs,
    members,
    WHOLE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    QUARTER: tl.constexpr = TILE // 4
    if KIND == GAUSSIAN:
        element = tl.arange(0, QUARTER)
        offset = number.to(tl.uint32) * QUARTER + element.to(tl.uint32)
    else:
        row, bit = tl.arange(0, QUARTER // 8)[:, None], tl.arange(0, 8)[None, :]
        element = row * 8 + bit
        offset = number.to(tl.uint32) * (QUARTER // 8) + row.to(tl.uint32)
    a = _load(src, element, begin, end, WHOLE, DTYPE)
    b = _load(src, element + QUARTER, begin, end, WHOLE, DTYPE)
    c = _load(src, element + 2 * QUARTER, begin, end, WHOLE, DTYPE)
    d = _load(src, element + 3 * QUARTER, begin, end, WHOLE, DTYPE)
    if KIND == GAUSSIAN:
        # Adding this zero keeps the noise in the layout of the loads, as in add_noise.py, so that nothing goes through
        # shared memory.
        offset += (a.to(tl.uint32, bitcast=True) & 1) >> 1
    for j in range(members):
        seed, coeff = tl.load(seeds + j), tl.load(coeffs + j)
        if KIND == GAUSSIAN:
            z0, z1, z2, z3 = tl.randn4x(seed, offset, ROUNDS)
            a += coeff * z0
            b += coeff * z1
            c += coeff * z2
            d += coeff * z3
        else:
            w0, w1, w2, w3 = tl.randint4x(seed, offset, ROUNDS)
            a += _signed(coeff, w0, bit)
            b += _signed(coeff, w1, bit)
            c += _signed(coeff, w2, bit)
            d += _signed(coeff, w3, bit)
    _store(dst, element, begin, end, WHOLE, a, DTYPE)
    _store(dst, element + QUARTER, begin, end, WHOLE, b, DTYPE)
    _store(dst, element + 2 * QUARTER, begin, end, WHOLE, c, DTYPE)
    _store(dst, element + 3 * QUARTER, begin, end, WHOLE, d, DTYPE)


@triton.jit
def randn4x_kernel(
    tiles,  # int64 [tiles, 4], as in esfast/core/backends/tiles.py
    seeds,  # int64 [members]
    coeffs,  # float32 [members]
    members,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0)
    record = tiles + number.to(tl.int64) * 4
    dst, src, span = tl.load(record), tl.load(record + 1), tl.load(record + 3).to(tl.int32)
    begin, end = span & 0x7FFF, (span >> 15) & 0xFFFF
    if span < 0:
        _tile(dst, src, number, begin, end, seeds, coeffs, members, True, KIND, DTYPE, TILE)
    else:
        _tile(dst, src, number, begin, end, seeds, coeffs, members, False, KIND, DTYPE, TILE)


class Randn4x:
    """plan = base + sum_j coeffs[j] * noise(seeds[j]), or in place, over the same tiles as our kernels."""

    def __init__(self, plan: Plan, base: Plan):
        self.plan, self.base = plan, base
        # A model's weights have one dtype, so there is one launch.
        self.tiles = {
            source: tiles_of(plan.table(source), TILE, plan.device, extras=False)[0] for source in (base, None)
        }

    def run(self, seeds: list[int], coeffs: list[float], from_base: bool, kind: str, options: dict) -> None:
        if not seeds:
            torch._foreach_copy_(self.plan.tensors, self.base.tensors)
            return
        arrays = np.array(seeds, dtype=np.uint64), np.array(coeffs, dtype=np.float32)
        keys, scales = members_on(self.plan.device, *arrays)
        tiles = self.tiles[self.base if from_base else None]
        randn4x_kernel[(len(tiles.records),)](
            tiles.records, keys, scales, len(seeds), KIND=DOMAINS[kind], DTYPE=tiles.dst_format, TILE=TILE, **options
        )
