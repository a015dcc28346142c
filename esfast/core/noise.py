"""The noise: one pure function of (seed, tensor name, element), written slowly and obviously.

Tests compare every backend with this file, to the bit. It uses only operations whose results IEEE 754 and two's
complement define: integer arithmetic, int-to-float conversion, bit reinterpretation, and float32 add, mul and fma, each
in a stated order. csrc/noise.h is the same in C++. Version 1 is frozen: journals depend on it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..utils.errors import BadType, BadValue
from ..utils.settings import check_int
from .kinds import (  # noqa: F401
    ADDED,
    DOMAINS,
    ELEMENTWISE,
    KINDS,
    MAX_RANK,
    NOISE_VERSION,
    NUMBERS_PER_BLOCK,
    USES,
    check_kind,
    check_rank,
    check_seed,
)

if TYPE_CHECKING:
    import torch

# Seven rounds are the fewest that pass BigCrush (Salmon et al., SC'11); ten would cost 3 more GPU issue slots a number.
PHILOX_ROUNDS = 7

_f = np.float32
_Q = (_f(-0.612627089), _f(0.370389313), _f(-0.205763012), _f(0.0625898615))
_LN = _f(-2 * math.log(2) / 2**23)
_MAGIC = np.uint32(0x5F375000)
_SA, _SB = _f(0.501085818), _f(0.37602824)
# Scaled by 1.0000016 after the fit, which takes the variance, enumerated over every possible input, to 1 within 6e-8.
_S = (_f(1.57079351), _f(-0.645893872), _f(0.0794344693), _f(-0.00433310214))
_C = (_f(0.999994874), _f(-1.23348641), _f(0.252580702), _f(-0.0190958101))


def noise(seed: int, name: str, shape: int | tuple[int, ...], kind: str = "gaussian", rank: int = 1) -> torch.Tensor:
    """The noise of a tensor: a pure function of seed, name, shape and kind.

    This is the reference implementation, and slow. `add_noise_` adds the same numbers to weights, fast.

    Args:
        seed: 0 <= seed < 2**64.
        name: the tensor's canonical name. Equal names get equal noise, whatever else is in the model.
        shape: shape of the whole, unsharded tensor. Of "gaussian" and "rademacher" noise, element i in row-major order
            depends on i alone, so a longer tensor begins with the numbers of a shorter one.
        kind: "gaussian" (standard normal, within 2e-4 of Box-Muller in float64), "rademacher" (+1 or -1), or
            "low_rank": a matrix [rows, cols] gets A^T B / sqrt(rank), where A [rank, rows] and B [rank, cols] are the
            gaussian noise of tensors called `name + "/A"` and `name + "/B"`. Three dimensions are a batch of matrices,
            four and more a matrix of the first by all others. With none or one the noise is gaussian.
        rank: of "low_rank", 1 to 256.

    Returns:
        A float32 CPU tensor of that shape. Low-rank noise is summed in float32 from factors scaled by 1 / sqrt(rank):
            what `add_noise_` adds to zeros with the coefficient 1.

    Raises:
        TypeError, ValueError: a seed, name, shape, kind or rank outside the above.
    """
    import torch

    dims = tuple(check_int("shape", d, 0, 2**63) for d in (shape if isinstance(shape, Iterable) else (shape,)))
    rank = check_rank(check_kind(kind), rank)
    # Checks the name, from which low-rank noise makes two others.
    tensor_id(name)
    index = _all_elements(dims)
    if kind == "low_rank":
        values = add_low_rank(np.zeros(len(index), np.float32), _f(1), check_seed(seed), name, dims, index, rank)
    else:
        values = noise_at(seed, name, index, kind)
    return torch.from_numpy(values).reshape(dims)


def _all_elements(shape: tuple[int, ...]) -> np.ndarray:
    """The row-major numbers of all elements; ValueError if memory can't hold them."""
    count = math.prod(shape)
    try:
        # From about 2**63 numbers on, NumPy makes an empty array.
        if count <= 2**62:
            return np.arange(count, dtype=np.uint64)
    except (MemoryError, ValueError):
        pass
    raise BadValue(
        f"shape: {shape} has {count} elements, and memory can't hold a number for each; add_noise_ adds the noise to "
        "weights, also to a Slice of a whole of this shape, without holding it"
    )


def noise_at(seed: int, name: str, index: np.ndarray, kind: str = "gaussian") -> np.ndarray:
    """The noise of single elements: float32 array of the shape of `index` (row-major element numbers, uint64).

    ValueError for "low_rank" noise, which depends on the tensor's shape too: see `add_low_rank`."""
    seed, kind = check_seed(seed), check_kind(kind)
    if kind == "low_rank":
        raise BadValue("noise: 'low_rank' noise of an element depends on the tensor's shape; ask esfast.noise for it")
    index = np.asarray(index, dtype=np.uint64)
    # Compute a single element as an array: NumPy warns when a scalar overflows, and not when an array does.
    if index.ndim == 0:
        return noise_at(seed, name, index[None], kind)[0]
    block, lane = np.divmod(index, np.uint64(NUMBERS_PER_BLOCK[kind]))
    words = philox(seed, block, tensor_id(name), DOMAINS[kind])
    lane = lane.astype(np.int64)
    if kind in ADDED:
        return ADDED[kind](words, lane)
    if kind == "rademacher":
        word = np.choose(lane // 32, words)
        return np.where((word >> (lane % 32).astype(np.uint32)) & np.uint32(1), _f(-1), _f(1))
    return np.choose(lane, (*gaussian_pair(words[0], words[1]), *gaussian_pair(words[2], words[3])))


def matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(matrices, rows, columns): how low-rank noise divides a whole tensor of this shape; None: it is a vector."""
    if len(shape) < 2:
        return None
    matrices, rows = shape[:2] if len(shape) == 3 else (1, shape[0])
    return matrices, rows, math.prod(shape[2:] if len(shape) == 3 else shape[1:])


def factor_names(name: str) -> tuple[str, str]:
    """Names of the virtual tensors whose gaussian noise is the factors of a matrix called `name`: A [rank, matrices,
    rows] and B [rank, matrices, columns]."""
    return f"{name}/A", f"{name}/B"


def low_rank_scale(rank: int) -> np.float32:
    """float32(1 / sqrt(rank)), rounded once from float64."""
    return _f(1 / math.sqrt(rank))


def add_low_rank(
    acc: np.ndarray, coeff: np.float32, seed: int, name: str, shape: tuple[int, ...], index: np.ndarray, rank: int
) -> np.ndarray:
    """acc + coeff * low-rank noise of the elements `index` (uint64, row-major numbers) of a tensor of this shape.

    With c = coeff / sqrt(rank): acc = fma(c * A[q], B[q], acc) for q = 0 .. rank - 1, each product c * A[q] rounded.
    """
    matrices = matrices_of(shape)
    if matrices is None:
        return fma(coeff, noise_at(seed, name, index), acc)
    count, rows, cols = map(np.uint64, matrices)
    # through all matrices of a batch
    row, place = np.divmod(index, cols)
    column = row // rows * cols + place
    a_name, b_name = factor_names(name)
    scaled = _f(coeff) * low_rank_scale(rank)
    for q in range(rank):
        a = noise_at(seed, a_name, np.uint64(q) * count * rows + row)
        b = noise_at(seed, b_name, np.uint64(q) * count * cols + column)
        with np.errstate(over="ignore"):
            acc = fma(scaled * a, b, acc)
    return acc


def tensor_id(name: str) -> int:
    """32 bits for a tensor's name: CRC-32 of its UTF-8 bytes.

    A CRC is in every standard library, and it tells apart any two names of equal length that differ within four
    consecutive bytes: layers 10 and 11 of one model can't collide. Plan refuses the collisions that remain.
    """
    if not isinstance(name, str) or not name:
        raise BadType(f"name: expected a non-empty str, got {name!r}")
    try:
        return zlib.crc32(name.encode())
    except UnicodeEncodeError:
        raise BadValue(f"name: {name!r} has no UTF-8 bytes (half of a surrogate pair); rename the tensor") from None


def philox(seed: int, block: np.ndarray, tensor: int, domain: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-7: four uint32 arrays of the shape of `block` (uint64). key = halves of the seed;
    counter = (block low, block high, tensor id, domain)."""
    block = np.asarray(block, dtype=np.uint64)
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1 = block & mask, block >> shift
    x2, x3 = np.full_like(x0, tensor), np.full_like(x0, domain)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (p1 >> shift) ^ x1 ^ np.uint64(k0), p1 & mask
        x2, x3 = (p0 >> shift) ^ x3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(x.astype(np.uint32) for x in (x0, x1, x2, x3))


def gaussian_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normal float32 arrays from two uint32 arrays, by Box-Muller (1958).

    The radius is sqrt(-2 ln(u / 2^32)) with u = float32(a | 1), the angle pi/2 h with h in [-1, 1) from the low 23 bits
    of b, and bit 31 of b is the sign of the second number.
    """
    r = _radius(a)
    h = ((b & np.uint32(0x7FFFFF)) | np.uint32(0x40000000)).view(np.float32) - _f(3)
    t = h * h
    s = fma(fma(fma(_S[3], t, _S[2]), t, _S[1]), t, _S[0])
    c = fma(fma(fma(_C[3], t, _C[2]), t, _C[1]), t, _C[0])
    z1 = (r * c).view(np.uint32) ^ (b & np.uint32(0x80000000))
    return (r * h) * s, z1.view(np.float32)


def _radius(a: np.ndarray) -> np.ndarray:
    u = (np.asarray(a, dtype=np.uint32) | np.uint32(1)).astype(np.float32)  # nearest; in (0, 2^32]
    bits = u.view(np.uint32)
    e = (bits - np.uint32(0x4F800000)).view(np.int32).astype(np.float32)  # 2^23 log2(u / 2^32), linear between powers
    f = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32) - _f(1)
    # The error of the linear part, divided by f (1 - f).
    q = fma(fma(fma(_Q[3], f, _Q[2]), f, _Q[1]), f, _Q[0])
    w = fma(fma(-f, f, f), q, e * _LN)
    y = (_MAGIC - (w.view(np.uint32) >> np.uint32(1))).view(np.float32)  # 1 / sqrt(w) within 3.5 %
    s = w * y
    d = fma(-s, y, _f(1))
    return fma(s * d, fma(_SB, d, _SA), s)


def fma(a, b, c) -> np.ndarray:
    """float32(a b + c) with one rounding, from float64: the product of two float32 is exact there, and the sum is
    rounded to odd, after which the second rounding can't go wrong (Boldo and Melquiond, 2008)."""
    with np.errstate(all="ignore"):
        a, b, c = (np.asarray(x, dtype=np.float64) for x in (a, b, c))
        product = a * b
        total = product + c
        back = total - product  # error of the sum, exactly (Knuth's TwoSum)
        error = (product - (total - back)) + (c - back)
        bits = np.atleast_1d(total).view(np.int64)
        toward = np.where((error > 0) == (total > 0), 1, -1)  # the neighbour of total on the error's side
        inexact = (error != 0) & np.isfinite(error) & (bits.reshape(total.shape) & 1 == 0)
        odd = np.where(inexact, bits.reshape(total.shape) + toward, bits.reshape(total.shape))
        return np.atleast_1d(odd).view(np.float64).reshape(total.shape).astype(np.float32)
