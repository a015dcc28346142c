"""dst = round(src + sum_j coeff_j noise(seed_j)) over all tensors of a plan, in one launch per dtype.

Work is cut into tiles at multiples of TILE of the element's number in its whole tensor, as csrc/cpu.h does. Weights are
loaded in their own order, so that accesses are 128 bits wide and conversions go in pairs, and then split into four
tensors by their number mod 4: the four of one Gaussian block lie at one place of four tensors, in one thread, and
nothing passes through shared memory.
"""

import os

import triton
import triton.language as tl

from .noise import GAUSSIAN, RADEMACHER, add_signed, as_bits, as_float, gaussian_pair, philox

# 32 weights a thread: fewer leave key schedules and addresses unamortised, more spill.
TILE = 4096
NUM_WARPS = 4
# Left alone, ptxas takes 128 registers and spills 8 bytes, or up to 164; from 129 to 168 three blocks fit an SM.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 144, "enable_fp_fusion": False}

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLOAT32: tl.constexpr = tl.constexpr(0)  # dtypes, as in csrc/dtypes.h
BFLOAT16: tl.constexpr = tl.constexpr(1)


def pack_span(tensor_id, begin, end, whole):
    """int64 of a tile of at most 2^15 elements: [begin, end) of it are there; `whole`: all are, and dst and src are
    multiples of 16."""
    return tensor_id << 32 | whole << 31 | end << 15 | begin


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
def _load4(address, element, begin, end, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """The elements behind `address`, 0 outside [begin, end), as four float32 tensors: number 0, 1, 2, 3 mod 4."""
    p = _pointers(address, element, WHOLE, DTYPE)
    if WHOLE:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=(element >= begin) & (element < end), other=0.0)
    if DTYPE == BFLOAT16:  # by bits, as the interpreter's conversion (3.9) is wrong for subnormals
        x = as_float(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (element.shape[0] // 4, 2, 2)))
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    return a0, a1, a2, a3


@triton.jit
def _store4(address, element, begin, end, WHOLE: tl.constexpr, a, DTYPE: tl.constexpr):
    """Rounds four float32 tensors to the dtype and stores them where _load4 would read them."""
    p = _pointers(address, element, WHOLE, DTYPE)
    x = tl.reshape(tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3])), (element.shape[0],))
    if DTYPE == BFLOAT16 and INTERPRETED:
        # the interpreter's own conversion (3.9) rounds a half away from zero and loses the carry
        bits = as_bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        y = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(p.dtype.element_ty)
    if WHOLE:
        tl.store(p, y)
    else:
        tl.store(p, y, mask=(element >= begin) & (element < end))


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
def _tile(
    dst, src, start, tensor, begin, end, seeds, coeffs, members,
    WHOLE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile. WHOLE: every element is there and both addresses are multiples of 16."""
    if KIND == GAUSSIAN:
        element = tl.arange(0, TILE)
        a = _load4(src, element, begin, end, WHOLE, DTYPE)
        block = start >> 2
        low = _bound_to(tl.arange(0, TILE // 4), a[0]) + block.to(tl.uint32)  # tiles are aligned: no carry within one
        high = tl.zeros_like(low) + (block >> 32).to(tl.uint32)
        tensor_id = tl.zeros_like(low) + tensor
        for j in range(members):
            seed, coeff = tl.load(seeds + j), tl.load(coeffs + j)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
            a = _gaussian4(a, coeff, k0, k1, low, high, tensor_id)
        _store4(dst, element, begin, end, WHOLE, a, DTYPE)
    else:
        # A thread holds the same quad of each of the block's four words: all of its signs come from one Philox call.
        i = tl.arange(0, TILE // 4)
        element = (i // 32) * 128 + i % 32
        a = _load4(src, element, begin, end, WHOLE, DTYPE)
        b = _load4(src, element + 32, begin, end, WHOLE, DTYPE)
        c = _load4(src, element + 64, begin, end, WHOLE, DTYPE)
        d = _load4(src, element + 96, begin, end, WHOLE, DTYPE)
        bound = _bound_to(tl.arange(0, TILE // 16), a[0])
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
        _store4(dst, element, begin, end, WHOLE, a, DTYPE)
        _store4(dst, element + 32, begin, end, WHOLE, b, DTYPE)
        _store4(dst, element + 64, begin, end, WHOLE, c, DTYPE)
        _store4(dst, element + 96, begin, end, WHOLE, d, DTYPE)


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
    begin, end, whole = low_span & 0x7FFF, (low_span >> 15) & 0xFFFF, low_span < 0
    tensor = (span >> 32).to(tl.uint32)
    # Two copies of the code: values that could come from either of two loads cost 40 moves and address selections.
    if whole:
        _tile(dst, src, start, tensor, begin, end, seeds, coeffs, members, True, KIND, DTYPE, TILE)
    else:
        _tile(dst, src, start, tensor, begin, end, seeds, coeffs, members, False, KIND, DTYPE, TILE)
