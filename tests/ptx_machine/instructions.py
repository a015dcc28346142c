"""What each instruction computes, for all lanes at once. Only these are known: any other fails by its name.

Left out on purpose are `.ftz`, whose results differ, and float mul, add and sub without `.rn`: these ptxas may contract
into an fma, which changes bits.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esfast.core.noise import fma

from .program import WIDTHS

DTYPES = {
    "pred": np.bool_,
    "f16": np.uint16,
    "bf16": np.uint16,
    "f32": np.float32,
    "f64": np.float64,
    **{
        f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}").type
        for bits in (8, 16, 32, 64)
        for kind in "bsu"
    },
}
INTEGERS = [f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)]
BITS = ["b16", "b32", "b64"]
NAN = np.uint32(0x7FFFFFFF)  # what NVIDIA's arithmetic makes of any NaN


@dataclass(frozen=True)
class Operation:
    """`compute` takes arrays of `operands`' types and gives one of `result`'s. `widens`: both may be narrower than their
    registers, as those of a conversion."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., np.ndarray]
    widens: bool = False


OPERATIONS: dict[str, Operation] = {}


def define(opcode: str, result: str, operands: str, compute: Callable[..., np.ndarray], widens: bool = False) -> None:
    OPERATIONS[opcode] = Operation(result, tuple(operands.split()), compute, widens)


# ---- integers -------------------------------------------------------------------------------------------------------


def _double(t: str) -> str:
    return f"{t[0]}{2 * WIDTHS[t]}"


def _mul_wide(wide: type, a, b, c=0):
    """a b + c in twice the bits of a and b."""
    return a.astype(wide) * b.astype(wide) + wide(c)


def _mul_hi(a, b):
    return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _quotient(a, b):
    """The quotient, rounded towards zero. PTX does not define a division by zero; here all bits of the result are
    set."""
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    found = np.abs(wide_a) // np.maximum(np.abs(wide_b), 1) * np.sign(wide_a) * np.sign(wide_b)
    return np.where(wide_b == 0, -1, found).astype(a.dtype)


for _t in ("s32", "u32"):
    define(f"div.{_t}", _t, f"{_t} {_t}", _quotient)
    define(f"rem.{_t}", _t, f"{_t} {_t}", lambda a, b: a - _quotient(a, b) * b)
for _t in INTEGERS:
    define(f"add.{_t}", _t, f"{_t} {_t}", np.add)
    define(f"sub.{_t}", _t, f"{_t} {_t}", np.subtract)
    define(f"mul.lo.{_t}", _t, f"{_t} {_t}", np.multiply)
    define(f"mad.lo.{_t}", _t, f"{_t} {_t} {_t}", lambda a, b, c: a * b + c)
    define(f"min.{_t}", _t, f"{_t} {_t}", np.minimum)
    define(f"max.{_t}", _t, f"{_t} {_t}", np.maximum)
    # NumPy defines a shift by the width and more as PTX does: all bits leave, and copies of the sign enter
    define(f"shr.{_t}", _t, f"{_t} u32", lambda a, n: np.right_shift(a, n.astype(a.dtype)))
for _t in ("u16", "s16", "u32", "s32"):
    _f = functools.partial(_mul_wide, DTYPES[_double(_t)])
    define(f"mul.wide.{_t}", _double(_t), f"{_t} {_t}", _f)
    define(f"mad.wide.{_t}", _double(_t), f"{_t} {_t} {_double(_t)}", _f)
define("mul.hi.u32", "u32", "u32 u32", _mul_hi)
define("neg.s32", "s32", "s32", np.negative)
for _t in [*BITS, "pred"]:
    for _name, _f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        define(f"{_name}.{_t}", _t, f"{_t} {_t}", _f)
    define(f"not.{_t}", _t, _t, np.invert)
for _t in BITS:
    define(f"shl.{_t}", _t, f"{_t} u32", lambda a, n: np.left_shift(a, n.astype(a.dtype)))
    define(f"shr.{_t}", _t, f"{_t} u32", lambda a, n: np.right_shift(a, n.astype(a.dtype)))


def _lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


def _bfe(a, start, length):
    """`length` bits from bit `start` on, of each only the low 8 bits count."""
    start, length = (x & np.uint32(255) for x in (start, length))
    mask = np.where(length < 32, np.left_shift(np.uint32(1), length) - np.uint32(1), np.uint32(0xFFFFFFFF))
    return np.right_shift(a, start) & mask


def _bfe_signed(a, start, length):
    """The same, with copies of the upper bit above it; bits beyond the 31st are copies of that."""
    start, length = ((x & np.uint32(255)).astype(np.int64) for x in (start, length))
    field = a.astype(np.int64) >> np.minimum(start, 63)
    unused = 64 - np.clip(length, 1, 32)
    return np.where(length > 0, (field << unused) >> unused, 0).astype(np.int32)


def _bfi(field, base, start, length):
    """`base` with the low `length` bits of `field` from bit `start` on."""
    mask = np.left_shift(_bfe(np.full_like(base, 0xFFFFFFFF), np.uint32(0), length), start & np.uint32(255))
    return (base & ~mask) | (np.left_shift(field, start & np.uint32(255)) & mask)


def _prmt(a, b, selector):
    """Four of eight bytes; bit 3 of a selector's nibble replicates the byte's sign instead."""
    source = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast_shapes(source.shape, selector.shape), dtype=np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


define("lop3.b32", "b32", "b32 b32 b32 u32", _lop3)
define("bfi.b32", "b32", "b32 b32 u32 u32", _bfi)
define("bfe.s32", "s32", "s32 u32 u32", _bfe_signed)
define("bfe.u32", "u32", "u32 u32 u32", _bfe)
define("prmt.b32", "b32", "b32 b32 b32", _prmt)

# ---- comparisons and selections -------------------------------------------------------------------------------------

COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
for _name, _f in COMPARISONS.items():
    for _t in [*INTEGERS, "f32", *(BITS if _name in ("eq", "ne") else [])]:
        define(f"setp.{_name}.{_t}", "pred", f"{_t} {_t}", np.not_equal if _name == "ne" else _f)
    define(f"setp.{_name}u.f32", "pred", "f32 f32", lambda a, b, f=_f: f(a, b) | np.isnan(a) | np.isnan(b))
# != of a NaN holds in IEEE 754, and `ne` of PTX is false where one is a NaN
define("setp.ne.f32", "pred", "f32 f32", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b))
define("setp.nan.f32", "pred", "f32 f32", lambda a, b: np.isnan(a) | np.isnan(b))
define("setp.num.f32", "pred", "f32 f32", lambda a, b: ~np.isnan(a) & ~np.isnan(b))
for _t in [*BITS, *INTEGERS, "f32"]:
    define(f"selp.{_t}", _t, f"{_t} {_t} pred", lambda a, b, p: np.where(p, a, b))
for _t in [*BITS, *INTEGERS, "f32", "pred"]:
    define(f"mov.{_t}", _t, _t, lambda a: a)

# ---- float32: one rounding each, subnormals kept --------------------------------------------------------------------


def _rounded(compute: Callable) -> Callable:
    def result(*operands):
        found = np.asarray(compute(*operands), dtype=np.float32)
        nan = np.isnan(found)
        if nan.any():
            found = np.where(nan, NAN.view(np.float32), found)
        return found

    return result


define("add.rn.f32", "f32", "f32 f32", _rounded(np.add))
define("sub.rn.f32", "f32", "f32 f32", _rounded(np.subtract))
define("mul.rn.f32", "f32", "f32 f32", _rounded(np.multiply))
define("div.rn.f32", "f32", "f32 f32", _rounded(np.divide))
define("sqrt.rn.f32", "f32", "f32", _rounded(np.sqrt))
define("fma.rn.f32", "f32", "f32 f32 f32", _rounded(fma))
define("neg.f32", "b32", "b32", lambda a: a ^ np.uint32(0x80000000))
define("abs.f32", "b32", "b32", lambda a: a & np.uint32(0x7FFFFFFF))

# ---- conversions ----------------------------------------------------------------------------------------------------


def _to_bfloat16(x):
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _to_float16(x):
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _pair(convert: Callable) -> Callable:
    """The first operand becomes the upper half."""
    return lambda high, low: (convert(high).astype(np.uint32) << np.uint32(16)) | convert(low)


def _to_s32(x):
    """Towards zero; what is out of range becomes its nearest, a NaN 0."""
    whole = np.where(np.isnan(x), 0, np.trunc(x.astype(np.float64)))
    return np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int32)


for _to in INTEGERS:
    for _from in INTEGERS:
        define(f"cvt.{_to}.{_from}", _to, _from, lambda a, d=DTYPES[_to]: a.astype(d), widens=True)
for _t in ("u32", "s32"):
    define(f"cvt.rn.f32.{_t}", "f32", _t, lambda a: a.astype(np.float32))
define("cvt.rzi.s32.f32", "s32", "f32", _to_s32)
define("cvt.f32.f16", "f32", "f16", lambda a: np.ascontiguousarray(a).view(np.float16).astype(np.float32))
define("cvt.rn.bf16.f32", "bf16", "f32", _to_bfloat16)
define("cvt.rn.f16.f32", "f16", "f32", _to_float16)
define("cvt.rn.bf16x2.f32", "b32", "f32 f32", _pair(_to_bfloat16))
define("cvt.rn.f16x2.f32", "b32", "f32 f32", _pair(_to_float16))
define("cvta.to.global.u64", "u64", "u64", lambda a: a)
