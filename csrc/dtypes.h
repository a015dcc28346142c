// Formats of weights: to float32 and back, rounded to nearest even or stochastically. Subnormals are kept, any NaN is
// stored as the quiet NaN. Integer code without branches, so that every compiler vectorises it and every machine gives
// the same bits.
#pragma once
#include "noise.h"

namespace esfast {

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, SPLIT = 3 };

// `random` is a word of the domain STOCHASTIC_ROUNDING; its upper 16 bits decide which neighbour a 16-bit weight gets:
// the upper one with the probability of what lies beyond the lower one, in units of their distance.

struct Float32 {
    using storage = uint32_t;
    static ESFAST_FN float load(uint32_t x) { return as_float(x); }
    static ESFAST_FN uint32_t store(float x) { return as_bits(x); }
    static ESFAST_FN uint32_t store(float x, uint32_t) { return as_bits(x); }  // nothing to round
};

struct BFloat16 {
    using storage = uint16_t;
    static ESFAST_FN float load(uint16_t x) { return as_float(uint32_t(x) << 16); }
    static ESFAST_FN uint16_t store(float x) { return with_nan(as_bits(x), as_bits(x) + 0x7fffu + ((as_bits(x) >> 16) & 1u)); }
    static ESFAST_FN uint16_t store(float x, uint32_t random) { return with_nan(as_bits(x), as_bits(x) + (random >> 16)); }
    static ESFAST_FN uint16_t with_nan(uint32_t bits, uint32_t carried) {
        return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : carried >> 16);
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
        const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
        // adding 0.5 aligns the last place of a subnormal half with the last bit of a float
        const uint32_t subnormal = as_bits(add_(as_float(magnitude), 0.5f)) - 0x3f000000u;
        return finish(as_bits(x), 0xfffu + ((magnitude >> 13) & 1u), subnormal);
    }
    static ESFAST_FN uint16_t store(float x, uint32_t random) {
        // a subnormal half in units of 2^-40, 16 bits below its last place; beyond its range the conversion is undefined
        const uint32_t magnitude = as_bits(x) & 0x7fffffffu, small = magnitude < SMALLEST_NORMAL ? magnitude : 0u;
        const uint32_t units = uint32_t(int32_t(mul_(as_float(small), as_float(0x53800000u))));
        return finish(as_bits(x), random >> 19, (units + (random >> 16)) >> 16);
    }

  private:
    static constexpr uint32_t SMALLEST_NORMAL = 0x38800000u;
    static ESFAST_FN uint16_t finish(uint32_t bits, uint32_t carry, uint32_t subnormal) {
        const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const uint32_t normal = (magnitude + 0xc8000000u + carry) >> 13;
        const uint32_t finite = magnitude < SMALLEST_NORMAL ? subnormal : normal;
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return uint16_t((magnitude >= 0x47800000u ? special : finite) | sign);
    }
};

// A float32 held as a bfloat16 and the 16 bits that this leaves out: x = high * 2^16 + low in its bits, low signed. The
// high half is x rounded to nearest, ties away from zero. (Ties to even can't be had: 65537 floats round to each even
// bfloat16, and 16 bits tell apart only 65536.)
struct Split {
    using storage = uint16_t;
    static ESFAST_FN float load(uint16_t high, uint16_t low) {
        return as_float((uint32_t(high) << 16) + uint32_t(int32_t(int16_t(low))));
    }
    static ESFAST_FN uint32_t canonical(float x) {  // a payload of ones would carry into the sign
        return (as_bits(x) & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : as_bits(x);
    }
    static ESFAST_FN uint16_t high(uint32_t canonical) { return uint16_t((canonical + 0x8000u) >> 16); }
    static ESFAST_FN uint16_t low(uint32_t canonical) { return uint16_t(canonical); }
};

}  // namespace esfast
