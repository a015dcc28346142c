"""dst = round(src + sum_j coeff_j noise(seed_j)) over all tensors of a plan, in one launch per dtype.

Work is cut into tiles at multiples of TILE of the element's number in its whole tensor (csrc/cpu.h) and moved in quads:
four consecutive elements, which are one Gaussian block. A thread holds whole quads, so nothing passes through shared
memory; where a tile is whole and aligned, every access is 128 bits wide.
"""

import os

import triton
import triton.language as tl

from .noise import GAUSSIAN, RADEMACHER, add_signed, as_bits, as_float, gaussian_pair, philox

# 32 weights a thread: fewer leave key schedules and addresses unamortised, more spill.
TILE = 4096
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLOAT32: tl.constexpr = tl.constexpr(0)  # dtypes, as in csrc/dtypes.h
BFLOAT16: tl.constexpr = tl.constexpr(1)


def pack_span(tensor_id, begin, end, whole):
    """int64 of a tile: elements [begin, end) of it are there; `whole`: all are, and dst and src are multiples of 16."""
    return tensor_id << 32 | whole << 26 | end << 13 | begin


@triton.jit
def _from16(x, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        return as_float(x.to(tl.uint32) << 16)
    else:
        return x.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _to16(x, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        if INTERPRETED:  # the interpreter's own conversion (3.9) rounds a half away from zero and loses the carry
            bits = as_bits(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
        else:
            return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def _load4(address, quad, begin, end, whole, DTYPE: tl.constexpr):
    """Elements 4 quad .. 4 quad + 3 behind `address` as four float32 tensors; 0 outside [begin, end)."""
    if DTYPE == FLOAT32:
        place = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
        if whole:
            aligned = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
            x = tl.load(aligned + place)
        else:
            x = tl.load(
                address.to(tl.pointer_type(tl.float32)) + place, mask=(place >= begin) & (place < end), other=0.0
            )
        even, odd = tl.split(tl.reshape(x, (quad.shape[0], 2, 2)))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
    else:
        if whole:
            v = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16) + quad)
        else:
            p = address.to(tl.pointer_type(tl.uint16)) + quad * 4
            e = quad * 4
            v = tl.load(p, mask=(e >= begin) & (e < end), other=0).to(tl.uint64)
            v |= tl.load(p + 1, mask=(e + 1 >= begin) & (e + 1 < end), other=0).to(tl.uint64) << 16
            v |= tl.load(p + 2, mask=(e + 2 >= begin) & (e + 2 < end), other=0).to(tl.uint64) << 32
            v |= tl.load(p + 3, mask=(e + 3 >= begin) & (e + 3 < end), other=0).to(tl.uint64) << 48
        low, high = v.to(tl.uint32), (v >> 32).to(tl.uint32)
        a0, a1 = _from16(low & 0xFFFF, DTYPE), _from16(low >> 16, DTYPE)
        a2, a3 = _from16(high & 0xFFFF, DTYPE), _from16(high >> 16, DTYPE)
    return a0, a1, a2, a3


@triton.jit
def _store4(address, quad, begin, end, whole, a, DTYPE: tl.constexpr):
    """Rounds four float32 tensors to the dtype and stores them where _load4 would read them."""
    if DTYPE == FLOAT32:
        place = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
        x = tl.reshape(tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3])), (quad.shape[0], 4))
        if whole:
            tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + place, x)
        else:
            tl.store(address.to(tl.pointer_type(tl.float32)) + place, x, mask=(place >= begin) & (place < end))
    else:
        h0, h1, h2, h3 = _to16(a[0], DTYPE), _to16(a[1], DTYPE), _to16(a[2], DTYPE), _to16(a[3], DTYPE)
        if whole:
            low = h0.to(tl.uint32) | (h1.to(tl.uint32) << 16)
            high = h2.to(tl.uint32) | (h3.to(tl.uint32) << 16)
            v = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
            tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16) + quad, v)
        else:
            p = address.to(tl.pointer_type(tl.uint16)) + quad * 4
            e = quad * 4
            tl.store(p, h0, mask=(e >= begin) & (e < end))
            tl.store(p + 1, h1, mask=(e + 1 >= begin) & (e + 1 < end))
            tl.store(p + 2, h2, mask=(e + 2 >= begin) & (e + 2 < end))
            tl.store(p + 3, h3, mask=(e + 3 >= begin) & (e + 3 < end))


@triton.jit
def _bound_to(index, a):
    """`index`, computed in the register layout of `a`.

    The zero added depends on a loaded value, which keeps the noise in the layout of the wide loads; Triton would
    otherwise compute it in its default layout and carry every number through shared memory. LLVM removes the zero.
    """
    return index.to(tl.uint32) + ((as_bits(a) & 1) >> 1)


@triton.jit
def _gaussian4(a, coeff, k0, k1, low, high, tensor_id):
    x0, x1, x2, x3 = philox(k0, k1, low, high, tensor_id, tl.zeros_like(low) + GAUSSIAN)
    z0, z1 = gaussian_pair(x0, x1)
    z2, z3 = gaussian_pair(x2, x3)
    return (tl.fma(coeff, z0, a[0]), tl.fma(coeff, z1, a[1]), tl.fma(coeff, z2, a[2]), tl.fma(coeff, z3, a[3]))


@triton.jit
def _rademacher4(a, coeff, word):
    return (
        add_signed(a[0], coeff, word, 0),
        add_signed(a[1], coeff, word, 1),
        add_signed(a[2], coeff, word, 2),
        add_signed(a[3], coeff, word, 3),
    )


@triton.jit
def add_noise_kernel(
    tiles,  # int64 [tiles, 4]: dst, src, number of the tile's first element, pack_span(...)
    seeds,  # int64 [members]: the bits of the 64-bit seeds
    coeffs,  # float32 [members]
    members,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    # A record per tile, 32 bytes for 8 or 16 KiB of weights: deriving it from the segment table took 70 instructions
    # and two more dependent loads, 2 of the 31 issue slots that a weight has.
    record = tiles + tl.program_id(0).to(tl.int64) * 4
    dst, src, start, span = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    low_span = span.to(tl.int32)
    begin, end, whole = low_span & 0x1FFF, (low_span >> 13) & 0x1FFF, (low_span >> 26) != 0
    tensor = (span >> 32).to(tl.uint32)

    if KIND == GAUSSIAN:
        quad = tl.arange(0, TILE // 4)
        a = _load4(src, quad, begin, end, whole, DTYPE)
        block = start >> 2
        low = _bound_to(quad, a[0]) + block.to(tl.uint32)  # tiles are aligned: no carry within one
        high = tl.zeros_like(low) + (block >> 32).to(tl.uint32)
        tensor_id = tl.zeros_like(low) + tensor
        for j in range(members):
            seed, coeff = tl.load(seeds + j), tl.load(coeffs + j)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
            a = _gaussian4(a, coeff, k0, k1, low, high, tensor_id)
        _store4(dst, quad, begin, end, whole, a, DTYPE)
    else:
        # A thread holds the same quad of each of the block's four words: all of its signs come from one Philox call.
        i = tl.arange(0, TILE // 16)
        quad = (i // 8) * 32 + i % 8
        a = _load4(src, quad, begin, end, whole, DTYPE)
        b = _load4(src, quad + 8, begin, end, whole, DTYPE)
        c = _load4(src, quad + 16, begin, end, whole, DTYPE)
        d = _load4(src, quad + 24, begin, end, whole, DTYPE)
        bound = _bound_to(i, a[0])
        block = start >> 7
        low = bound // 8 + block.to(tl.uint32)
        high = tl.zeros_like(low) + (block >> 32).to(tl.uint32)
        tensor_id = tl.zeros_like(low) + tensor
        domain = tl.zeros_like(low) + RADEMACHER
        shift = bound % 8 * 4
        for j in range(members):
            seed, coeff = tl.load(seeds + j), tl.load(coeffs + j)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
            x0, x1, x2, x3 = philox(k0, k1, low, high, tensor_id, domain)
            a = _rademacher4(a, coeff, x0 >> shift)
            b = _rademacher4(b, coeff, x1 >> shift)
            c = _rademacher4(c, coeff, x2 >> shift)
            d = _rademacher4(d, coeff, x3 >> shift)
        _store4(dst, quad, begin, end, whole, a, DTYPE)
        _store4(dst, quad + 8, begin, end, whole, b, DTYPE)
        _store4(dst, quad + 16, begin, end, whole, c, DTYPE)
        _store4(dst, quad + 24, begin, end, whole, d, DTYPE)
