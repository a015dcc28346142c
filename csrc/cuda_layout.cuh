// Which weights of a tile a thread of the CUDA kernels holds, and which of them are there.
#pragma once
#include "cuda_job.h"
#include "cuda_memory.cuh"

namespace esfast {

// Groups of G neighbours. Neighbouring threads hold neighbouring groups, and the elements of a warp lie together, so that
// where only a part of a tile is there (a row of a shard) most of the other warps have nothing to do.
//
// Instructions per weight and member on sm_90, bf16, for so many weights a thread:
//     gaussian     16: 25.7   32: 24.0   a key schedule, 14 additions, is paid once a thread and member
//     rademacher   32: 4.3   64: 3.0   128: 2.8   one Philox call and its schedule, for threads that share a block of 128
// Adam holds a gradient beside the weights, and would spill with 128. What perturbs with rademacher noise waits for memory:
// there 32 weights leave more threads to wait.
template <uint32_t KIND, Rule RULE, int G>
struct Layout {
    static constexpr int WEIGHTS = KIND == GAUSSIAN || RULE == ONE ? 32 : RULE == ADD ? 128 : 64;
    static constexpr int THREADS = CUDA_TILE / WEIGHTS;
    static constexpr int COLS = CUDA_TILE;  // a tile is one row
    static constexpr int SHARERS = SIGNS_PER_BLOCK / WEIGHTS;  // threads of one Rademacher block,
    static constexpr int PER_WORD = 32 / (SHARERS * G);        // and the groups of each in one of its four words

    // Number of the thread's first element in the tile, and of a group's from there on.
    static ESFAST_FN uint32_t first(uint32_t thread) {
        if constexpr (KIND == GAUSSIAN) return thread / 32 * (32 * WEIGHTS) + thread % 32 * G;
        else return thread / SHARERS * SIGNS_PER_BLOCK + thread % SHARERS * G;
    }
    static ESFAST_FN constexpr int offset(int group) {
        if constexpr (KIND == GAUSSIAN) return group * (32 * G);
        else return group / PER_WORD * 32 + group % PER_WORD * (SHARERS * G);
    }
};

// Low-rank noise: 128 rows of 128 columns of a matrix, of which a thread holds 8 columns of TALL rows. Element (row, column)
// has the number row * COLS + column. So a thread reads 8 + TALL factors from shared memory for 8 TALL weights:
// instructions per weight and member for 8 rows 1.9, for 16 rows 1.6 (bf16, sm_90). What perturbs waits for memory, and
// Adam holds more than a sum for each weight: 8 rows leave more threads to wait, and registers.
template <Rule RULE, int G>
struct Layout<LOW_RANK, RULE, G> {
    static constexpr int COLS = MATRIX_TILE, ACROSS = COLS / 8, TALL = RULE == ADD ? 16 : 8;
    static constexpr int WEIGHTS = 8 * TALL, THREADS = MATRIX_TILE * COLS / WEIGHTS;

    static ESFAST_FN uint32_t first(uint32_t thread) { return thread / ACROSS * (TALL * COLS) + thread % ACROSS * G; }
    // In a row one group of 8, or two of 4 that lie half a row apart: then too neighbours hold what lies side by side.
    static ESFAST_FN constexpr int offset(int group) { return group / (8 / G) * COLS + group % (8 / G) * (COLS / 2); }
};

// Elements that are there, counted from the thread's first one.
struct Range {
    int begin, end;
    ESFAST_FN bool holds(int e) const { return e >= begin && e < end; }
    ESFAST_FN bool holds_group(int e, int size) const { return e >= begin && e + size <= end; }
    ESFAST_FN bool is_empty(int past_last) const { return end <= 0 || past_last <= begin; }
};

// The same of a matrix of rows of COLS.
template <int COLS>
struct Rectangle {
    int rows, cols;
    ESFAST_FN bool holds(int e) const { return e / COLS < rows && e % COLS < cols; }
    ESFAST_FN bool holds_group(int e, int size) const { return e / COLS < rows && e % COLS + size <= cols; }
    ESFAST_FN bool is_empty(int) const { return rows <= 0 || cols <= 0; }
};

}  // namespace esfast
