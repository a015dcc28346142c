// Structs that cuda_module.cpp, the kernels' launches and the threads in cuda_kernel.cuh share.
#pragma once
#include <stdint.h>

#include <string>

#include "cpu.h"
#include "dtypes.h"

namespace esfast {

// Elements of a tile, which a block of threads takes.
constexpr int CUDA_TILE = 8192;
// Rows, and columns, of a tile of a matrix with low-rank noise.
constexpr int MATRIX_TILE = 128;

// esfast/core/backends/tiles.py makes these records. dst, src and anchor are the addresses of the tile's element 0. Elements
// outside [begin, end) may lie outside the tensor's memory, element 0 too.
struct alignas(16) TileRecord {
    uint64_t dst, src;
    int64_t start;  // number of element 0 in its whole tensor
    uint64_t span;  // tensor id << 32 | whole << 31 | end << 15 | begin
};

struct alignas(16) TileExtra {
    uint64_t anchor;  // 0: none
    int64_t flat;     // number of element 0 in the flat buffers
};

// A tile of a matrix: it begins at `row` and `column` of a segment. span: whole << 31 | aligned << 30 | vector << 29 | rows << 8 |
// columns that are there.
struct alignas(16) MatrixTile {
    int64_t segment, row, column;
    uint64_t span;
};

// One launch: all tiles of one pair of formats. Addresses are those of device memory.
struct CudaJob {
    uint64_t tiles, extras;   // extras: 0 where none of decay, low, m is there. Of LOW_RANK: matrix tiles, and none
    uint64_t segments;        // of LOW_RANK, else 0
    uint64_t seeds, coeffs;
    uint64_t low, m, v;       // flat buffers, 0 where there is none
    int32_t members;
    int32_t stochastic;       // rounding, from words of the first seed
    int32_t rank;             // of LOW_RANK, else 1
    float scale;              // 1 / sqrt(rank)
    float decay;              // 0: none
    float one_minus_beta1, one_minus_beta2, step, eps;
};

enum Rule {
    ONE,   // add one member (of rank 1), round to nearest: what perturbs is bound by memory, so it has a kernel without ballast
    ADD,   // any number of members, with weight decay and stochastic rounding where asked for
    ADAM,  // the same in place, and the sum is the gradient of a step of Adam
};

inline Rule rule_of(const CudaJob& job, int dst_format) {
    const bool rounds_stochastically = job.stochastic && (dst_format == BFLOAT16 || dst_format == FLOAT16);
    if (job.m) return ADAM;
    return job.members == 1 && job.rank == 1 && job.decay == 0 && !rounds_stochastically ? ONE : ADD;
}

struct CudaKernel {
    int src_format, dst_format, kind;
    Rule rule;
};

// Starts the kernel on a stream (a cudaStream_t) of a device and does not wait. Empty, or what went wrong.
std::string launch(const CudaKernel& kernel, const CudaJob& job, int64_t tiles, int device, uint64_t stream);

// The same for the kernel that copies weights of `size` bytes, 2 or 4, from src to dst of each record.
std::string launch_copy(int size, uint64_t records, int64_t tiles, int device, uint64_t stream);

// Why no kernel can run on this device (< 0: on any at all), or empty.
std::string unusable(int device);

}  // namespace esfast
