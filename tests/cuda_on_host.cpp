// The CUDA kernels on a CPU: csrc/cuda_kernel.cuh and cuda_copy.cuh, one thread of the grid after another. Built and called by test_cuda.py.
#include "cuda_copy.cuh"

using namespace esfast;

template <class Src, class Dst, uint32_t KIND, Rule RULE>
int grid(const CudaJob& job, int64_t tiles) {
    using T = Thread<Src, Dst, KIND, RULE>;
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int thread = 0; thread < T::Held::THREADS; ++thread) T(job, uint32_t(tile), uint32_t(thread)).run();
    return 0;
}

template <class Src, class Dst, uint32_t KIND>
int grid(const CudaJob& job, int64_t tiles, Rule rule) {
    if (rule == ONE) return grid<Src, Dst, KIND, ONE>(job, tiles);
    if (rule == ADD) return grid<Src, Dst, KIND, ADD>(job, tiles);
    if constexpr (std::is_same_v<Src, Dst>) return grid<Src, Dst, KIND, ADAM>(job, tiles);
    return 1;
}

template <class Src, class Dst>
int grid(const CudaJob& job, int64_t tiles, int kind, Rule rule) {
    return kind == GAUSSIAN ? grid<Src, Dst, GAUSSIAN>(job, tiles, rule) : grid<Src, Dst, RADEMACHER>(job, tiles, rule);
}

extern "C" int tile_size() { return CUDA_TILE; }

extern "C" int run_grid(int src_format, int dst_format, int kind, const CudaJob* job, int64_t tiles) {
    const Rule r = rule_of(*job, dst_format);
    switch (4 * src_format + dst_format) {
        case 4 * FLOAT32 + FLOAT32: return grid<Float32, Float32>(*job, tiles, kind, r);
        case 4 * FLOAT32 + BFLOAT16: return grid<Float32, BFloat16>(*job, tiles, kind, r);
        case 4 * FLOAT32 + FLOAT16: return grid<Float32, Float16>(*job, tiles, kind, r);
        case 4 * BFLOAT16 + BFLOAT16: return grid<BFloat16, BFloat16>(*job, tiles, kind, r);
        case 4 * FLOAT16 + FLOAT16: return grid<Float16, Float16>(*job, tiles, kind, r);
        case 4 * SPLIT + SPLIT: return grid<Split, Split>(*job, tiles, kind, r);
        case 4 * SPLIT + BFLOAT16: return grid<Split, BFloat16>(*job, tiles, kind, r);
        default: return 1;
    }
}

template <int SIZE>
void copy(uint64_t records, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int thread = 0; thread < CopyThread<SIZE>::THREADS; ++thread)
            CopyThread<SIZE>(records, uint32_t(tile), uint32_t(thread)).run();
}

extern "C" void copy_grid(int size, uint64_t records, int64_t tiles) { size == 4 ? copy<4>(records, tiles) : copy<2>(records, tiles); }
