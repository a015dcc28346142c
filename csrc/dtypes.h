// Weight types to float32 and back: round to nearest even, subnormals kept, any NaN stored as the quiet NaN.
// Integer code without branches, so that every compiler vectorises it and every machine gives the same bits.
#pragma once
#include "noise.h"

namespace esfast {

enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Float32 {
    using storage = uint32_t;
    static ESFAST_FN float load(uint32_t x) { return as_float(x); }
    static ESFAST_FN uint32_t store(float x) { return as_bits(x); }
};

struct BFloat16 {
    using storage = uint16_t;
    static ESFAST_FN float load(uint16_t x) { return as_float(uint32_t(x) << 16); }
    static ESFAST_FN uint16_t store(float x) {
        const uint32_t bits = as_bits(x);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
};

struct Float16 {
    using storage = uint16_t;
    static ESFAST_FN float load(uint16_t x) {
        // exponent and fraction moved into place, rebiased by an exact multiplication that also fixes subnormals
        const uint32_t magnitude = as_bits(mul_(as_float(uint32_t(x & 0x7fffu) << 13), as_float(0x77800000u)));
        const uint32_t inf_or_nan = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        return as_float(magnitude | inf_or_nan | (uint32_t(x & 0x8000u) << 16));
    }
    static ESFAST_FN uint16_t store(float x) {
        const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
        // adding 0.5 aligns the last place of a subnormal half with the last bit of a float
        const uint32_t subnormal = as_bits(add_(as_float(magnitude), 0.5f)) - 0x3f000000u;
        const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return uint16_t((magnitude >= 0x47800000u ? special : finite) | sign);
    }
};

}  // namespace esfast
