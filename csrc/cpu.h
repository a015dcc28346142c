// Shared by module.cpp and the kernels (cpu_kernel.cpp, compiled once per instruction set).
#pragma once
#include <stdint.h>

namespace esfast {

// One matrix of weights: rows of `cols` contiguous elements. Element (r, c) lies at dst + r * dst_stride + c, is
// computed from src + r * src_stride + c (and, with weight decay, from anchor + r * anchor_stride + c, where there is
// one), and has number first + r * index_stride + c in its whole tensor and number flat + r * cols + c in the plan's
// flat buffers. A plain tensor is one row. Strides and counts in elements. esfast/core/segments.py fills this table as rows
// of int64. The anchor is in dst's format, or bfloat16 if that is SPLIT.
struct Segment {
    int64_t dst, src, anchor, rows, cols, dst_stride, src_stride, anchor_stride, index_stride, first, flat, tensor_id;
    int64_t src_format, dst_format;
    // For a block of a matrix with low-rank noise: element (r, c) has number flat + r * flat_stride + c in the flat
    // buffers. Its factor q is a * b, where a is number a_first + q * a_step + r of the gaussian noise of tensor a_id, and
    // b is number b_first + q * b_step + c of that of tensor b_id. These six ids and numbers are 0 for all other segments.
    int64_t flat_stride, a_id, b_id, a_first, b_first, a_step, b_step;
};

// Work is cut at multiples of TILE of the element's number, never of its address: a Philox block then lies in one
// tile, whatever the slice, and 1024 floats stay in the first-level cache while all members pass over them.
constexpr int TILE = 1024;

// The update by Adam (Kingma and Ba, arXiv 1412.6980) with bias-corrected step and eps, if m is not null.
struct Adam {
    float *m, *v;  // flat buffers
    float one_minus_beta1, one_minus_beta2, step, eps;
};

struct Job {
    const Segment* segments;
    const int64_t* first_tile;  // per segment, and the total behind the last
    int64_t segment_count;
    const uint64_t* seeds;
    const float* coeffs;
    int64_t member_count;
    int64_t kind;     // Domain::GAUSSIAN, RADEMACHER or LOW_RANK
    bool stochastic;  // rounding, from words of seeds[0]
    bool streamed;    // where dst is not src it is written past the cache
    float decay;      // 0: none
    uint16_t* low;    // flat buffer of the low halves, of the side (or both) whose format is SPLIT
    Adam adam;
    int64_t rank = 1;   // of low-rank noise
    float scale = 1;    // 1 / sqrt(rank)
};

inline int64_t tiles_per_row(const Segment& s) { return (s.cols + TILE - 2) / TILE + 1; }  // at most, over all rows

// Low-rank noise takes matrices by blocks of so many rows and columns: each number of a factor that is drawn serves a row
// or a column of it.
constexpr int BLOCK_ROWS = 64, BLOCK_COLS = 256;

inline bool has_factors(const Segment& s) { return s.a_step != 0; }

inline int64_t tiles_of(const Segment& s) {
    if (!has_factors(s)) return s.rows * tiles_per_row(s);
    return ((s.rows + BLOCK_ROWS - 1) / BLOCK_ROWS) * ((s.cols + BLOCK_COLS - 1) / BLOCK_COLS);
}

using TileFunction = void (*)(const Job&, int64_t tile);

void tile_baseline(const Job&, int64_t tile);
void tile_avx2(const Job&, int64_t tile);
void tile_avx512(const Job&, int64_t tile);

// The tiles of segments that have factors (cpu_low_rank.cpp); `block` counts within the segment.
void block_baseline(const Job&, const Segment&, int64_t block);
void block_avx2(const Job&, const Segment&, int64_t block);
void block_avx512(const Job&, const Segment&, int64_t block);

}  // namespace esfast
