"""dst = round(src + sum_j coeff_j noise(seed_j)) over all tensors of a plan, in one launch per pair of formats.

Work is cut into tiles at multiples of TILE of the element's number in its whole tensor, as csrc/cpu.h does. Weights are
loaded in their own order, so that accesses are 128 bits wide and conversions go in pairs, and then split into four
tensors by their number mod 4: the four of one Gaussian block lie at one place of four tensors, in one thread, and
nothing passes through shared memory.
"""

import triton
import triton.language as tl

from .memory import SPLIT, adam_step, decayed, load_weights, store_weights
from .noise import GAUSSIAN, RADEMACHER, STOCHASTIC_ROUNDING, add_signed, as_bits, gaussian_pair, philox

# 32 weights a thread: fewer leave key schedules and addresses unamortised, more spill.
TILE = 4096
NUM_WARPS = 4
# Left alone, ptxas takes 128 registers and spills 8 bytes, or up to 164; from 129 to 168 three blocks fit an SM.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 144, "enable_fp_fusion": False}

# Adam keeps weights, gradient and both moments of a tile in registers: 16 weights a thread.
ADAM_TILE = 2048


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
def _load4(
    address,
    low,
    anchor,
    element,
    begin,
    end,
    decay,
    WHOLE: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    DECAY: tl.constexpr,
):
    """Weights, decayed, as four float32 tensors."""
    inside = (element >= begin) & (element < end)
    x = load_weights(address, element, low, element, inside, WHOLE, SRC)
    return _apart(decayed(x, anchor, element, inside, decay, WHOLE, DST, DECAY))


@triton.jit
def _store4(
    address, low, element, begin, end, WHOLE: tl.constexpr, a, words, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Rounds four float32 tensors to the format and stores them where _load4 would read them. `words`: random ones."""
    inside = (element >= begin) & (element < end)
    x, random = _together(a), _together(words)
    store_weights(address, element, low, element, inside, WHOLE, x, random, FORMAT, STOCHASTIC)


@triton.jit
def _adam4(x, g, m_at, v_at, element, begin, end, numbers, WHOLE: tl.constexpr):
    """x after a step of Adam along g."""
    inside = (element >= begin) & (element < end)
    return _apart(adam_step(_together(x), _together(g), m_at, v_at, element, inside, numbers, WHOLE))


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
    dst,
    src,
    start,
    tensor,
    begin,
    end,
    anchor,
    low_at,
    m_at,
    v_at,
    seeds,
    coeffs,
    members,
    decay,
    numbers,
    WHOLE: tl.constexpr,
    KIND: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    TILE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY: tl.constexpr,
    ADAM: tl.constexpr,
):
    """One tile. WHOLE: every element is there and all addresses are multiples of 16."""
    if KIND == GAUSSIAN:
        element = tl.arange(0, TILE)
        x = _load4(src, low_at, anchor, element, begin, end, decay, WHOLE, SRC, DST, DECAY)
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
        a = _load4(src, low_at, anchor, element, begin, end, decay, WHOLE, SRC, DST, DECAY)
        b = _load4(src, low_at, anchor, element + 32, begin, end, decay, WHOLE, SRC, DST, DECAY)
        c = _load4(src, low_at, anchor, element + 64, begin, end, decay, WHOLE, SRC, DST, DECAY)
        d = _load4(src, low_at, anchor, element + 96, begin, end, decay, WHOLE, SRC, DST, DECAY)
        bound = _bound_to(tl.arange(0, TILE // 16), a[0])
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
            dst,
            src,
            start,
            tensor,
            begin,
            end,
            anchor,
            low_at,
            m_at,
            v_at,
            seeds,
            coeffs,
            members,
            decay,
            numbers,
            True,
            KIND,
            SRC,
            DST,
            TILE,
            STOCHASTIC,
            DECAY,
            ADAM,
        )
    else:
        _tile(
            dst,
            src,
            start,
            tensor,
            begin,
            end,
            anchor,
            low_at,
            m_at,
            v_at,
            seeds,
            coeffs,
            members,
            decay,
            numbers,
            False,
            KIND,
            SRC,
            DST,
            TILE,
            STOCHASTIC,
            DECAY,
            ADAM,
        )
