// dst = round(src + sum_j coeff_j noise(seed_j)) on one tile. Compiled once per instruction set (setup.py passes
// ESFAST_ISA and the flags); the loops are plain so that the compiler's vectoriser can take them.
#include "cpu.h"
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
            pair_words<CHUNK / 2>(radius_word, angle_word, job.seeds[j], first_block + uint64_t(chunk * CHUNK / 2), tensor_id);
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

template <class T, class storage = typename T::storage>
void load_all(Acc acc, const storage* src) {
    if constexpr (sizeof(storage) == 2) {
        for (int p = 0; p < PAIRS; ++p) {
            uint32_t both;
            memcpy(&both, src + 2 * p, 4);
            acc[0][p] = T::load(storage(both));
            acc[1][p] = T::load(storage(both >> 16));
        }
    } else {
        for (int p = 0; p < PAIRS; ++p) {
            acc[0][p] = T::load(src[2 * p]);
            acc[1][p] = T::load(src[2 * p + 1]);
        }
    }
}

template <class T, class storage = typename T::storage>
void store_all(storage* dst, Acc acc) {
    if constexpr (sizeof(storage) == 2) {
        for (int p = 0; p < PAIRS; ++p) {
            const uint32_t both = T::store(acc[0][p]) | uint32_t(T::store(acc[1][p])) << 16;
            memcpy(dst + 2 * p, &both, 4);
        }
    } else {
        for (int p = 0; p < PAIRS; ++p) {
            dst[2 * p] = T::store(acc[0][p]);
            dst[2 * p + 1] = T::store(acc[1][p]);
        }
    }
}

template <class T>
void run_row(const Job& job, const Segment& s, int64_t row, int64_t tile) {
    using storage = typename T::storage;
    const int64_t start = s.first + row * s.index_stride;          // number of the row's first element
    const int64_t tile_start = (start / TILE + tile) * TILE;       // number of the tile's first element
    const int64_t stop = start + s.cols;
    if (tile_start >= stop) return;
    const Span span = {int(start > tile_start ? start - tile_start : 0),
                       int(stop < tile_start + TILE ? stop - tile_start : TILE)};
    const int count = span.end - span.begin;
    const int64_t offset = tile_start + span.begin - start;
    const storage* const src = reinterpret_cast<const storage*>(s.src) + row * s.src_stride + offset;
    storage* const dst = reinterpret_cast<storage*>(s.dst) + row * s.dst_stride + offset;
    if (job.member_count == 0) {  // round(src) is src: the copy that restores
        memmove(dst, src, size_t(count) * sizeof(storage));
        return;
    }

    alignas(64) float acc[2][PAIRS];
    if (count == TILE) {
        load_all<T>(acc, src);
    } else {
        memset(acc, 0, sizeof(acc));
        for (int i = span.begin; i < span.end; ++i) acc[i & 1][i / 2] = T::load(src[i - span.begin]);
    }
    if (job.kind == GAUSSIAN) {
        add_gaussian(acc, job, uint32_t(s.tensor_id), uint64_t(tile_start) / GAUSSIANS_PER_BLOCK, span);
    } else {
        add_rademacher(acc, job, uint32_t(s.tensor_id), uint64_t(tile_start) / SIGNS_PER_BLOCK, span);
    }
    if (count == TILE) {
        store_all<T>(dst, acc);
    } else {
        for (int i = span.begin; i < span.end; ++i) dst[i - span.begin] = T::store(acc[i & 1][i / 2]);
    }
}

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
    const int64_t row = local / per_row, column = local % per_row;
    if (s.dtype == FLOAT32) run_row<Float32>(job, s, row, column);
    else if (s.dtype == BFLOAT16) run_row<BFloat16>(job, s, row, column);
    else run_row<Float16>(job, s, row, column);
}

}  // namespace esfast
