"""Low-rank noise over all tensors of a plan, in one launch per pair of formats.

For member j and factor q in order: acc = fma(round(c_j A_jq[row]), B_jq[column], acc), with c_j = coeff_j / sqrt(rank).

A tile is ROWS rows of COLS columns of one matrix. Its factors are drawn here and are gone with the tile. A row's
factor serves COLS weights and a column's ROWS: drawing costs 0.4 instructions per weight and member, the fma 1. SLOTS
factors are drawn at once, a quad of numbers in each lane, and go through shared memory to the lanes that hold their
rows and columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .memory import FLOAT32, adam_step, decayed, load_weights, store_weights
from .noise import GAUSSIAN, STOCHASTIC_ROUNDING, gaussian_pair, philox

COLS: tl.constexpr = tl.constexpr(128)
# Rows of a tile that is not whole. A weight and member costs 13 instructions there.
PART_ROWS: tl.constexpr = tl.constexpr(16)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Configuration(NamedTuple):
    rows: int
    slots: int
    registers: int


# 128 weights a thread: 1.7 instructions per weight and member in 221 registers (bf16, sm_90). On twice the warps, or
# with half the rows, they are 2.2, as each thread then draws as much for half the weights.
SUM = Configuration(128, 4, 255)
# Of what perturbs four blocks fit an SM, to wait for memory together.
ONE = Configuration(64, 1, 128)
# Words to round with, and Adam's gradient and moments, need registers beside the sums.
ROUNDED = Configuration(64, 4, 255)
STEP = Configuration(32, 4, 255)


def configuration(slots: int, STOCHASTIC: bool, DECAY: int, ADAM: bool) -> Configuration:
    """For a call with so many factors of all its members."""
    if ADAM:
        return STEP
    if STOCHASTIC:
        return ROUNDED
    return ONE if slots == 1 and not DECAY else SUM


# Columns of the segment table, as in esfast/core/segments.py.
DST_AT: tl.constexpr = tl.constexpr(0)
SRC_AT: tl.constexpr = tl.constexpr(1)
ANCHOR_AT: tl.constexpr = tl.constexpr(2)
DST_STRIDE: tl.constexpr = tl.constexpr(5)
SRC_STRIDE: tl.constexpr = tl.constexpr(6)
ANCHOR_STRIDE: tl.constexpr = tl.constexpr(7)
INDEX_STRIDE: tl.constexpr = tl.constexpr(8)
FIRST: tl.constexpr = tl.constexpr(9)
FLAT: tl.constexpr = tl.constexpr(10)
TENSOR_ID: tl.constexpr = tl.constexpr(11)
FLAT_STRIDE: tl.constexpr = tl.constexpr(14)
A_ID: tl.constexpr = tl.constexpr(15)
B_ID: tl.constexpr = tl.constexpr(16)
A_FIRST: tl.constexpr = tl.constexpr(17)
B_FIRST: tl.constexpr = tl.constexpr(18)
A_STEP: tl.constexpr = tl.constexpr(19)
B_STEP: tl.constexpr = tl.constexpr(20)
FIELDS: tl.constexpr = tl.constexpr(21)


@triton.jit
def _quads(k0, k1, number, tensor, N: tl.constexpr):
    """Gaussian numbers from `number` [SLOTS] on, a multiple of 4, of a tensor: four tensors [N / 4, SLOTS]."""
    block = (number >> 2)[None, :] + tl.arange(0, N // 4)[:, None]
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    words = philox(
        zero + k0[None, :], zero + k1[None, :], low, (block >> 32).to(tl.uint32), zero + tensor, zero + GAUSSIAN
    )
    z0, z1 = gaussian_pair(words[0], words[1])
    z2, z3 = gaussian_pair(words[2], words[3])
    return z0, z1, z2, z3


@triton.jit
def _lined_up(z, N: tl.constexpr, SLOTS: tl.constexpr):
    """The four tensors of _quads as one [N, SLOTS]."""
    joined = tl.join(tl.join(z[0], z[2]), tl.join(z[1], z[3]))
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (N, SLOTS))


@triton.jit
def _singles(k0, k1, number, tensor, N: tl.constexpr):
    """N gaussian numbers from any one on. Each takes a Philox call of its own."""
    index = number + tl.arange(0, N)
    block, lane = index >> 2, index & 3
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    words = philox(zero + k0, zero + k1, low, (block >> 32).to(tl.uint32), zero + tensor, zero + GAUSSIAN)
    z0, z1 = gaussian_pair(tl.where(lane < 2, words[0], words[2]), tl.where(lane < 2, words[1], words[3]))
    return tl.where(lane % 2 == 0, z0, z1)


@triton.jit
def _accumulate(x, a, b, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """x after the fma of each slot in order; a [ROWS, SLOTS], b [COLS, SLOTS]."""
    if SLOTS == 1:
        rows = tl.broadcast_to(tl.reshape(a, (ROWS, 1)), (ROWS, COLS))
        return tl.fma(rows, tl.broadcast_to(tl.reshape(b, (1, COLS)), (ROWS, COLS)), x)
    else:
        HALF: tl.constexpr = SLOTS // 2
        a0, a1 = tl.split(tl.permute(tl.reshape(a, (ROWS, 2, HALF)), (0, 2, 1)))
        b0, b1 = tl.split(tl.permute(tl.reshape(b, (COLS, 2, HALF)), (0, 2, 1)))
        return _accumulate(_accumulate(x, a0, b0, ROWS, HALF), a1, b1, ROWS, HALF)


@triton.jit
def _add_slots(
    x,
    seeds,
    coeffs,
    slot,
    slots,
    rank,
    scale,
    segment,
    a_first,
    b_first,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Factors number slot .. slot + SLOTS - 1 of all members', drawn by all lanes."""
    at = slot + tl.arange(0, SLOTS)
    member = at // rank
    q = (at - member * rank).to(tl.int64)
    there = at < slots
    seed = tl.load(seeds + member, mask=there, other=0)
    c = (tl.load(coeffs + member, mask=there, other=0) * scale)[None, :]
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    b = _quads(k0, k1, b_first + q * tl.load(segment + B_STEP), tl.load(segment + B_ID).to(tl.uint32), COLS)
    b = _lined_up(b, COLS, SLOTS)
    a = _quads(k0, k1, a_first + q * tl.load(segment + A_STEP), tl.load(segment + A_ID).to(tl.uint32), ROWS)
    a = _lined_up((c * a[0], c * a[1], c * a[2], c * a[3]), ROWS, SLOTS)
    if SLOTS > 1:
        # -0 * 0 added changes nothing, not even a zero's sign
        b, a = tl.where(there[None, :], b, 0.0), tl.where(there[None, :], a, -0.0)
    return _accumulate(x, a, b, ROWS, SLOTS)


@triton.jit
def _add_slot(x, seeds, coeffs, slot, rank, scale, segment, a_first, b_first, vector, ROWS: tl.constexpr):
    """Factor number `slot` of all members' in a tile that is not whole. A vector is a row of a column of one."""
    member = slot // rank
    q = (slot - member * rank).to(tl.int64)
    seed = tl.load(seeds + member)
    c = tl.load(coeffs + member) * scale
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    # A number for each lane, of which those of the rows are taken: Triton would otherwise draw each one in many lanes.
    a = c * _singles(k0, k1, a_first + q * tl.load(segment + A_STEP), tl.load(segment + A_ID).to(tl.uint32), COLS)
    a = tl.gather(a, tl.arange(0, ROWS), 0)
    b_id = tl.load(segment + tl.where(vector, TENSOR_ID, B_ID)).to(tl.uint32)
    b = _singles(k0, k1, b_first + q * tl.load(segment + B_STEP), b_id, COLS)
    return _accumulate(x, tl.where(vector, c, a), b, ROWS, 1)


@triton.jit
def _rounding_words(seeds, number, stride, tensor, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """One random word for each element of a tile, under the first seed; `number` is that of element (0, 0)."""
    seed = tl.load(seeds)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    row = number + tl.arange(0, ROWS)[:, None] * stride
    if WHOLE:
        index = row + tl.arange(0, COLS // 4)[None, :] * 4
    else:
        index = row + tl.arange(0, COLS)[None, :]
    block = index >> 2
    low = block.to(tl.uint32)
    zero = tl.zeros_like(low)
    w = philox(zero + k0, zero + k1, low, (block >> 32).to(tl.uint32), zero + tensor, zero + STOCHASTIC_ROUNDING)
    if WHOLE:
        return tl.reshape(tl.join(tl.join(w[0], w[2]), tl.join(w[1], w[3])), (ROWS, COLS))
    else:
        lane = index & 3
        return tl.where(lane < 2, tl.where(lane == 0, w[0], w[1]), tl.where(lane == 2, w[2], w[3]))


@triton.jit
def _elements(segment, STRIDE: tl.constexpr, r, c, WHOLE: tl.constexpr, ITEMSIZE: tl.constexpr):
    """Distances of a tile's elements from its first one, in a memory with the stride of this column of the table."""
    # loaded here, as Triton forgets what is said of a function's argument
    stride = tl.load(segment + STRIDE)
    if WHOLE:
        stride = tl.multiple_of(stride, 16 // ITEMSIZE)
    return r * stride + c


@triton.jit
def _address(segment, ADDRESS: tl.constexpr, STRIDE: tl.constexpr, row, column, ITEMSIZE: tl.constexpr):
    """Of the tile's first element."""
    return tl.load(segment + ADDRESS) + (row * tl.load(segment + STRIDE) + column) * ITEMSIZE


@triton.jit
def _read(
    segment,
    row,
    column,
    r,
    c,
    inside,
    low,
    decay,
    WHOLE: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    DECAY: tl.constexpr,
):
    """The weights of a tile, decayed."""
    SRC_SIZE: tl.constexpr = 4 if SRC == FLOAT32 else 2
    DST_SIZE: tl.constexpr = 4 if DST == FLOAT32 else 2
    at = _elements(segment, SRC_STRIDE, r, c, WHOLE, SRC_SIZE)
    at_low = _elements(segment, FLAT_STRIDE, r, c, WHOLE, 2)
    at_anchor = _elements(segment, ANCHOR_STRIDE, r, c, WHOLE, DST_SIZE)
    src = _address(segment, SRC_AT, SRC_STRIDE, row, column, SRC_SIZE)
    anchor = _address(segment, ANCHOR_AT, ANCHOR_STRIDE, row, column, DST_SIZE)
    x = load_weights(src, at, low, at_low, inside, WHOLE, SRC)
    return decayed(x, anchor, at_anchor, inside, decay, WHOLE, DST, DECAY)


@triton.jit
def _tile(
    segment,
    row,
    column,
    rows,
    cols,
    seeds,
    coeffs,
    members,
    rank,
    scale,
    low,
    m,
    v,
    decay,
    numbers,
    WHOLE: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY: tl.constexpr,
    ADAM: tl.constexpr,
):
    """One tile, which begins at (row, column) of its segment. WHOLE: ROWS x COLS are there, and all is aligned."""
    DST_SIZE: tl.constexpr = 4 if DST == FLOAT32 else 2
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (r < rows) & (c < cols)
    flat = _address(segment, FLAT, FLAT_STRIDE, row, column, 1)
    low_at, m_at, v_at = low + flat * 2, m + flat * 4, v + flat * 4
    if ADAM:
        acc = tl.zeros((ROWS, COLS), tl.float32)
    else:
        acc = _read(segment, row, column, r, c, inside, low_at, decay, WHOLE, SRC, DST, DECAY)
    a_first, b_first = tl.load(segment + A_FIRST) + row, tl.load(segment + B_FIRST) + column
    number = tl.load(segment + FIRST) + row * tl.load(segment + INDEX_STRIDE) + column
    if WHOLE:
        slots = members * rank
        for slot in range(0, slots, SLOTS):
            acc = _add_slots(acc, seeds, coeffs, slot, slots, rank, scale, segment, a_first, b_first, ROWS, SLOTS)
    else:
        vector = tl.load(segment + A_STEP) == 0
        rank = tl.where(vector, 1, rank)
        scale = tl.where(vector, 1.0, scale)
        b_first = tl.where(vector, number, b_first)
        for slot in range(members * rank):
            acc = _add_slot(acc, seeds, coeffs, slot, rank, scale, segment, a_first, b_first, vector, ROWS)
    # The rest is computed here and not before the loop, which needs the registers.
    at_flat = _elements(segment, FLAT_STRIDE, r, c, WHOLE, 2)
    if ADAM:
        x = _read(segment, row, column, r, c, inside, low_at, decay, WHOLE, SRC, DST, DECAY)
        acc = adam_step(x, acc, m_at, v_at, at_flat, inside, numbers, WHOLE)
    words = tl.zeros((1, 1), tl.uint32)
    if STOCHASTIC:
        tensor = tl.load(segment + TENSOR_ID).to(tl.uint32)
        words = _rounding_words(seeds, number, tl.load(segment + INDEX_STRIDE), tensor, WHOLE, ROWS)
    dst = _address(segment, DST_AT, DST_STRIDE, row, column, DST_SIZE)
    at_dst = _elements(segment, DST_STRIDE, r, c, WHOLE, DST_SIZE)
    store_weights(dst, at_dst, low_at, at_flat, inside, WHOLE, acc, words, DST, STOCHASTIC)


@triton.jit
def add_low_rank_kernel(
    tiles,  # int64 [tiles, 4]: segment, its row and column where the tile begins, rows << 8 | columns that are there,
    # and << 31 whether the tile is whole: esfast/core/backends/tiles.py
    segments,  # int64 [segments, FIELDS]: esfast/core/segments.py
    seeds,  # int64 [members]: the bits of the 64-bit seeds
    coeffs,  # float32 [members]
    members,
    rank,
    scale,  # 1 / sqrt(rank)
    low,  # addresses of flat buffers: low halves (SPLIT), moments (ADAM)
    m,
    v,
    decay,
    one_minus_beta1,
    one_minus_beta2,
    step,
    eps,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY: tl.constexpr,  # 0: none, 1: to zero, 2: to the anchor
    ADAM: tl.constexpr,
):
    record = tiles + tl.program_id(0).to(tl.int64) * 4
    segment = segments + tl.load(record) * FIELDS
    row, column, span = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3).to(tl.int32)
    rows, cols = (span >> 8) & 0xFF, span & 0xFF
    numbers = (one_minus_beta1, one_minus_beta2, step, eps)
    PARTS: tl.constexpr = ROWS if ROWS < PART_ROWS else PART_ROWS
    if span < 0:
        _tile(
            segment,
            row,
            column,
            rows,
            cols,
            seeds,
            coeffs,
            members,
            rank,
            scale,
            low,
            m,
            v,
            decay,
            numbers,
            True,
            SRC,
            DST,
            ROWS,
            SLOTS,
            STOCHASTIC,
            DECAY,
            ADAM,
        )
    else:
        _tile(
            segment,
            row,
            column,
            rows,
            cols,
            seeds,
            coeffs,
            members,
            rank,
            scale,
            low,
            m,
            v,
            decay,
            numbers,
            False,
            SRC,
            DST,
            PARTS,
            1,
            STOCHASTIC,
            DECAY,
            ADAM,
        )
