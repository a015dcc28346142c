"""The noise (esfast/core/noise.py) as Triton device functions: explicit fma, nothing that the hardware approximates.

Compile with enable_fp_fusion=False: a mul and an add that the compiler contracts into an fma change bits.
"""

import triton
import triton.language as tl

GAUSSIAN: tl.constexpr = tl.constexpr(0)  # domains, as in csrc/noise.h
RADEMACHER: tl.constexpr = tl.constexpr(1)
STOCHASTIC_ROUNDING: tl.constexpr = tl.constexpr(2)

_LN = tl.constexpr(-2 * 0.69314718055994530942 / 8388608)


@triton.jit
def philox(k0, k1, x0, x1, x2, x3):
    """Philox4x32-7: four uint32 tensors from the halves of the seed and the counter words."""
    for _ in tl.static_range(7):
        # one 64-bit product gives both halves: IMAD.WIDE, where umulhi and mul would be two
        p0 = x0.to(tl.uint64) * 0xD2511F53
        p1 = x2.to(tl.uint64) * 0xCD9E8D57
        x0 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0
        x1 = p1.to(tl.uint32)
        x2 = (p0 >> 32).to(tl.uint32) ^ x3 ^ k1
        x3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def as_float(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def radius(a):
    """sqrt(-2 ln(u / 2^32)), u = a | 1."""
    u = (a | 1).to(tl.float32)
    bits = as_bits(u)
    e = (bits - 0x4F800000).to(tl.int32, bitcast=True).to(tl.float32)
    f = as_float((bits & 0x7FFFFF) | 0x3F800000) - 1.0
    q = tl.fma(tl.fma(tl.fma(0.0625898615, f, -0.205763012), f, 0.370389313), f, -0.612627089)
    w = tl.fma(tl.fma(-f, f, f), q, e * _LN)
    y = as_float(0x5F375000 - (as_bits(w) >> 1))
    s = w * y
    d = tl.fma(-s, y, 1.0)
    return tl.fma(s * d, tl.fma(0.37602824, d, 0.501085818), s)


@triton.jit
def gaussian_pair(a, b):
    """Two standard normal float32 tensors from two uint32 tensors, by Box-Muller."""
    r = radius(a)
    h = as_float((b & 0x7FFFFF) | 0x40000000) - 3.0
    t = h * h
    s = tl.fma(tl.fma(tl.fma(-0.00433310214, t, 0.0794344693), t, -0.645893872), t, 1.57079351)
    c = tl.fma(tl.fma(tl.fma(-0.0190958101, t, 0.252580702), t, -1.23348641), t, 0.999994874)
    return (r * h) * s, as_float(as_bits(r * c) ^ (b & 0x80000000))


@triton.jit
def add_signed(x, coeff, word, BIT: tl.constexpr):
    """x + coeff, or x - coeff where the bit of the word is set: fma(coeff, +-1, x)."""
    return x + as_float(as_bits(coeff) ^ ((word << (31 - BIT)) & 0x80000000))
