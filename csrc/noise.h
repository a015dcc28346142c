// The noise of esfast: one definition, host and device code at once.
//
//     noise(seed, tensor id, index) -> float32
//
// Only operations that IEEE 754 and two's complement fix to the bit are used: integer arithmetic, int-to-float
// conversion, bit reinterpretation, float add, mul and fma, each in the order written here. There is no libm and no
// special-function unit, so a CPU, Triton and CUDA agree in every bit. The build must not contract a mul and an add
// into an fma (-ffp-contract=off); CUDA gets that from the _rn intrinsics. The slow and obvious twin of this file is
// esfast/core/noise.py: change neither without the other, and neither without a new NOISE_VERSION.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define ESFAST_FN __host__ __device__ __forceinline__
#else
#define ESFAST_FN inline __attribute__((always_inline))
#endif

namespace esfast {

constexpr int NOISE_VERSION = 1;

// The fourth counter word: one domain per use, so that no two uses ever share a random number. Kinds of noise are told by
// it too. The table of all is USES in esfast/noise.py; LOW_RANK draws none of its own.
enum Domain : uint32_t { GAUSSIAN = 0, RADEMACHER = 1, STOCHASTIC_ROUNDING = 2, MEMBER_SEEDS = 3, LOW_RANK = 6 };

constexpr int GAUSSIANS_PER_BLOCK = 4;     // one Philox call gives four words: two Box-Muller pairs (and four to round with)
constexpr int SIGNS_PER_BLOCK = 128;       // or 128 bits: a sign each

struct Pair { float z0, z1; };

// ---- the only float operations, one rounding each ------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
ESFAST_FN float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ESFAST_FN float mul_(float a, float b) { return __fmul_rn(a, b); }
ESFAST_FN float add_(float a, float b) { return __fadd_rn(a, b); }
ESFAST_FN float div_(float a, float b) { return __fdiv_rn(a, b); }
ESFAST_FN float sqrt_(float a) { return __fsqrt_rn(a); }
ESFAST_FN float as_float(uint32_t x) { return __uint_as_float(x); }
ESFAST_FN uint32_t as_bits(float x) { return __float_as_uint(x); }
// One LOP3, where ptxas makes two of two masks that are constants.
ESFAST_FN uint32_t with_exponent(uint32_t x, uint32_t exponent) {
    uint32_t y;
    asm("lop3.b32 %0, %1, 0x7fffff, %2, 0xea;" : "=r"(y) : "r"(x), "r"(exponent));
    return y;
}
#else
ESFAST_FN float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
ESFAST_FN float mul_(float a, float b) { return a * b; }
ESFAST_FN float add_(float a, float b) { return a + b; }
ESFAST_FN float div_(float a, float b) { return a / b; }
ESFAST_FN float sqrt_(float a) { return __builtin_sqrtf(a); }
ESFAST_FN float as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
ESFAST_FN uint32_t as_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
ESFAST_FN uint32_t with_exponent(uint32_t x, uint32_t exponent) { return (x & 0x7fffffu) | exponent; }
#endif

// ---- bits: Philox4x32 (Salmon et al., SC'11) -----------------------------------------------------------------------

// Seven rounds are the fewest that pass BigCrush; ten would cost three more issue slots per number.
constexpr int PHILOX_ROUNDS = 7;

template <class U>
struct Words { U x0, x1, x2, x3; };

// One 64-bit product gives both halves: IMAD.WIDE on a GPU, pmuludq on a CPU.
ESFAST_FN uint64_t wide(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
#if defined(__CUDA_ARCH__)
// For a shift by 32 ptxas 13.0 adds a zero to the upper half of each product: 2.8 more instructions per weight.
ESFAST_FN uint32_t high(uint64_t product) {
    uint32_t x;
    asm("{.reg .u32 low; mov.b64 {low, %0}, %1;}" : "=r"(x) : "l"(product));
    return x;
}
#else
ESFAST_FN uint32_t high(uint64_t product) { return uint32_t(product >> 32); }
#endif
ESFAST_FN uint32_t low(uint64_t product) { return uint32_t(product); }

// U is uint32_t, or any type with ^, wide, high and low: several words at once (csrc/lanes.h).
template <class U>
ESFAST_FN Words<U> philox(uint64_t seed, Words<U> c) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const auto p0 = wide(c.x0, 0xD2511F53u);
        const auto p1 = wide(c.x2, 0xCD9E8D57u);
        c = {high(p1) ^ c.x1 ^ k0, low(p1), high(p0) ^ c.x3 ^ k1, low(p0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

ESFAST_FN Words<uint32_t> philox(uint64_t seed, uint64_t block, uint32_t tensor_id, uint32_t domain) {
    return philox(seed, Words<uint32_t>{uint32_t(block), uint32_t(block >> 32), tensor_id, domain});
}

// ---- gaussian: Box-Muller in portable arithmetic -------------------------------------------------------------------

constexpr float Q0 = -0.612627089f, Q1 = 0.370389313f, Q2 = -0.205763012f, Q3 = 0.0625898615f;
constexpr float LN = float(-2 * 0.69314718055994530942 / 8388608);
constexpr uint32_t MAGIC = 0x5f375000u;
constexpr float SA = 0.501085818f, SB = 0.37602824f;
constexpr float S0 = 1.57079351f, S1 = -0.645893872f, S2 = 0.0794344693f, S3 = -0.00433310214f;
constexpr float C0 = 0.999994874f, C1 = -1.23348641f, C2 = 0.252580702f, C3 = -0.0190958101f;

// sqrt(-2 ln(u / 2^32)), u = a | 1
ESFAST_FN float radius(uint32_t a) {
    const float u = float(a | 1u);
    const uint32_t bits = as_bits(u);
    const float e = float(int32_t(bits - 0x4f800000u));  // 2^23 log2(u / 2^32), log2 taken as linear between powers of 2
    const float f = add_(as_float(with_exponent(bits, 0x3f800000u)), -1.0f);
    const float q = fma_(fma_(fma_(Q3, f, Q2), f, Q1), f, Q0);  // what that leaves out, over f (1 - f)
    const float w = fma_(fma_(-f, f, f), q, mul_(e, LN));
    const float y = as_float(MAGIC - (as_bits(w) >> 1));         // 1 / sqrt(w) within 3.5 %
    const float s = mul_(w, y);
    const float d = fma_(-s, y, 1.0f);
    return fma_(mul_(s, d), fma_(SB, d, SA), s);
}

ESFAST_FN Pair gaussian_pair(uint32_t a, uint32_t b) {
    const float r = radius(a);
    const float h = add_(as_float(with_exponent(b, 0x40000000u)), -3.0f);  // quarter turns in [-1, 1)
    const float t = mul_(h, h);
    const float s = fma_(fma_(fma_(S3, t, S2), t, S1), t, S0);
    const float c = fma_(fma_(fma_(C3, t, C2), t, C1), t, C0);
    return {mul_(mul_(r, h), s), as_float(as_bits(mul_(r, c)) ^ (b & 0x80000000u))};
}

// ---- rademacher: bit i mod 32 of word i / 32 is the sign of number i of the block ----------------------------------

ESFAST_FN float with_sign(float x, uint32_t word, int bit) {
    return as_float(as_bits(x) ^ ((word << (31 - bit)) & 0x80000000u));
}

}  // namespace esfast
