// acc = acc + sum_j coeff_j noise(seed_j) for the weights of one thread: what differs between the kinds of noise.
#pragma once
#include "cuda_tile.cuh"

namespace esfast {

// The word with byte `place` in its lowest 8 bits; its upper bits are undefined. Of such a byte ptxas tests seven bits with one
// instruction (R2P). Of a whole word, also of one that is merely shifted, it tests most bits one by one.
ESFAST_FN uint32_t byte_of(uint32_t word, int place) {
#if defined(__CUDA_ARCH__)
    uint32_t byte;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(byte) : "r"(word), "r"(uint32_t(0x4440 + place)));
    return byte;
#else
    return word >> (8 * place);
#endif
}

// x - coeff where the bit of the word is set, else x + coeff: an addition under a predicate and one under its opposite, of
// which a thread carries out one. Both go through the float pipes, at full rate. A selection of coeff or -coeff and one
// addition would be as many instructions, but the selection (FSEL) goes through the integer pipe, which takes two cycles for
// each, and would be what an update waits for. As if and else in C++, nvcc 13.0 adds a move.
ESFAST_FN float add_signed(float x, float coeff, uint32_t word, int bit) {
    const uint32_t mask = 1u << bit;
#if defined(__CUDA_ARCH__)
    asm("{.reg .pred minus; .reg .u32 set; and.b32 set, %1, %2; setp.ne.u32 minus, set, 0;"
        "@minus sub.rn.f32 %0, %0, %3; @!minus add.rn.f32 %0, %0, %3;}"
        : "+f"(x) : "r"(word), "r"(mask), "f"(coeff));
    return x;
#else
    return word & mask ? x - coeff : x + coeff;
#endif
}

ESFAST_FN uint64_t seed_of(const CudaJob& job, int member) { return at<const uint64_t>(job.seeds + uint64_t(member) * 8); }
ESFAST_FN float coeff_of(const CudaJob& job, int member) { return at<const float>(job.coeffs + uint64_t(member) * 4); }

// Tried instead of Box-Muller: the inverse CDF by a table in shared memory, 16 linear pieces an octave. 16.4 instructions
// per weight and member, not 24.0; but 9.6 of them are for the integer pipe, which takes two cycles each, and bank
// conflicts stretch LDS.64 to 4.7 cycles (simulated), which four schedulers share: 19 cycles for 24, errors of 3e-4
// where 2e-4 are allowed, and nothing where memory is the limit. Not worth a second definition of the noise.
template <class Tile>
ESFAST_FN void add_gaussian(float* x, const Tile& tile, uint64_t seed, float coeff) {
    ESFAST_UNROLL
    for (int i = 0; i < Tile::Held::WEIGHTS; i += 4) {
        const int e = Tile::Held::offset(i / Tile::G) + i % Tile::G;
        const Words<uint32_t> w = tile.words(seed, e, GAUSSIANS_PER_BLOCK, GAUSSIAN);
        const Pair a = gaussian_pair(w.x0, w.x1), b = gaussian_pair(w.x2, w.x3);
        x[i] = fma_(coeff, a.z0, x[i]);
        x[i + 1] = fma_(coeff, a.z1, x[i + 1]);
        x[i + 2] = fma_(coeff, b.z0, x[i + 2]);
        x[i + 3] = fma_(coeff, b.z1, x[i + 3]);
    }
}

template <class Tile>
ESFAST_FN void add_rademacher(float* x, const Tile& tile, uint64_t seed, float coeff) {
    const Words<uint32_t> w = tile.words(seed, 0, SIGNS_PER_BLOCK, RADEMACHER);
    const uint32_t bit = tile.first % 32;  // of the thread's first sign in each word
    const uint32_t word[4] = {w.x0 >> bit, w.x1 >> bit, w.x2 >> bit, w.x3 >> bit};
    ESFAST_UNROLL
    for (int i = 0; i < Tile::Held::WEIGHTS; ++i) {
        const int e = Tile::Held::offset(i / Tile::G) + i % Tile::G;
        x[i] = add_signed(x[i], coeff, byte_of(word[e / 32], e % 32 / 8), e % 8);
    }
}

// The next member's seed is loaded before this one's noise is added: a warp would wait for it at the loop's head.
template <uint32_t KIND, class Tile>
ESFAST_FN void add_members(float* x, const Tile& tile, const CudaJob& job, int members) {
    uint64_t next = members > 0 ? seed_of(job, 0) : 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int j = 0; j < members; ++j) {
        const uint64_t seed = next;
        const float coeff = coeff_of(job, j);
        next = seed_of(job, j + 1 < members ? j + 1 : j);
        if constexpr (KIND == GAUSSIAN) add_gaussian(x, tile, seed, coeff);
        else add_rademacher(x, tile, seed, coeff);
    }
}

}  // namespace esfast
