// Many Philox words at once, for the template in noise.h: each in the low half of a 64-bit lane, where pmuludq reads its
// factors and leaves the whole product. Upper halves hold leftovers that nothing reads, so `low` costs nothing. Left to
// itself g++ 12 keeps words in 32-bit lanes and shuffles around every multiplication: 1.8 times as slow (AVX-512).
#pragma once
#include "noise.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace esfast {

#if defined(__AVX512F__)
constexpr int LANES = 8;
#elif defined(__AVX2__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif

typedef uint64_t Vector __attribute__((vector_size(8 * LANES)));
struct Lanes { Vector v; };

ESFAST_FN Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
ESFAST_FN Lanes operator^(Lanes a, uint32_t b) { return {a.v ^ uint64_t(b)}; }
ESFAST_FN Lanes wide(Lanes a, uint32_t b) {
    const Vector factor = Vector{} + uint64_t(b);
#if defined(__AVX512F__)
    return {(Vector)_mm512_mul_epu32((__m512i)a.v, (__m512i)factor)};
#elif defined(__AVX2__)
    return {(Vector)_mm256_mul_epu32((__m256i)a.v, (__m256i)factor)};
#else
    return {(Vector)_mm_mul_epu32((__m128i)a.v, (__m128i)factor)};
#endif
}
ESFAST_FN Lanes high(Lanes product) { return {product.v >> 32}; }
ESFAST_FN Lanes low(Lanes product) { return product; }

ESFAST_FN void store_both(uint32_t* to, Lanes even, Lanes odd) {
    const Vector both = (even.v & 0xffffffffu) | (odd.v << 32);
    memcpy(to, &both, sizeof(both));
}

// For N blocks numbered first, first + 1, ... (no carry out of the low word) their words by pairs of elements: those of
// the even ones (radii), x0 and x2 of each block, and those of the odd ones (angles), x1 and x3.
template <int N>
ESFAST_FN void pair_words(uint32_t* even, uint32_t* odd, uint64_t seed, uint64_t first, uint32_t tensor_id,
                           Domain domain) {
    const Vector zero = {};
    Vector step;
    for (int i = 0; i < LANES; ++i) step[i] = uint64_t(i);
    for (int i = 0; i < N; i += LANES) {
        const Vector number = zero + uint64_t(uint32_t(first) + uint32_t(i)) + step;
        const Words<Lanes> w = philox(seed, Words<Lanes>{{number}, {zero + (first >> 32)}, {zero + uint64_t(tensor_id)},
                                                         {zero + uint64_t(domain)}});
        store_both(even + 2 * i, w.x0, w.x2);
        store_both(odd + 2 * i, w.x1, w.x3);
    }
}

}  // namespace esfast

#else

namespace esfast {

template <int N>
ESFAST_FN void pair_words(uint32_t* even, uint32_t* odd, uint64_t seed, uint64_t first, uint32_t tensor_id,
                           Domain domain) {
    for (int i = 0; i < N; ++i) {
        const Words<uint32_t> w = philox(seed, first + uint64_t(i), tensor_id, domain);
        even[2 * i] = w.x0, even[2 * i + 1] = w.x2;
        odd[2 * i] = w.x1, odd[2 * i + 1] = w.x3;
    }
}

}  // namespace esfast
#endif
