"""What the kernels do with the weights of a tile beside the noise: read, decay, step along a gradient, round and write.

A tile is a tensor of any shape. Where its elements lie is an address and a tensor of distances from it, in elements.
`inside` tells the elements that are there. WHOLE: all are, and the kernel may read and write 128 bits at once.
"""

import os

import triton
import triton.language as tl

from .noise import as_bits, as_float

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLOAT32: tl.constexpr = tl.constexpr(0)  # formats, as in csrc/dtypes.h
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)
SPLIT: tl.constexpr = tl.constexpr(3)


@triton.jit
def pointers(address, element, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    p = address.to(tl.int64).to(tl.pointer_type(TYPE))
    if WHOLE:
        p = tl.multiple_of(p, 16)
    return p + element


@triton.jit
def load(address, element, inside, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    """The elements behind `address`, 0 where none is inside."""
    p = pointers(address, element, WHOLE, TYPE)
    if WHOLE:
        return tl.load(p)
    else:
        return tl.load(p, mask=inside, other=0)


@triton.jit
def store(address, element, inside, WHOLE: tl.constexpr, TYPE: tl.constexpr, x):
    p = pointers(address, element, WHOLE, TYPE)
    if WHOLE:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=inside)


@triton.jit
def load_weights(address, element, low, low_element, inside, WHOLE: tl.constexpr, FORMAT: tl.constexpr):
    """Weights as float32. `low`, `low_element`: where the low halves of SPLIT lie."""
    if FORMAT == FLOAT32:
        return load(address, element, inside, WHOLE, tl.float32)
    elif FORMAT == FLOAT16:
        return load(address, element, inside, WHOLE, tl.float16).to(tl.float32)
    else:  # by bits, as the interpreter's conversion of bfloat16 (3.9) is wrong for subnormals
        bits = load(address, element, inside, WHOLE, tl.uint16).to(tl.uint32) << 16
        if FORMAT == SPLIT:
            half = load(low, low_element, inside, WHOLE, tl.int16)
            bits = bits + half.to(tl.int32).to(tl.uint32, bitcast=True)
        return as_float(bits)


@triton.jit
def store_weights(
    address,
    element,
    low,
    low_element,
    inside,
    WHOLE: tl.constexpr,
    x,
    words,
    FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Rounds float32 to the format and stores it where load_weights would read it. `words`: random ones."""
    if FORMAT == FLOAT32:
        store(address, element, inside, WHOLE, tl.float32, x)
    elif FORMAT == SPLIT:
        bits = as_bits(x)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        store(address, element, inside, WHOLE, tl.uint16, ((bits + 0x8000) >> 16).to(tl.uint16))
        store(low, low_element, inside, WHOLE, tl.uint16, bits.to(tl.uint16))
    elif FORMAT == BFLOAT16:
        if STOCHASTIC:
            bits = as_bits(x)
            rounded = (bits + (words >> 16)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            store(address, element, inside, WHOLE, tl.uint16, rounded.to(tl.uint16))
        elif INTERPRETED:
            # the interpreter's own conversion (3.9) rounds a half away from zero and loses the carry
            bits = as_bits(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            store(address, element, inside, WHOLE, tl.uint16, rounded.to(tl.uint16))
        else:
            store(address, element, inside, WHOLE, tl.bfloat16, x.to(tl.bfloat16))
    elif STOCHASTIC:  # Float16::store in csrc/dtypes.h
        bits = as_bits(x)
        magnitude = bits & 0x7FFFFFFF
        small = magnitude < 0x38800000
        normal = (magnitude + 0xC8000000 + (words >> 19)) >> 13
        units = (as_float(tl.where(small, magnitude, 0)) * 1099511627776.0).to(tl.int32).to(tl.uint32, bitcast=True)
        found = tl.where(small, (units + (words >> 16)) >> 16, normal)
        special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
        found = tl.where(magnitude >= 0x47800000, special, found) | ((bits >> 16) & 0x8000)
        store(address, element, inside, WHOLE, tl.uint16, found.to(tl.uint16))
    else:
        store(address, element, inside, WHOLE, tl.float16, x.to(tl.float16))


@triton.jit
def decayed(x, anchor, element, inside, decay, WHOLE: tl.constexpr, DST: tl.constexpr, DECAY: tl.constexpr):
    """x moved towards the anchor (DECAY 2) or zero (1) by the fraction `decay`."""
    if DECAY == 0:
        return x
    else:
        toward = tl.zeros_like(x)
        if DECAY == 2:
            toward = load_weights(anchor, element, anchor, element, inside, WHOLE, BFLOAT16 if DST == SPLIT else DST)
        return tl.fma(tl.zeros_like(x) + decay, toward - x, x)


@triton.jit
def adam_step(x, gradient, m_at, v_at, element, inside, numbers, WHOLE: tl.constexpr):
    """x after a step of Adam; the moments at the two addresses are changed. numbers: ops.Adam.numbers."""
    zero = tl.zeros_like(x)
    m = load(m_at, element, inside, WHOLE, tl.float32)
    v = load(v_at, element, inside, WHOLE, tl.float32)
    m = tl.fma(zero + numbers[0], gradient - m, m)
    v = tl.fma(zero + numbers[1], gradient * gradient - v, v)
    store(m_at, element, inside, WHOLE, tl.float32, m)
    store(v_at, element, inside, WHOLE, tl.float32, v)
    ratio = tl.div_rn(m, tl.sqrt_rn(v) + numbers[3])
    return tl.fma(zero + numbers[2], ratio, x)
