// The CUDA kernels on a CPU: csrc/cuda_kernel.cuh and cuda_copy.cuh, one thread of the grid after another. Built and called by test_cuda.py.
#include <deque>

#include "cuda_copy.cuh"

using namespace esfast;

template <class Src, class Dst, uint32_t KIND, Rule RULE>
int grid(const CudaJob& job, int64_t tiles) {
    using T = Thread<Src, Dst, KIND, RULE>;
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int number = 0; number < T::Held::THREADS; ++number) {
            const T thread(job, uint32_t(tile), uint32_t(number));
            if (thread.has_nothing()) continue;
            float x[T::WEIGHTS];
            thread.begin(x);
            thread.add(x);
            thread.end(x);
        }
    return 0;
}

// From one barrier to the next, all threads of a block in turn.
template <class Src, class Dst, Rule RULE>
int matrix_grid(const CudaJob& job, int64_t tiles) {
    using T = Thread<Src, Dst, LOW_RANK, RULE>;
    struct Lane {
        T thread;
        Drawer<typename T::Tile, RULE> drawer;
        float x[T::WEIGHTS];
        Lane(const CudaJob& job, uint32_t tile, uint32_t number)
            : thread(job, tile, number), drawer(thread.tile, job, number) { thread.begin(x); }
    };
    for (int64_t tile = 0; tile < tiles; ++tile) {
        std::deque<Lane> lanes;
        for (int number = 0; number < T::Held::THREADS; ++number) lanes.emplace_back(job, uint32_t(tile), uint32_t(number));
        Factors<RULE> factors[2];
        const int turns = lanes[0].drawer.turns();
        for (int turn = 0; turn < turns; ++turn) {
            for (Lane& lane : lanes) lane.drawer.draw(factors[turn % 2]);
            for (size_t i = 0; i < lanes.size(); ++i)
                if (!lanes[i].thread.has_nothing()) add_factors<typename T::Tile>(lanes[i].x, factors[turn % 2], uint32_t(i));
        }
        for (Lane& lane : lanes)
            if (!lane.thread.has_nothing()) lane.thread.end(lane.x);
    }
    return 0;
}

template <class Src, class Dst>
int matrix_grid(const CudaJob& job, int64_t tiles, Rule rule) {
    if (rule == ONE) return matrix_grid<Src, Dst, ONE>(job, tiles);
    if (rule == ADD) return matrix_grid<Src, Dst, ADD>(job, tiles);
    if constexpr (std::is_same_v<Src, Dst>) return matrix_grid<Src, Dst, ADAM>(job, tiles);
    return 1;
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
    if (kind == LOW_RANK) return matrix_grid<Src, Dst>(job, tiles, rule);
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
