"""dst = round(src + sum_j coeff_j noise(seed_j)) over all tensors of a plan, in one launch per pair of formats.

Work is cut into tiles at multiples of TILE of the element's number in its whole tensor, as csrc/cpu.h does. Weights are
loaded in their own order, so that accesses are 128 bits wide and conversions go in pairs, and then split into four
tensors by their number mod 4: the four of one Gaussian block lie at one place of four tensors, in one thread, and
nothing passes through shared memory.
"""

import os

import triton
import triton.language as tl

from .noise import GAUSSIAN, RADEMACHER, STOCHASTIC_ROUNDING, add_signed, as_bits, as_float, gaussian_pair, philox

# 32 weights a thread: fewer leave key schedules and addresses unamortised, more spill.
TILE = 4096
NUM_WARPS = 4
# Left alone, ptxas takes 128 registers and spills 8 bytes, or up to 164; from 129 to 168 three blocks fit an SM.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 144, "enable_fp_fusion": False}

# Adam keeps weights, gradient and both moments of a tile in registers: 16 weights a thread.
ADAM_TILE = 2048

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLOAT32: tl.constexpr = tl.constexpr(0)  # formats, as in csrc/dtypes.h
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)
SPLIT: tl.constexpr = tl.constexpr(3)


@triton.jit
def _pointers(address, element, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    p = address.to(tl.int64).to(tl.pointer_type(TYPE))
    if WHOLE:
        p = tl.multiple_of(p, 16)
    return p + element


@triton.jit
def _load(address, element, begin, end, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    """The elements behind `address`, 0 outside [begin, end)."""
    p = _pointers(address, element, WHOLE, TYPE)
    if WHOLE:
        return tl.load(p)
    else:
        return tl.load(p, mask=(element >= begin) & (element < end), other=0)


@triton.jit
def _store(address, element, begin, end, WHOLE: tl.constexpr, TYPE: tl.constexpr, x):
    p = _pointers(address, element, WHOLE, TYPE)
    if WHOLE:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=(element >= begin) & (element < end))


@triton.jit
def _apart(x):
    """Four tensors of a tile's elements: number 0, 1, 2, 3 mod 4."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 4, 2, 2)))
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    return a0, a1, a2, a3


@triton.jit
def _together(a):
    return tl.reshape(tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3])), (a[0].shape[0] * 4,))


@triton.jit
def _load4(address, low, element, begin, end, WHOLE: tl.constexpr, FORMAT: tl.constexpr):
    """Weights as four float32 tensors. `low`: address of the low halves of SPLIT."""
    if FORMAT == FLOAT32:
        x = _load(address, element, begin, end, WHOLE, tl.float32)
    elif FORMAT == FLOAT16:
        x = _load(address, element, begin, end, WHOLE, tl.float16).to(tl.float32)
    else:  # by bits, as the interpreter's conversion of bfloat16 (3.9) is wrong for subnormals
        bits = _load(address, element, begin, end, WHOLE, tl.uint16).to(tl.uint32) << 16
        if FORMAT == SPLIT:
            half = _load(low, element, begin, end, WHOLE, tl.int16)
            bits = bits + half.to(tl.int32).to(tl.uint32, bitcast=True)
        x = as_float(bits)
    return _apart(x)


@triton.jit
def _store4(
    address, low, element, begin, end, WHOLE: tl.constexpr, a, words, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Rounds four float32 tensors to the format and stores them where _load4 would read them. `words`: random ones."""
    x = _together(a)
    if FORMAT == FLOAT32:
        _store(address, element, begin, end, WHOLE, tl.float32, x)
    elif FORMAT == SPLIT:
        bits = as_bits(x)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        _store(address, element, begin, end, WHOLE, tl.uint16, ((bits + 0x8000) >> 16).to(tl.uint16))
        _store(low, element, begin, end, WHOLE, tl.uint16, bits.to(tl.uint16))
    elif FORMAT == BFLOAT16:
        if STOCHASTIC:
            bits = as_bits(x)
            rounded = (bits + (_together(words) >> 16)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            _store(address, element, begin, end, WHOLE, tl.uint16, rounded.to(tl.uint16))
        elif INTERPRETED:
            # the interpreter's own conversion (3.9) rounds a half away from zero and loses the carry
            bits = as_bits(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            _store(address, element, begin, end, WHOLE, tl.uint16, rounded.to(tl.uint16))
        else:
            _store(address, element, begin, end, WHOLE, tl.bfloat16, x.to(tl.bfloat16))
    elif STOCHASTIC:  # Float16::store in csrc/dtypes.h
        bits, random = as_bits(x), _together(words)
        magnitude = bits & 0x7FFFFFFF
        small = magnitude < 0x38800000
        normal = (magnitude + 0xC8000000 + (random >> 19)) >> 13
        units = (as_float(tl.where(small, magnitude, 0)) * 1099511627776.0).to(tl.int32).to(tl.uint32, bitcast=True)
        found = tl.where(small, (units + (random >> 16)) >> 16, normal)
        special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
        found = tl.where(magnitude >= 0x47800000, special, found) | ((bits >> 16) & 0x8000)
        _store(address, element, begin, end, WHOLE, tl.uint16, found.to(tl.uint16))
    else:
        _store(address, element, begin, end, WHOLE, tl.float16, x.to(tl.float16))


@triton.jit
def _decayed4(x, anchor, element, begin, end, decay, WHOLE: tl.constexpr, DST: tl.constexpr, DECAY: tl.constexpr):
    """x moved towards the anchor (DECAY 2) or zero (1) by the fraction `decay`."""
    if DECAY == 2:
        w = _load4(anchor, anchor, element, begin, end, WHOLE, BFLOAT16 if DST == SPLIT else DST)
    else:
        w = _zeros4(x)
    if DECAY == 0:
        return x
    else:
        return (
            tl.fma(tl.zeros_like(x[0]) + decay, w[0] - x[0], x[0]),
            tl.fma(tl.zeros_like(x[0]) + decay, w[1] - x[1], x[1]),
            tl.fma(tl.zeros_like(x[0]) + decay, w[2] - x[2], x[2]),
            tl.fma(tl.zeros_like(x[0]) + decay, w[3] - x[3], x[3]),
        )


@triton.jit
def _adam4(x, g, m_at, v_at, element, begin, end, numbers, WHOLE: tl.constexpr):
    """x after a step of Adam along g; the moments at the two addresses are changed. numbers: ops.Adam.numbers."""
    gradient, weights = _together(g), _together(x)
    zero = tl.zeros_like(weights)
    m = _load(m_at, element, begin, end, WHOLE, tl.float32)
    v = _load(v_at, element, begin, end, WHOLE, tl.float32)
    m = tl.fma(zero + numbers[0], gradient - m, m)
    v = tl.fma(zero + numbers[1], gradient * gradient - v, v)
    _store(m_at, element, begin, end, WHOLE, tl.float32, m)
    _store(v_at, element, begin, end, WHOLE, tl.float32, v)
    ratio = tl.div_rn(m, tl.sqrt_rn(v) + numbers[3])
    return _apart(tl.fma(zero + numbers[2], ratio, weights))


@triton.jit
def _bound_to(index, a):
    """`index`, computed in the register layout of `a`.

    The zero added depends on a loaded value, which keeps the noise in the layout of the wide loads; Triton would
    otherwise compute it in its default layout and carry every number through shared memory. LLVM removes the zero.
    """
    return index.to(tl.uint32) + ((as_bits(a) & 1) >> 1)


@triton.jit
def _rounding_words(seeds, low, high, tensor_id):
    """The words of quads of elements that stochastic rounding draws, under the first seed."""
    seed = tl.load(seeds)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return philox(k0, k1, low, high, tensor_id, tl.zeros_like(low) + STOCHASTIC_ROUNDING)


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
def _zeros4(x):
    return tl.zeros_like(x[0]), tl.zeros_like(x[0]), tl.zeros_like(x[0]), tl.zeros_like(x[0])


@triton.jit
def _tile(
    dst, src, start, tensor, begin, end, anchor, low_at, m_at, v_at, seeds, coeffs, members, decay, numbers,
    WHOLE: tl.constexpr, KIND: tl.constexpr, SRC: tl.constexpr, DST: tl.constexpr, TILE: tl.constexpr,
    STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """One tile. WHOLE: every element is there and all addresses are multiples of 16."""
    if KIND == GAUSSIAN:
        element = tl.arange(0, TILE)
        x = _load4(src, low_at, element, begin, end, WHOLE, SRC)
        x = _decayed4(x, anchor, element, begin, end, decay, WHOLE, DST, DECAY)
        block = start >> 2
        low = _bound_to(tl.arange(0, TILE // 4), x[0]) + block.to(tl.uint32)  # tiles are aligned: no carry within one
        high = tl.zeros_like(low) + (block >> 32).to(tl.uint32)
        tensor_id = tl.zeros_like(low) + tensor
        a = x
        if ADAM:
            a = _zeros4(x)
        for j in range(members):
            seed, coeff = tl.load(seeds + j), tl.load(coeffs + j)
            k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
            a = _gaussian4(a, coeff, k0, k1, low, high, tensor_id)
        if ADAM:
            a = _adam4(x, a, m_at, v_at, element, begin, end, numbers, WHOLE)
        words = (low, low, low, low)
        if STOCHASTIC:
            words = _rounding_words(seeds, low, high, tensor_id)
        _store4(dst, low_at, element, begin, end, WHOLE, a, words, DST, STOCHASTIC)
    else:
        # A thread holds the same quad of each of the block's four words: all of its signs come from one Philox call.
        i = tl.arange(0, TILE // 4)
        element = (i // 32) * 128 + i % 32
        a = _load4(src, low_at, element, begin, end, WHOLE, SRC)
        b = _load4(src, low_at, element + 32, begin, end, WHOLE, SRC)
        c = _load4(src, low_at, element + 64, begin, end, WHOLE, SRC)
        d = _load4(src, low_at, element + 96, begin, end, WHOLE, SRC)
        bound = _bound_to(tl.arange(0, TILE // 16), a[0])
        a = _decayed4(a, anchor, element, begin, end, decay, WHOLE, DST, DECAY)
        b = _decayed4(b, anchor, element + 32, begin, end, decay, WHOLE, DST, DECAY)
        c = _decayed4(c, anchor, element + 64, begin, end, decay, WHOLE, DST, DECAY)
        d = _decayed4(d, anchor, element + 96, begin, end, decay, WHOLE, DST, DECAY)
        xa, xb, xc, xd = a, b, c, d
        if ADAM:
            a, b, c, d = _zeros4(a), _zeros4(b), _zeros4(c), _zeros4(d)
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
        if ADAM:
            a = _adam4(xa, a, m_at, v_at, element, begin, end, numbers, WHOLE)
            b = _adam4(xb, b, m_at, v_at, element + 32, begin, end, numbers, WHOLE)
            c = _adam4(xc, c, m_at, v_at, element + 64, begin, end, numbers, WHOLE)
            d = _adam4(xd, d, m_at, v_at, element + 96, begin, end, numbers, WHOLE)
        wa = (low, low, low, low)
        wb, wc, wd = wa, wa, wa
        if STOCHASTIC:
            block = start >> 2
            quad = bound // 8 * 32 + bound % 8 + block.to(tl.uint32)
            high = tl.zeros_like(low) + (block >> 32).to(tl.uint32)
            wa = _rounding_words(seeds, quad, high, tensor_id)
            wb = _rounding_words(seeds, quad + 8, high, tensor_id)
            wc = _rounding_words(seeds, quad + 16, high, tensor_id)
            wd = _rounding_words(seeds, quad + 24, high, tensor_id)
        _store4(dst, low_at, element, begin, end, WHOLE, a, wa, DST, STOCHASTIC)
        _store4(dst, low_at, element + 32, begin, end, WHOLE, b, wb, DST, STOCHASTIC)
        _store4(dst, low_at, element + 64, begin, end, WHOLE, c, wc, DST, STOCHASTIC)
        _store4(dst, low_at, element + 96, begin, end, WHOLE, d, wd, DST, STOCHASTIC)


@triton.jit
def add_noise_kernel(
    tiles,  # int64 [tiles, 4]: dst, src, number of the tile's first element, pack_span(...), core/backends/tiles.py
    extras,  # int64 [tiles, 2]: anchor, place in the flat buffers; read only if one of them is needed
    seeds,  # int64 [members]: the bits of the 64-bit seeds
    coeffs,  # float32 [members]
    members,
    low,  # addresses of flat buffers: low halves (SPLIT), moments (ADAM)
    m,
    v,
    decay,
    one_minus_beta1,
    one_minus_beta2,
    step,
    eps,
    KIND: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    TILE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY: tl.constexpr,  # 0: none, 1: to zero, 2: to the anchor
    ADAM: tl.constexpr,
):
    # A record per tile, 32 bytes for 8 or 16 KiB of weights: deriving it from the segment table took 70 instructions
    # and two more dependent loads, 2 of the 31 issue slots that a weight has.
    record = tiles + tl.program_id(0).to(tl.int64) * 4
    dst, src, start, span = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    anchor, low_at, m_at, v_at = dst, dst, dst, dst
    if DECAY == 2 or ADAM or SRC == SPLIT:
        extra = extras + tl.program_id(0).to(tl.int64) * 2
        anchor, flat = tl.load(extra), tl.load(extra + 1)
        low_at, m_at, v_at = low + flat * 2, m + flat * 4, v + flat * 4
    numbers = (one_minus_beta1, one_minus_beta2, step, eps)
    low_span = span.to(tl.int32)
    begin, end, whole = low_span & 0x7FFF, (low_span >> 15) & 0xFFFF, low_span < 0
    tensor = (span >> 32).to(tl.uint32)
    # Two copies of the code: values that could come from either of two loads cost 40 moves and address selections.
    if whole:
        _tile(
            dst, src, start, tensor, begin, end, anchor, low_at, m_at, v_at, seeds, coeffs, members, decay, numbers,
            True, KIND, SRC, DST, TILE, STOCHASTIC, DECAY, ADAM,
        )  # fmt: skip
    else:
        _tile(
            dst, src, start, tensor, begin, end, anchor, low_at, m_at, v_at, seeds, coeffs, members, decay, numbers,
            False, KIND, SRC, DST, TILE, STOCHASTIC, DECAY, ADAM,
        )  # fmt: skip
