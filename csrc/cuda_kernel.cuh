// dst = round(src + sum_j coeff_j noise(seed_j)) for the weights of one thread, with weight decay and Adam where asked for.
// A GPU and, one thread after another, a CPU (tests/cuda_on_host.cpp) run the same lines.
#pragma once
#include "cuda_low_rank.cuh"

namespace esfast {

// What is summed lies in an array of the caller's: `begin` fills it, the noise is added to it, `end` writes what comes of it.
template <class Src, class Dst, uint32_t KIND, Rule RULE>
struct Thread {
    using Tile = esfast::Tile<Src, Dst, KIND, RULE>;
    using Held = typename Tile::Held;
    static constexpr int G = Tile::G, WEIGHTS = Held::WEIGHTS, GROUPS = WEIGHTS / G;

    const CudaJob& job;
    Tile tile;

    ESFAST_FN Thread(const CudaJob& job, uint32_t number, uint32_t thread) : job(job), tile(job, number, thread) {}

    // Warps of a partial tile that have no weights return by this.
    ESFAST_FN bool has_nothing() const { return !tile.whole && tile.span.is_empty(offset(GROUPS - 1) + G); }

    ESFAST_FN void begin(float* x) const {
        if constexpr (RULE == ADAM) {  // a gradient
            ESFAST_UNROLL
            for (int i = 0; i < WEIGHTS; ++i) x[i] = 0;
            return;
        }
        // Two copies of the accesses: asking again for each group takes an instruction per weight.
        if (tile.whole) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) read(x + i * G, tile.src, offset(i), true);
        } else {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) read(x + i * G, tile.src, offset(i), is_inside(offset(i)));
        }
        if (RULE != ONE && job.decay != 0) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) decay(x + i * G, offset(i), tile.whole || is_inside(offset(i)));
        }
    }

    // Of the kinds whose noise a thread draws for itself.
    ESFAST_FN void add(float* x) const { add_members<KIND>(x, tile, job, RULE == ONE ? 1 : job.members); }

    ESFAST_FN void end(float* x) const {
        if constexpr (RULE == ADAM) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) {
                float weights[G];
                const bool together = tile.whole || is_inside(offset(i));
                read(weights, tile.src, offset(i), together);
                if (job.decay != 0) decay(weights, offset(i), together);
                step(weights, x + i * G, offset(i), together);
                if (!CAN_BE_STOCHASTIC || !job.stochastic) write(weights, offset(i), together);
                else if (tile.rounds_quads()) write_stochastic<true>(weights, offset(i), together);
                else write_stochastic<false>(weights, offset(i), together);
            }
        } else if (CAN_BE_STOCHASTIC && job.stochastic && tile.rounds_quads()) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) write_stochastic<true>(x + i * G, offset(i), tile.whole || is_inside(offset(i)));
        } else if (CAN_BE_STOCHASTIC && job.stochastic) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) write_stochastic<false>(x + i * G, offset(i), is_inside(offset(i)));
        } else if (tile.whole) {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) write(x + i * G, offset(i), true);
        } else {
            ESFAST_UNROLL
            for (int i = 0; i < GROUPS; ++i) write(x + i * G, offset(i), is_inside(offset(i)));
        }
    }

  private:
    static constexpr bool CAN_BE_STOCHASTIC = RULE != ONE && (std::is_same_v<Dst, BFloat16> || std::is_same_v<Dst, Float16>);

    static ESFAST_FN constexpr int offset(int group) { return Held::offset(group); }
    ESFAST_FN bool is_inside(int e) const { return tile.aligned && tile.span.holds_group(e, G); }

    template <class T>
    ESFAST_FN void read(float* x, Place<T, Held::COLS> from, int e, bool together) const {
        if (together) {
            load_group<G>(x, from, e);
        } else {
            ESFAST_UNROLL
            for (int k = 0; k < G; ++k) x[k] = tile.span.holds(e + k) ? load_one(from, e + k) : 0.0f;
        }
    }

    template <bool STOCHASTIC, class T>
    ESFAST_FN void write_rounded(Place<T, Held::COLS> to, const float* x, const uint32_t* random, int e, bool together) const {
        if (together) {
            store_group<G, STOCHASTIC>(to, e, x, random);
        } else {
            ESFAST_UNROLL
            for (int k = 0; k < G; ++k)
                if (tile.span.holds(e + k)) store_one<STOCHASTIC>(to, e + k, x[k], STOCHASTIC ? random[k] : 0);
        }
    }

    ESFAST_FN void write(const float* x, int e, bool together) const {
        write_rounded<false>(tile.dst, x, nullptr, e, together);
    }

    template <bool QUADS>
    ESFAST_FN void write_stochastic(const float* x, int e, bool together) const {
        uint32_t random[G];
        ESFAST_UNROLL
        for (int k = 0; k < G; k += 4) {
            const Words<uint32_t> w = tile.template rounding_words<QUADS>(seed_of(job, 0), e + k);
            random[k] = w.x0, random[k + 1] = w.x1, random[k + 2] = w.x2, random[k + 3] = w.x3;
        }
        write_rounded<true>(tile.dst, x, random, e, together);
    }

    // x += decay (anchor - x); without an anchor towards 0
    ESFAST_FN void decay(float* x, int e, bool together) const {
        float toward[G];
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) toward[k] = 0;
        if (tile.anchor.address) read(toward, tile.anchor, e, together);
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) x[k] = fma_(job.decay, add_(toward[k], -x[k]), x[k]);
    }

    // x += step m / (sqrt(v) + eps) for the gradient g
    ESFAST_FN void step(float* x, const float* g, int e, bool together) const {
        float m[G], v[G];
        read(m, tile.m, e, together);
        read(v, tile.v, e, together);
        ESFAST_UNROLL
        for (int k = 0; k < G; ++k) {
            m[k] = fma_(job.one_minus_beta1, add_(g[k], -m[k]), m[k]);
            v[k] = fma_(job.one_minus_beta2, add_(mul_(g[k], g[k]), -v[k]), v[k]);
            x[k] = fma_(job.step, div_(m[k], add_(sqrt_(v[k]), job.eps)), x[k]);
        }
        write_rounded<false>(tile.m, m, nullptr, e, together);
        write_rounded<false>(tile.v, v, nullptr, e, together);
    }
};

}  // namespace esfast
