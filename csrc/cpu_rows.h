// Pieces of rows of weights: read as float32, rounded and written, in the order in which they lie. Plain loops that the
// compiler's vectoriser takes.
#pragma once
#include <type_traits>

#include "dtypes.h"
#include "lanes.h"

namespace esfast {

// Weights in memory: number i lies at p[i] (and low[i]).
template <class T>
struct Place {
    typename T::storage* p;
    uint16_t* low = nullptr;  // of SPLIT
};

template <class T>
ESFAST_FN void read_row(float* x, Place<T> from, int n) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, Split>) x[i] = T::load(from.p[i], from.low[i]);
        else x[i] = T::load(from.p[i]);
    }
}

// `random`: words for stochastic rounding, null for rounding to nearest.
template <class T>
ESFAST_FN void write_row(Place<T> to, const float* x, const uint32_t* random, int n) {
    if constexpr (std::is_same_v<T, Split>) {
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = T::canonical(x[i]);
            to.p[i] = T::high(bits), to.low[i] = T::low(bits);
        }
    } else if (random) {
#pragma omp simd
        for (int i = 0; i < n; ++i) to.p[i] = T::store(x[i], random[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) to.p[i] = T::store(x[i]);
    }
}

// Copies to memory that is not in the cache. An ordinary store reads a line of memory before it writes it; these
// stores bypass the cache and read nothing. The thread must end with a fence (module.cpp).
template <class S>
ESFAST_FN void stream_row(S* to, const S* from, int n) {
#if defined(__x86_64__)
    constexpr int LINE = 64 / int(sizeof(S));
    const int ahead = int((64 - reinterpret_cast<uintptr_t>(to) % 64) % 64 / sizeof(S));
    int i = ahead < n ? ahead : n;
    memcpy(to, from, size_t(i) * sizeof(S));
    for (; i + LINE <= n; i += LINE) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
        for (int k = i; k < i + LINE; k += LINE / 2)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k)));
#else
        for (int k = i; k < i + LINE; k += LINE / 4)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
#endif
    }
    memcpy(to + i, from + i, size_t(n - i) * sizeof(S));
#else
    memcpy(to, from, size_t(n) * sizeof(S));
#endif
}

// Weight decay: moves each of n weights by the fraction `decay` of its distance to `toward`.
ESFAST_FN void decay_row(float* x, const float* toward, float decay, int n) {
#pragma omp simd
    for (int i = 0; i < n; ++i) x[i] = fma_(decay, add_(toward[i], -x[i]), x[i]);
}

// One word per element for stochastic rounding: of elements number, number + 1, ... of the tensor.
template <int MOST>
ESFAST_FN void rounding_words(uint32_t* words, uint64_t seed, uint32_t tensor_id, int64_t number, int n) {
    constexpr int CHUNK = 64;  // at multiples of it, the low word of the block number can't carry inside one
    uint32_t all[MOST + 2 * CHUNK];
    const int64_t begin = number / CHUNK * CHUNK;
    for (int at = 0; begin + at < number + n; at += CHUNK) {
        uint32_t even[CHUNK / 2], odd[CHUNK / 2];
        pair_words<CHUNK / 4>(even, odd, seed, uint64_t(begin + at) / 4, tensor_id, STOCHASTIC_ROUNDING);
        for (int p = 0; p < CHUNK / 2; ++p) all[at + 2 * p] = even[p], all[at + 2 * p + 1] = odd[p];
    }
    memcpy(words, all + (number - begin), size_t(n) * sizeof(uint32_t));
}

}  // namespace esfast
