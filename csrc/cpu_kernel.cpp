// dst = round(src + sum_j coeff_j noise(seed_j)) on one tile, with weight decay and Adam where asked for. Compiled once per instruction set (setup.py passes
// ESFAST_ISA and the flags); the loops are plain so that the compiler's vectoriser can take them.
#include <type_traits>

#include "cpu.h"
#include "cpu_rows.h"
#include "dtypes.h"
#include "lanes.h"

#define ESFAST_JOIN_(a, b) a##b
#define ESFAST_JOIN(a, b) ESFAST_JOIN_(a, b)

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of 16-bit weights are read as one word, low half first");

namespace esfast {
namespace {

constexpr int PAIRS = TILE / 2;
constexpr int WORDS = TILE / 32;
constexpr int CHUNK = 32;  // pairs computed at once: two chains of AVX-512 Philox, which wait less; 16 and 64 are 10 % slower

// While members are added, even and odd elements lie apart: acc[k][p] is element 2 p + k. The two numbers of a
// Box-Muller pair then go to the same place of two arrays, and for 16-bit weights the parting is a shift and a mask that
// the conversion needs anyway. (Blocks of four in four arrays take 0.70 ns a weight instead of 0.62, for the shuffles.)
using Acc = float (*)[PAIRS];

// The part of a tile that belongs to the row: elements [begin, end) of [0, TILE).
struct Span { int begin, end; };

void add_gaussian(Acc acc, const Job& job, uint32_t tensor_id, uint64_t first_block, Span span) {
    const int begin = span.begin / (2 * CHUNK), end = (span.end + 2 * CHUNK - 1) / (2 * CHUNK);
    for (int64_t j = 0; j < job.member_count; ++j) {
        const float coeff = job.coeffs[j];
        for (int chunk = begin; chunk < end; ++chunk) {
            uint32_t radius_word[CHUNK], angle_word[CHUNK];
            // tiles are aligned, so the low word of the block number cannot carry inside one
            pair_words<CHUNK / 2>(radius_word, angle_word, job.seeds[j], first_block + uint64_t(chunk * CHUNK / 2), tensor_id,
                                  GAUSSIAN);
            float* const even = acc[0] + chunk * CHUNK;
            float* const odd = acc[1] + chunk * CHUNK;
#pragma omp simd
            for (int p = 0; p < CHUNK; ++p) {
                const Pair z = gaussian_pair(radius_word[p], angle_word[p]);
                even[p] = fma_(coeff, z.z0, even[p]);
                odd[p] = fma_(coeff, z.z1, odd[p]);
            }
        }
    }
}

void add_rademacher(Acc acc, const Job& job, uint32_t tensor_id, uint64_t first_block, Span span) {
    for (int64_t j = 0; j < job.member_count; ++j) {
        uint32_t words[WORDS];
        for (int b = span.begin / SIGNS_PER_BLOCK; b < (span.end + SIGNS_PER_BLOCK - 1) / SIGNS_PER_BLOCK; ++b) {
            const Words<uint32_t> w = philox(job.seeds[j], first_block + uint64_t(b), tensor_id, RADEMACHER);
            words[4 * b] = w.x0, words[4 * b + 1] = w.x1, words[4 * b + 2] = w.x2, words[4 * b + 3] = w.x3;
        }
        const float coeff = job.coeffs[j];
        for (int i = span.begin / 32; i < (span.end + 31) / 32; ++i) {
            const uint32_t word = words[i];
            float* const even = acc[0] + 16 * i;
            float* const odd = acc[1] + 16 * i;
#pragma omp simd
            for (int p = 0; p < 16; ++p) {  // an add of +-coeff is the fma with +-1
                even[p] = add_(even[p], with_sign(coeff, word, 2 * p));
                odd[p] = add_(odd[p], with_sign(coeff, word, 2 * p + 1));
            }
        }
    }
}

// The Place is that of element 0 of the tile, though only those of the span may be touched.
template <class T>
void read(Acc acc, Place<T> from, Span span) {
    constexpr bool SPLIT_PAIR = std::is_same_v<T, Split>;
    const auto one = [&](int i) {
        if constexpr (SPLIT_PAIR) return T::load(from.p[i], from.low[i]);
        else return T::load(from.p[i]);
    };
    if (span.end - span.begin < TILE) {
        memset(acc, 0, sizeof(float[2][PAIRS]));
        for (int i = span.begin; i < span.end; ++i) acc[i & 1][i / 2] = one(i);
    } else if constexpr (sizeof(*from.p) == 2) {
        for (int p = 0; p < PAIRS; ++p) {
            uint32_t both, low = 0;
            memcpy(&both, from.p + 2 * p, 4);
            if constexpr (SPLIT_PAIR) {
                memcpy(&low, from.low + 2 * p, 4);
                acc[0][p] = T::load(uint16_t(both), uint16_t(low));
                acc[1][p] = T::load(uint16_t(both >> 16), uint16_t(low >> 16));
            } else {
                acc[0][p] = T::load(uint16_t(both));
                acc[1][p] = T::load(uint16_t(both >> 16));
            }
        }
    } else {
        for (int p = 0; p < PAIRS; ++p) acc[0][p] = one(2 * p), acc[1][p] = one(2 * p + 1);
    }
}

using Random = uint32_t (*)[PAIRS];  // words for stochastic rounding, laid out as Acc

template <class T, bool STOCHASTIC>
void write_rounded(Place<T> to, Acc acc, Random random, Span span) {
    const auto rounded = [&](int k, int p) {
        if constexpr (STOCHASTIC) return T::store(acc[k][p], random[k][p]);
        else return T::store(acc[k][p]);
    };
    if (span.end - span.begin < TILE) {
        for (int i = span.begin; i < span.end; ++i) to.p[i] = rounded(i & 1, i / 2);
    } else if constexpr (sizeof(*to.p) == 2) {
        for (int p = 0; p < PAIRS; ++p) {
            const uint32_t both = rounded(0, p) | uint32_t(rounded(1, p)) << 16;
            memcpy(to.p + 2 * p, &both, 4);
        }
    } else {
        for (int p = 0; p < PAIRS; ++p) to.p[2 * p] = rounded(0, p), to.p[2 * p + 1] = rounded(1, p);
    }
}

template <class T>
void write(Place<T> to, Acc acc, Random random, Span span) {
    if (random) write_rounded<T, true>(to, acc, random, span);
    else write_rounded<T, false>(to, acc, random, span);
}

template <>
void write(Place<Split> to, Acc acc, Random, Span span) {
    for (int i = span.begin; i < span.end; ++i) {
        const uint32_t x = Split::canonical(acc[i & 1][i / 2]);
        to.p[i] = Split::high(x), to.low[i] = Split::low(x);
    }
}

// Copies a tile to memory that is 64-byte aligned and not in the cache. An ordinary store reads a line of memory before
// it writes it; these stores bypass the cache and read nothing. The thread must end with a fence (module.cpp).
template <class S>
void stream(S* to, const S* from) {
#if defined(__AVX512F__)
    for (int i = 0; i < TILE; i += 64 / int(sizeof(S)))
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
    for (int i = 0; i < TILE; i += 32 / int(sizeof(S)))
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__x86_64__)
    for (int i = 0; i < TILE; i += 16 / int(sizeof(S)))
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
    memcpy(to, from, TILE * sizeof(S));
#endif
}

// x += decay (anchor - x); without an anchor towards 0
void add_decay(Acc x, float decay, Acc anchor) {
    for (int k = 0; k < 2; ++k)
        for (int p = 0; p < PAIRS; ++p) x[k][p] = fma_(decay, add_(anchor[k][p], -x[k][p]), x[k][p]);
}

// x += step m / (sqrt(v) + eps) for the gradient g and the moments at m and v, which belong to the tile's element 0
void add_adam(Acc x, Acc g, const Adam& a, float* m, float* v, Span span) {
    for (int i = span.begin; i < span.end; ++i) {
        float& at = x[i & 1][i / 2];
        const float gradient = g[i & 1][i / 2];
        m[i] = fma_(a.one_minus_beta1, add_(gradient, -m[i]), m[i]);
        v[i] = fma_(a.one_minus_beta2, add_(mul_(gradient, gradient), -v[i]), v[i]);
        at = fma_(a.step, div_(m[i], add_(sqrt_(v[i]), a.eps)), at);
    }
}

template <class Src, class Dst>
void run_row(const Job& job, const Segment& s, int64_t row, int64_t tile) {
    using Anchor = std::conditional_t<std::is_same_v<Dst, Split>, BFloat16, Dst>;
    const int64_t start = s.first + row * s.index_stride;          // number of the row's first element
    const int64_t tile_start = (start / TILE + tile) * TILE;       // number of the tile's first element
    const int64_t stop = start + s.cols;
    if (tile_start >= stop) return;
    const Span span = {int(start > tile_start ? start - tile_start : 0),
                       int(stop < tile_start + TILE ? stop - tile_start : TILE)};
    const int64_t skipped = tile_start - start;  // < 0 if the tile begins before the row
    const int64_t flat = s.flat + row * s.cols + skipped;
    const auto place = [&](auto format, int64_t address, int64_t stride) {
        using T = decltype(format);
        return Place<T>{reinterpret_cast<typename T::storage*>(address) + row * stride + skipped, job.low + flat};
    };
    const Place<Src> src = place(Src{}, s.src, s.src_stride);
    const Place<Dst> dst = place(Dst{}, s.dst, s.dst_stride);
    const bool adam = job.adam.m != nullptr;
    const bool streamed = job.streamed && s.dst != s.src && span.end - span.begin == TILE &&
                          reinterpret_cast<uintptr_t>(dst.p) % 64 == 0;
    if constexpr (std::is_same_v<Src, Dst> && !std::is_same_v<Src, Split>) {
        if (job.member_count == 0 && job.decay == 0 && !adam) {  // round(src) is src: the copy that restores
            if (streamed) stream(dst.p, src.p);
            else memmove(dst.p + span.begin, src.p + span.begin, size_t(span.end - span.begin) * sizeof(*dst.p));
            return;
        }
    }

    alignas(64) float x[2][PAIRS], g[2][PAIRS];
    read(x, src, span);
    if (job.decay != 0) {
        if (s.anchor) read(g, place(Anchor{}, s.anchor, s.anchor_stride), span);
        else memset(g, 0, sizeof(g));
        add_decay(x, job.decay, g);
    }
    if (adam) memset(g, 0, sizeof(g));
    const Acc acc = adam ? g : x;
    if (job.kind != RADEMACHER) {  // vectors get gaussian noise where matrices get low-rank noise
        add_gaussian(acc, job, uint32_t(s.tensor_id), uint64_t(tile_start) / GAUSSIANS_PER_BLOCK, span);
    } else {
        add_rademacher(acc, job, uint32_t(s.tensor_id), uint64_t(tile_start) / SIGNS_PER_BLOCK, span);
    }
    if (adam) add_adam(x, g, job.adam, job.adam.m + flat, job.adam.v + flat, span);
    alignas(64) typename Dst::storage staged[TILE];
    const Place<Dst> to = streamed ? Place<Dst>{staged, dst.low} : dst;
    if (job.stochastic && job.member_count > 0) {
        uint32_t random[2][PAIRS];
        pair_words<PAIRS / 2>(random[0], random[1], job.seeds[0], uint64_t(tile_start) / 4, uint32_t(s.tensor_id),
                              STOCHASTIC_ROUNDING);
        write(to, x, random, span);
    } else {
        write(to, x, nullptr, span);
    }
    if (streamed) stream(dst.p, staged);
}

using RowFunction = void (*)(const Job&, const Segment&, int64_t row, int64_t tile);

// [source format][destination format]; ops.py sees to it that only these are asked for
constexpr RowFunction ROWS[4][4] = {
    {run_row<Float32, Float32>, run_row<Float32, BFloat16>, run_row<Float32, Float16>, nullptr},
    {nullptr, run_row<BFloat16, BFloat16>, nullptr, nullptr},
    {nullptr, nullptr, run_row<Float16, Float16>, nullptr},
    {nullptr, run_row<Split, BFloat16>, nullptr, run_row<Split, Split>},
};

}  // namespace

void ESFAST_JOIN(tile_, ESFAST_ISA)(const Job& job, int64_t tile) {
    int64_t low = 0, high = job.segment_count - 1;  // the last segment whose first tile is not behind this one
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (job.first_tile[middle] <= tile) low = middle;
        else high = middle - 1;
    }
    const Segment& s = job.segments[low];
    const int64_t per_row = tiles_per_row(s), local = tile - job.first_tile[low];
    if (has_factors(s)) return ESFAST_JOIN(block_, ESFAST_ISA)(job, s, local);
    const int64_t row = local / per_row, column = local % per_row;
    ROWS[s.src_format][s.dst_format](job, s, row, column);
}

}  // namespace esfast
