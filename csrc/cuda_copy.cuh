// dst = src for the weights of one thread, bit by bit: what restores a model from its base, in one launch for all tensors.
// A GPU and, one thread after another, a CPU (tests/cuda_on_host.cpp) run the same lines.
#pragma once
#include "cuda_kernel.cuh"

namespace esfast {

// SIZE: bytes of a weight. 256 threads hold 64 or 128 bytes each in registers, so that the 8 or 5 blocks of an SM keep at
// least 128 KiB on their way; 16 KiB would do at 3 TB/s and 700 ns.
template <int SIZE>
struct CopyThread {
    static constexpr int THREADS = 256, G = 16 / SIZE, GROUPS = CUDA_TILE / (THREADS * G);
    using Word = std::conditional_t<SIZE == 4, uint32_t, uint16_t>;

    uint64_t dst, src;  // of the thread's first element; its groups of G neighbours lie THREADS groups apart
    int begin, end;     // elements that are there, from the thread's first one on
    bool whole, aligned;

    ESFAST_FN CopyThread(uint64_t tiles, uint32_t tile, uint32_t thread) {
        const TileRecord record = at<const TileRecord>(tiles + uint64_t(tile) * sizeof(TileRecord));
        const uint32_t span = uint32_t(record.span), first = thread * G;
        dst = record.dst + first * SIZE;
        src = record.src + first * SIZE;
        begin = int(span & 0x7fff) - int(first);
        end = int(span >> 15 & 0xffff) - int(first);
        whole = int32_t(span) < 0;
        aligned = ((record.dst | record.src) & 15) == 0;
    }

    ESFAST_FN void run() const {
        if (whole) {
            Vector v[GROUPS];
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) v[i] = load_vector(src + offset(i) * SIZE);
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) store_vector(dst + offset(i) * SIZE, v[i]);
            return;
        }
        for (int i = 0; i < GROUPS; ++i) {
            const int e = offset(i);
            if (aligned && e >= begin && e + G <= end) {
                store_vector(dst + uint64_t(e) * SIZE, load_vector(src + uint64_t(e) * SIZE));
            } else {
                for (int k = e; k < e + G; ++k)
                    if (k >= begin && k < end) at<Word>(dst + uint64_t(k) * SIZE) = at<const Word>(src + uint64_t(k) * SIZE);
            }
        }
    }

  private:
    static ESFAST_FN constexpr int offset(int group) { return group * THREADS * G; }
};

}  // namespace esfast
