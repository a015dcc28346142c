// dst = round(src + sum_j coeff_j noise(seed_j)) on one tile. Compiled once per instruction set (setup.py passes
// ESFAST_ISA and the flags); the loops are plain so that the compiler's vectoriser can take them.
#include "cpu.h"
#include "dtypes.h"

#define ESFAST_JOIN_(a, b) a##b
#define ESFAST_JOIN(a, b) ESFAST_JOIN_(a, b)

namespace esfast {
namespace {

constexpr int BLOCKS = TILE / GAUSSIANS_PER_BLOCK;
constexpr int WORDS = TILE / 32;
constexpr int CHUNK = 16;  // blocks computed at once: a vector of AVX-512, two of AVX2; less would leave scalar tails

// The part of a tile that belongs to the row: elements [begin, end) of [0, TILE).
struct Span { int begin, end; };

// acc[k][b] is element 4 b + k: the four numbers of a block lie in four arrays, so every lane does the same work.
void add_gaussian(float (*acc)[BLOCKS], const Job& job, uint32_t tensor_id, uint64_t first_block, Span span) {
    const int begin = span.begin / (4 * CHUNK), end = (span.end + 4 * CHUNK - 1) / (4 * CHUNK);
    for (int64_t j = 0; j < job.member_count; ++j) {
        const uint64_t seed = job.seeds[j];
        const float coeff = job.coeffs[j];
        for (int chunk = begin; chunk < end; ++chunk) {
            float* const a0 = acc[0] + chunk * CHUNK;
            float* const a1 = acc[1] + chunk * CHUNK;
            float* const a2 = acc[2] + chunk * CHUNK;
            float* const a3 = acc[3] + chunk * CHUNK;
            // tiles are aligned, so the low word of the block number cannot carry inside one
            const uint32_t low = uint32_t(first_block) + uint32_t(chunk * CHUNK);
            const uint64_t high = first_block & 0xffffffff00000000u;
#pragma omp simd
            for (int b = 0; b < CHUNK; ++b) {
                const Words w = philox(seed, high | (low + uint32_t(b)), tensor_id, GAUSSIAN);
                const Pair p = gaussian_pair(w.x0, w.x1), q = gaussian_pair(w.x2, w.x3);
                a0[b] = fma_(coeff, p.z0, a0[b]);
                a1[b] = fma_(coeff, p.z1, a1[b]);
                a2[b] = fma_(coeff, q.z0, a2[b]);
                a3[b] = fma_(coeff, q.z1, a3[b]);
            }
        }
    }
}

void add_rademacher(float* acc, const Job& job, uint32_t tensor_id, uint64_t first_block, Span span) {
    for (int64_t j = 0; j < job.member_count; ++j) {
        uint32_t words[WORDS];
        for (int b = span.begin / SIGNS_PER_BLOCK; b < (span.end + SIGNS_PER_BLOCK - 1) / SIGNS_PER_BLOCK; ++b) {
            const Words w = philox(job.seeds[j], first_block + uint64_t(b), tensor_id, RADEMACHER);
            words[4 * b] = w.x0, words[4 * b + 1] = w.x1, words[4 * b + 2] = w.x2, words[4 * b + 3] = w.x3;
        }
        const float coeff = job.coeffs[j];
        for (int i = span.begin / 32; i < (span.end + 31) / 32; ++i) {
            float* const a = acc + 32 * i;
            const uint32_t word = words[i];
#pragma omp simd
            for (int bit = 0; bit < 32; ++bit) a[bit] = add_(a[bit], with_sign(coeff, word, bit));  // == fma(coeff, +-1, a)
        }
    }
}

void split(const float* flat, float (*acc)[BLOCKS]) {
    for (int b = 0; b < BLOCKS; ++b) {
        acc[0][b] = flat[4 * b];
        acc[1][b] = flat[4 * b + 1];
        acc[2][b] = flat[4 * b + 2];
        acc[3][b] = flat[4 * b + 3];
    }
}

void join(const float (*acc)[BLOCKS], float* flat) {
    for (int b = 0; b < BLOCKS; ++b) {
        flat[4 * b] = acc[0][b];
        flat[4 * b + 1] = acc[1][b];
        flat[4 * b + 2] = acc[2][b];
        flat[4 * b + 3] = acc[3][b];
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

    alignas(64) float flat[TILE];
    if (count == TILE) {  // the common case, with a trip count that the compiler knows: twice as fast at one member
        for (int i = 0; i < TILE; ++i) flat[i] = T::load(src[i]);
    } else {
        memset(flat, 0, sizeof(flat));
        for (int i = 0; i < count; ++i) flat[span.begin + i] = T::load(src[i]);
    }
    if (job.kind == GAUSSIAN) {
        alignas(64) float acc[GAUSSIANS_PER_BLOCK][BLOCKS];
        split(flat, acc);
        add_gaussian(acc, job, uint32_t(s.tensor_id), uint64_t(tile_start) / GAUSSIANS_PER_BLOCK, span);
        join(acc, flat);
    } else {
        add_rademacher(flat, job, uint32_t(s.tensor_id), uint64_t(tile_start) / SIGNS_PER_BLOCK, span);
    }
    if (count == TILE)
        for (int i = 0; i < TILE; ++i) dst[i] = T::store(flat[i]);
    else
        for (int i = 0; i < count; ++i) dst[i] = T::store(flat[span.begin + i]);
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
