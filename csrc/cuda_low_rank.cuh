// Low-rank noise: for member j and factor q in order, acc = fma(round(c_j A_jq[row]), B_jq[column], acc).
//
// All threads of a block draw the factors of the tile's rows and columns into shared memory, each a quad of numbers, and then
// add them to their weights. A row's factors serve 128 weights, and so do a column's: drawing costs 0.4 instructions per weight
// and member, where the fma costs 1. Several members and factors, the slots of a turn, are drawn at once, so that all lanes
// have a quad to draw. Two buffers take turns: a block waits once a turn.
#pragma once
#include "cuda_noise.cuh"

namespace esfast {

template <Rule RULE>
struct alignas(16) Factors {
    static constexpr int SLOTS = RULE == ONE ? 1 : 4;
    float a[SLOTS][MATRIX_TILE], b[SLOTS][MATRIX_TILE];
};

// What a thread draws: it has one slot of each turn. `step`: from turn to turn.
template <class Tile, Rule RULE>
struct Drawer {
    static constexpr int SLOTS = Factors<RULE>::SLOTS, LANES = Tile::Held::THREADS / SLOTS, QUADS = MATRIX_TILE / 4;

    const Tile& tile;
    const CudaJob& job;
    int lane, own, slot, slots, rank, member, q, member_step, q_step;
    uint64_t seed;
    float c;

    ESFAST_FN Drawer(const Tile& tile, const CudaJob& job, uint32_t thread)
        : tile(tile), job(job), lane(int(thread % LANES)), own(int(thread / LANES)), slot(own) {
        rank = tile.is_vector || RULE == ONE ? 1 : job.rank;
        slots = (RULE == ONE ? 1 : job.members) * rank;
        member = slot / rank, q = slot % rank;
        member_step = SLOTS / rank, q_step = SLOTS % rank;
        read_member();
    }

    ESFAST_FN int turns() const { return (slots + SLOTS - 1) / SLOTS; }

    // Draws one turn's factors of this slot, and reads what the next one will need: a warp would wait for it there.
    ESFAST_FN void draw(Factors<RULE>& to) {
        float* const a = to.a[own];
        float* const b = to.b[own];
        if (slot >= slots) {
            // -0 * 0 added changes nothing, not even a zero's sign
            for (int i = lane; i < MATRIX_TILE; i += LANES) a[i] = -0.0f, b[i] = 0;
        } else if (tile.whole) {
            draw_quads(a, b);
        } else {
            draw_singles(a, b);
        }
        slot += SLOTS;
        member += member_step, q += q_step;
        if (q >= rank) q -= rank, ++member;
        read_member();
    }

  private:
    ESFAST_FN void read_member() {
        const int j = member < job.members ? member : 0;
        seed = seed_of(job, j);
        c = coeff_of(job, j);
        if (!tile.is_vector) c = mul_(c, job.scale);
    }

    // Field by field: a reference to either would put both into memory.
    ESFAST_FN Factor factor(bool of_column) const {
        const Factor &a = tile.a, &b = tile.b;
        return {of_column ? b.first : a.first, of_column ? b.step : a.step, of_column ? b.id : a.id};
    }

    // Columns lie in an order in which 16 threads read 8 each without conflicts of banks: the first halves of all, then the
    // second ones.
    static ESFAST_FN constexpr int place_of(int column) {
        return Tile::G == 4 ? column : column / 4 % 2 * (MATRIX_TILE / 2) + column / 8 * 4 + column % 4;
    }

    // The numbers of rows and columns are multiples of 4.
    ESFAST_FN void draw_quads(float* a, float* b) const {
        ESFAST_UNROLL
        for (int i = 0; i < 2 * QUADS; i += LANES) {
            const int quad = i + lane;
            if (LANES > QUADS && quad >= 2 * QUADS) break;
            const bool of_column = quad < QUADS;
            const Factor f = factor(of_column);
            const int first = quad % QUADS * 4;
            const uint64_t number = f.first + uint64_t(q) * f.step + uint64_t(first);
            const Words<uint32_t> w = philox(seed, number / 4, f.id, GAUSSIAN);
            const Pair y = gaussian_pair(w.x0, w.x1), z = gaussian_pair(w.x2, w.x3);
            if (of_column) put(b + place_of(first), y.z0, y.z1, z.z0, z.z1);
            else put(a + first, mul_(c, y.z0), mul_(c, y.z1), mul_(c, z.z0), mul_(c, z.z1));
        }
    }

    ESFAST_FN void draw_singles(float* a, float* b) const {
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
        for (int i = lane; i < 2 * MATRIX_TILE; i += LANES) {
            const bool of_column = i < MATRIX_TILE;
            const Factor f = factor(of_column);
            const int at = i % MATRIX_TILE;
            if (at >= (of_column ? tile.cols : tile.rows)) continue;
            const uint64_t number = f.first + uint64_t(q) * f.step + uint64_t(at);
            const Words<uint32_t> w = philox(seed, number / 4, f.id, GAUSSIAN);
            const bool later = number & 2;
            const Pair pair = gaussian_pair(later ? w.x2 : w.x0, later ? w.x3 : w.x1);
            const float z = number & 1 ? pair.z1 : pair.z0;
            if (of_column) b[place_of(at)] = z;
            else a[at] = tile.is_vector ? c : mul_(c, z);
        }
    }

    static ESFAST_FN void put(float* to, float x0, float x1, float x2, float x3) {
        *reinterpret_cast<Quad*>(to) = {{x0, x1, x2, x3}};
    }
};

// A turn's factors added to the weights of a thread.
template <class Tile, Rule RULE>
ESFAST_FN void add_factors(float* x, const Factors<RULE>& factors, uint32_t thread) {
    constexpr int TALL = Tile::Held::TALL, ACROSS = Tile::Held::ACROSS;
    const int across = int(thread % ACROSS), down = int(thread / ACROSS);
    ESFAST_UNROLL
    for (int slot = 0; slot < Factors<RULE>::SLOTS; ++slot) {
        Quad b[2], a[TALL / 4];
        b[0] = quad_at(factors.b[slot] + across * 4);
        b[1] = quad_at(factors.b[slot] + MATRIX_TILE / 2 + across * 4);
        ESFAST_UNROLL
        for (int i = 0; i < TALL / 4; ++i) a[i] = quad_at(factors.a[slot] + down * TALL + i * 4);
        ESFAST_UNROLL
        for (int i = 0; i < 8 * TALL; ++i) x[i] = fma_(a[i / 32].x[i / 8 % 4], b[i / 4 % 2].x[i % 4], x[i]);
    }
}

}  // namespace esfast
