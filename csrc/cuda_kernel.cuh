// dst = round(src + sum_j coeff_j noise(seed_j)) for the weights of one thread, with weight decay and Adam where asked for.
// A GPU and, one thread after another, a CPU (tests/cuda_on_host.cpp) run the same lines.
#pragma once
#include "cuda_job.h"
#include "cuda_memory.cuh"

namespace esfast {

// ---- which weights a thread holds ----------------------------------------------------------------------------------

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

struct Span { int begin, end; };  // elements that are there

// A byte of a word, in the lowest 8 bits; above them may be anything. From such a byte ptxas moves seven bits to predicates at
// once (R2P); of a whole word it tests most bits one by one, as it also does of a word that is merely shifted.
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

// ---- one thread ----------------------------------------------------------------------------------------------------

template <class Src, class Dst, uint32_t KIND, Rule RULE>
struct Thread {
    static constexpr int G = sizeof(typename Src::storage) == 4 && sizeof(typename Dst::storage) == 4 ? 4 : 8;
    using Held = Layout<KIND, RULE, G>;
    using Anchor = std::conditional_t<std::is_same_v<Dst, Split>, BFloat16, Dst>;
    static constexpr int WEIGHTS = Held::WEIGHTS, GROUPS = WEIGHTS / G;

    static constexpr bool READS_EXTRAS = RULE != ONE || std::is_same_v<Src, Split> || std::is_same_v<Dst, Split>;

    // All from the thread's first element on: groups then lie at distances that the compiler knows.
    const CudaJob& job;
    uint32_t first;
    uint64_t number;  // in its whole tensor
    uint32_t tensor_id;
    Span span;
    bool whole, aligned;
    Place<Src> src;
    Place<Dst> dst;
    Place<Anchor> anchor;
    uint64_t flat;  // number in the flat buffers

    ESFAST_FN Thread(const CudaJob& job, uint32_t tile, uint32_t thread) : job(job), first(Held::first(thread)) {
        const TileRecord record = at<const TileRecord>(job.tiles + uint64_t(tile) * sizeof(TileRecord));
        TileExtra extra = {0, 0};
        if (READS_EXTRAS && job.extras) extra = at<const TileExtra>(job.extras + uint64_t(tile) * sizeof(TileExtra));
        number = uint64_t(record.start) + first;
        tensor_id = uint32_t(record.span >> 32);
        span = {int(uint32_t(record.span) & 0x7fff) - int(first), int(uint32_t(record.span) >> 15 & 0xffff) - int(first)};
        whole = int32_t(uint32_t(record.span)) < 0;
        aligned = ((record.dst | record.src | extra.anchor | uint64_t(extra.flat) * 2) & 15) == 0;
        flat = uint64_t(extra.flat) + first;
        src = {src.address_of(record.src, first), job.low + flat * 2};
        dst = {dst.address_of(record.dst, first), job.low + flat * 2};
        anchor = {extra.anchor ? anchor.address_of(extra.anchor, first) : 0, 0};
    }

    ESFAST_FN void run() const {
        // so that a tile that is there in part keeps only the warps that it needs
        if (!whole && (span.end <= 0 || offset(GROUPS - 1) + G <= span.begin)) return;
        if constexpr (RULE == ADAM) {
            float g[WEIGHTS];
            ESFAST_UNROLL
            for (int i = 0; i < WEIGHTS; ++i) g[i] = 0;
            add_members(g);
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) {
                float x[G];
                const bool together = whole || is_inside(offset(i));
                read(x, src, offset(i), together);
                if (job.decay != 0) decay(x, offset(i), together);
                step(x, g + i * G, offset(i), together);
                if (CAN_BE_STOCHASTIC && job.stochastic) write_stochastic(x, offset(i), together);
                else write(x, offset(i), together);
            }
        } else {
            float x[WEIGHTS];
            // Two copies of the accesses: asking again for each group takes an instruction per weight.
            if (whole) {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) read(x + i * G, src, offset(i), true);
            } else {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) read(x + i * G, src, offset(i), is_inside(offset(i)));
            }
            if (RULE != ONE && job.decay != 0) {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) decay(x + i * G, offset(i), whole || is_inside(offset(i)));
            }
            add_members(x);
            if (CAN_BE_STOCHASTIC && job.stochastic) {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) write_stochastic(x + i * G, offset(i), whole || is_inside(offset(i)));
            } else if (whole) {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) write(x + i * G, offset(i), true);
            } else {
                ESFAST_UNROLL
                for (int i = 0; i < GROUPS; ++i) write(x + i * G, offset(i), is_inside(offset(i)));
            }
        }
    }

  private:
    static ESFAST_FN constexpr int offset(int group) { return Held::offset(group); }
    ESFAST_FN bool holds(int e) const { return e >= span.begin && e < span.end; }
    ESFAST_FN bool is_inside(int e) const { return aligned && e >= span.begin && e + G <= span.end; }

    template <class T>
    ESFAST_FN void read(float* x, Place<T> from, int e, bool together) const {
        if (together) {
            load_group<G>(x, from, e);
        } else {
            ESFAST_UNROLL
            for (int k = 0; k < G; ++k) x[k] = holds(e + k) ? load_one(from, e + k) : 0.0f;
        }
    }

    template <bool STOCHASTIC, class T>
    ESFAST_FN void write_rounded(Place<T> to, const float* x, const uint32_t* random, int e, bool together) const {
        if (together) {
            store_group<G, STOCHASTIC>(to, e, x, random);
        } else {
            ESFAST_UNROLL
            for (int k = 0; k < G; ++k)
                if (holds(e + k)) store_one<STOCHASTIC>(to, e + k, x[k], STOCHASTIC ? random[k] : 0);
        }
    }

    static constexpr bool CAN_BE_STOCHASTIC = RULE != ONE && (std::is_same_v<Dst, BFloat16> || std::is_same_v<Dst, Float16>);

    ESFAST_FN void write(const float* x, int e, bool together) const { write_rounded<false>(dst, x, nullptr, e, together); }

    ESFAST_FN void write_stochastic(const float* x, int e, bool together) const {
        uint32_t random[G];
        ESFAST_UNROLL
        for (int k = 0; k < G; k += 4) {
            const Words<uint32_t> w = words(at<const uint64_t>(job.seeds), e + k, 4, STOCHASTIC_ROUNDING);
            random[k] = w.x0, random[k + 1] = w.x1, random[k + 2] = w.x2, random[k + 3] = w.x3;
        }
        write_rounded<true>(dst, x, random, e, together);
    }

    // Of the block that element e is in. Tiles are aligned: the low word of a block's number can't carry within one.
    ESFAST_FN Words<uint32_t> words(uint64_t seed, int e, int per_block, uint32_t domain) const {
        const uint64_t block = number / uint32_t(per_block);
        return philox(seed, Words<uint32_t>{uint32_t(block) + uint32_t(e / per_block), uint32_t(block >> 32), tensor_id, domain});
    }

    // x += decay (anchor - x); without an anchor towards 0
    ESFAST_FN void decay(float* x, int e, bool together) const {
        float toward[G];
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) toward[k] = 0;
        if (anchor.address) read(toward, anchor, e, together);
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) x[k] = fma_(job.decay, add_(toward[k], -x[k]), x[k]);
    }

    // x += step m / (sqrt(v) + eps) for the gradient g
    ESFAST_FN void step(float* x, const float* g, int e, bool together) const {
        const Place<Float32> at_m = {job.m + flat * 4, 0}, at_v = {job.v + flat * 4, 0};
        float m[G], v[G];
        read(m, at_m, e, together);
        read(v, at_v, e, together);
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) {
            m[k] = fma_(job.one_minus_beta1, add_(g[k], -m[k]), m[k]);
            v[k] = fma_(job.one_minus_beta2, add_(mul_(g[k], g[k]), -v[k]), v[k]);
            x[k] = fma_(job.step, div_(m[k], add_(sqrt_(v[k]), job.eps)), x[k]);
        }
        write_rounded<false>(at_m, m, nullptr, e, together);
        write_rounded<false>(at_v, v, nullptr, e, together);
    }

    // The next member's seed is loaded before this one's noise is added: a warp would wait for it at the loop's head.
    ESFAST_FN void add_members(float* x) const {
        const int members = RULE == ONE ? 1 : job.members;
        uint64_t next = members > 0 ? seed_of(0) : 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
        for (int j = 0; j < members; ++j) {
            const uint64_t seed = next;
            const float coeff = at<const float>(job.coeffs + uint64_t(j) * 4);
            next = seed_of(j + 1 < members ? j + 1 : j);
            if constexpr (KIND == GAUSSIAN) add_gaussian(x, seed, coeff);
            else add_rademacher(x, seed, coeff);
        }
    }

    ESFAST_FN uint64_t seed_of(int member) const { return at<const uint64_t>(job.seeds + uint64_t(member) * 8); }

    // Tried instead of Box-Muller: the inverse CDF by a table in shared memory, 16 linear pieces an octave. 16.4 instructions
    // per weight and member, not 24.0; but 9.6 of them are for the integer pipe, which takes two cycles each, and bank
    // conflicts stretch LDS.64 to 4.7 cycles (simulated), which four schedulers share: 19 cycles for 24, errors of 3e-4
    // where 2e-4 are allowed, and nothing where memory is the limit. Not worth a second definition of the noise.
    ESFAST_FN void add_gaussian(float* x, uint64_t seed, float coeff) const {
        ESFAST_UNROLL
        for (int i = 0; i < WEIGHTS; i += 4) {
            const Words<uint32_t> w = words(seed, offset(i / G) + i % G, GAUSSIANS_PER_BLOCK, GAUSSIAN);
            const Pair a = gaussian_pair(w.x0, w.x1), b = gaussian_pair(w.x2, w.x3);
            x[i] = fma_(coeff, a.z0, x[i]);
            x[i + 1] = fma_(coeff, a.z1, x[i + 1]);
            x[i + 2] = fma_(coeff, b.z0, x[i + 2]);
            x[i + 3] = fma_(coeff, b.z1, x[i + 3]);
        }
    }

    ESFAST_FN void add_rademacher(float* x, uint64_t seed, float coeff) const {
        const Words<uint32_t> w = words(seed, 0, SIGNS_PER_BLOCK, RADEMACHER);
        const uint32_t bit = first % 32;  // of the thread's first sign in each word
        const uint32_t word[4] = {w.x0 >> bit, w.x1 >> bit, w.x2 >> bit, w.x3 >> bit};
        ESFAST_UNROLL
        for (int i = 0; i < WEIGHTS; ++i) {
            const int e = offset(i / G) + i % G;
            x[i] = add_signed(x[i], coeff, byte_of(word[e / 32], e % 32 / 8), e % 8);
        }
    }
};

}  // namespace esfast
