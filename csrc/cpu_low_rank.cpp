// Low-rank noise on one block of a matrix: x = fma(c_j * A_jq[row], B_jq[column], x) for each member j, and in it each q,
// in order. Compiled once per instruction set, as cpu_kernel.cpp is.
//
// The factors of a block's rows and columns are drawn for up to PAIRS pairs (j, q) at a time, into buffers on the stack;
// what is left is a small matrix product, whose sums stay in registers while all pairs pass.
#include "cpu.h"
#include "cpu_rows.h"

#define ESFAST_JOIN_(a, b) a##b
#define ESFAST_JOIN(a, b) ESFAST_JOIN_(a, b)

namespace esfast {
namespace {

constexpr int ROWS = BLOCK_ROWS, COLS = BLOCK_COLS;
constexpr int PAIRS = 32;
constexpr int STRIP = 8;  // rows between which the block passes from memory through float32 to memory

// A vector of float32, and how many rows of two of them fit the registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, HEIGHT = 8;
using V = __m512;
ESFAST_FN V load(const float* p) { return _mm512_loadu_ps(p); }
ESFAST_FN void store(float* p, V x) { _mm512_storeu_ps(p, x); }
ESFAST_FN V all(float x) { return _mm512_set1_ps(x); }
ESFAST_FN V add_product(V c, V a, V b) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
constexpr int WIDTH = 8, HEIGHT = 4;
using V = __m256;
ESFAST_FN V load(const float* p) { return _mm256_loadu_ps(p); }
ESFAST_FN void store(float* p, V x) { _mm256_storeu_ps(p, x); }
ESFAST_FN V all(float x) { return _mm256_set1_ps(x); }
ESFAST_FN V add_product(V c, V a, V b) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr int WIDTH = 4, HEIGHT = 4;
struct V { float x[WIDTH]; };
ESFAST_FN V load(const float* p) { V v; memcpy(v.x, p, sizeof(v.x)); return v; }
ESFAST_FN void store(float* p, V v) { memcpy(p, v.x, sizeof(v.x)); }
ESFAST_FN V all(float x) { V v; for (float& e : v.x) e = x; return v; }
ESFAST_FN V add_product(V c, V a, V b) {
    for (int i = 0; i < WIDTH; ++i) c.x[i] = fma_(a.x[i], b.x[i], c.x[i]);
    return c;
}
#endif
constexpr int GROUP = 2 * WIDTH;  // columns whose sums are in registers at once
static_assert(COLS % GROUP == 0 && STRIP % HEIGHT == 0 && ROWS % STRIP == 0, "blocks are cut into strips and groups");

struct Factors {
    alignas(64) float a[PAIRS][ROWS];                 // c * A
    alignas(64) float b[COLS / GROUP][PAIRS][GROUP];  // B
};

// z[0 .. n): gaussian noise number `number` and following of a tensor. MOST >= n.
template <int MOST>
void draw(float* z, uint64_t seed, uint32_t tensor_id, int64_t number, int n) {
    constexpr int CHUNK = 64;  // at multiples of it, the low word of the block number can't carry inside one
    float all[MOST + 2 * CHUNK];
    const int64_t begin = number / CHUNK * CHUNK;
    for (int at = 0; begin + at < number + n; at += CHUNK) {
        uint32_t radius_word[CHUNK / 2], angle_word[CHUNK / 2];
        float even[CHUNK / 2], odd[CHUNK / 2];
        pair_words<CHUNK / 4>(radius_word, angle_word, seed, uint64_t(begin + at) / GAUSSIANS_PER_BLOCK, tensor_id, GAUSSIAN);
#pragma omp simd
        for (int p = 0; p < CHUNK / 2; ++p) {
            const Pair pair = gaussian_pair(radius_word[p], angle_word[p]);
            even[p] = pair.z0, odd[p] = pair.z1;
        }
        for (int p = 0; p < CHUNK / 2; ++p) all[at + 2 * p] = even[p], all[at + 2 * p + 1] = odd[p];
    }
    memcpy(z, all + (number - begin), size_t(n) * sizeof(float));
}

// The factors of pairs first .. first + count, those of member j being j * rank .. (j + 1) * rank.
void draw_factors(Factors& f, const Job& job, const Segment& s, int64_t row, int rows, int64_t col, int cols, int64_t first,
                  int count) {
    const int groups = (cols + GROUP - 1) / GROUP;
    for (int p = 0; p < count; ++p) {
        const int64_t j = (first + p) / job.rank, q = (first + p) % job.rank;
        const float c = mul_(job.coeffs[j], job.scale);
        float a[ROWS], b[COLS];
        draw<ROWS>(a, job.seeds[j], uint32_t(s.a_id), s.a_first + q * s.a_step + row, rows);
        for (int i = 0; i < rows; ++i) f.a[p][i] = mul_(c, a[i]);
        for (int i = rows; i % STRIP; ++i) f.a[p][i] = 0;
        draw<COLS>(b, job.seeds[j], uint32_t(s.b_id), s.b_first + q * s.b_step + col, cols);
        for (int i = cols; i % GROUP; ++i) b[i] = 0;
        for (int g = 0; g < groups; ++g) memcpy(f.b[g][p], b + g * GROUP, sizeof(f.b[g][p]));
    }
}

// x[i] = fma(a[p][i], b[p], x[i]) for `count` pairs p in order: HIGH rows of a group of columns.
template <int HIGH>
ESFAST_FN void add_pairs(V (&x)[HIGH][2], const float* a, const float* b, int count) {
    for (int p = 0; p < count; ++p) {
        const V left = load(b + p * GROUP), right = load(b + p * GROUP + WIDTH);
        for (int i = 0; i < HIGH; ++i) {
            const V factor = all(a[p * ROWS + i]);
            x[i][0] = add_product(x[i][0], factor, left);
            x[i][1] = add_product(x[i][1], factor, right);
        }
    }
}

template <int HIGH>
ESFAST_FN void add_to_sums(float* sums, const float* a, const float* b, int count) {
    V x[HIGH][2];
    for (int i = 0; i < HIGH; ++i) x[i][0] = load(sums + i * COLS), x[i][1] = load(sums + i * COLS + WIDTH);
    add_pairs<HIGH>(x, a, b, count);
    for (int i = 0; i < HIGH; ++i) store(sums + i * COLS, x[i][0]), store(sums + i * COLS + WIDTH, x[i][1]);
}

// Groups first, first + 1, ... of a strip, for `cols` columns in all.
void add_strip(float* sums, const Factors& f, int row, int rows, int first, int cols, int count) {
    for (int at = 0; at < cols; at += GROUP) {
        const float* const b = f.b[first + at / GROUP][0];
        if (rows == 1) {
            add_to_sums<1>(sums + at, f.a[0] + row, b, count);
            continue;
        }
        for (int i = 0; i < rows; i += HEIGHT) add_to_sums<HEIGHT>(sums + i * COLS + at, f.a[0] + row + i, b, count);
    }
}

// x += step m / (sqrt(v) + eps) for the gradient g
void adam_row(float* x, const float* g, const Adam& a, float* m, float* v, int n) {
    for (int i = 0; i < n; ++i) {
        m[i] = fma_(a.one_minus_beta1, add_(g[i], -m[i]), m[i]);
        v[i] = fma_(a.one_minus_beta2, add_(mul_(g[i], g[i]), -v[i]), v[i]);
        x[i] = fma_(a.step, div_(m[i], add_(sqrt_(v[i]), a.eps)), x[i]);
    }
}

// One row of a block: where it lies, and how it is read and written.
template <class Src, class Dst>
struct Row {
    using Anchor = std::conditional_t<std::is_same_v<Dst, Split>, BFloat16, Dst>;
    const Job& job;
    const Segment& s;
    const int64_t row, col;
    const int n;

    template <class T>
    Place<T> place(int64_t address, int64_t stride) const {
        return {reinterpret_cast<typename T::storage*>(address) + row * stride + col, job.low + flat()};
    }

    int64_t flat() const { return s.flat + row * s.flat_stride + col; }

    // The weights, after weight decay.
    void read(float* x) const {
        read_row(x, place<Src>(s.src, s.src_stride), n);
        if (job.decay == 0) return;
        alignas(64) float toward[COLS];
        if (s.anchor) read_row(toward, place<Anchor>(s.anchor, s.anchor_stride), n);
        else memset(toward, 0, sizeof(toward));
        decay_row(x, toward, job.decay, n);
    }

    void write(const float* x) const {
        const Place<Dst> to = place<Dst>(s.dst, s.dst_stride);
        alignas(64) typename Dst::storage staged[COLS];
        const bool streamed = job.streamed && s.dst != s.src;
        const Place<Dst> first = {streamed ? staged : to.p, to.low};
        uint32_t random[COLS];
        const bool stochastic = job.stochastic && job.member_count > 0;
        if (stochastic)
            rounding_words<COLS>(random, job.seeds[0], uint32_t(s.tensor_id), s.first + row * s.index_stride + col, n);
        write_row(first, x, stochastic ? random : nullptr, n);
        if (streamed) stream_row(to.p, staged, n);
    }

    void step(float* x, const float* g) const { adam_row(x, g, job.adam, job.adam.m + flat(), job.adam.v + flat(), n); }
};

// Whole groups of rows that only get noise: from memory to registers to memory.
template <int HIGH, class Src, class Dst>
void add_to_rows(const Job& job, const Segment& s, const Factors& f, int64_t row, int at, int64_t col, int cols, int count) {
    Place<Src> from[HIGH];
    Place<Dst> to[HIGH], target[HIGH];
    alignas(64) typename Dst::storage staged[HIGH][COLS];
    const bool streamed = job.streamed && s.dst != s.src;
    for (int i = 0; i < HIGH; ++i) {
        const Row<Src, Dst> r = {job, s, row + at + i, col, cols};
        from[i] = r.template place<Src>(s.src, s.src_stride);
        target[i] = r.template place<Dst>(s.dst, s.dst_stride);
        to[i] = {streamed ? staged[i] : target[i].p, target[i].low};
    }
    for (int g = 0; g < cols; g += GROUP) {
        alignas(64) float x[HIGH][GROUP];
        V sums[HIGH][2];
        for (int i = 0; i < HIGH; ++i) {
            // two strips below, since a row of a block is too short for the processor to foresee: 0.43 ns a weight without
            __builtin_prefetch(from[i].p + g + 2 * HIGH * s.src_stride);
            read_row(x[i], Place<Src>{from[i].p + g, from[i].low + g}, GROUP);
            sums[i][0] = load(x[i]), sums[i][1] = load(x[i] + WIDTH);
        }
        add_pairs<HIGH>(sums, f.a[0] + at, f.b[g / GROUP][0], count);
        for (int i = 0; i < HIGH; ++i) {
            store(x[i], sums[i][0]), store(x[i] + WIDTH, sums[i][1]);
            write_row(Place<Dst>{to[i].p + g, to[i].low + g}, x[i], nullptr, GROUP);
        }
    }
    if (streamed)
        for (int i = 0; i < HIGH; ++i) stream_row(target[i].p, staged[i], cols);
}

template <class Src, class Dst>
void run_block(const Job& job, const Segment& s, int64_t row, int64_t col) {
    const int rows = int(s.rows - row < ROWS ? s.rows - row : ROWS), cols = int(s.cols - col < COLS ? s.cols - col : COLS);
    const int64_t pairs = job.member_count * job.rank;
    const bool adam = job.adam.m != nullptr, stochastic = job.stochastic && job.member_count > 0;
    const bool at_once = pairs <= PAIRS;
    Factors factors;
    int begin = 0;  // the columns before it are done
    if (at_once) draw_factors(factors, job, s, row, rows, col, cols, 0, int(pairs));
    if (at_once && !adam && !stochastic && job.decay == 0) {
        begin = cols / GROUP * GROUP;
        int i = 0;
        for (; i + HEIGHT <= rows; i += HEIGHT) add_to_rows<HEIGHT, Src, Dst>(job, s, factors, row, i, col, begin, int(pairs));
        for (; i < rows; ++i) add_to_rows<1, Src, Dst>(job, s, factors, row, i, col, begin, int(pairs));
        if (begin == cols) return;
    }
    const int left = cols - begin, wide = (left + GROUP - 1) / GROUP * GROUP;
    // where all pairs go in one round, a strip is read, summed and written while it is in the first-level cache
    alignas(64) float sums[ROWS][COLS];
    int64_t first = 0;
    do {
        const int count = int(pairs - first < PAIRS ? pairs - first : PAIRS);
        if (!at_once) draw_factors(factors, job, s, row, rows, col, cols, first, count);
        for (int strip = 0; strip < rows; strip += STRIP) {
            const int high = rows - strip < STRIP ? rows - strip : STRIP;
            float(*const x)[COLS] = sums + (at_once ? 0 : strip);
            const auto at = [&](int i) { return Row<Src, Dst>{job, s, row + strip + i, col + begin, left}; };
            if (first == 0) {
                for (int i = 0; i < STRIP; ++i) {
                    const int read = i < high && !adam ? left : 0;
                    if (read) at(i).read(x[i]);
                    memset(x[i] + read, 0, size_t(wide - read) * sizeof(float));
                }
            }
            add_strip(x[0], factors, strip, high, begin / GROUP, left, count);
            if (first + count < pairs) continue;
            for (int i = 0; i < high; ++i) {
                if (adam) {
                    alignas(64) float weights[COLS];
                    at(i).read(weights);
                    at(i).step(weights, x[i]);
                    at(i).write(weights);
                } else {
                    at(i).write(x[i]);
                }
            }
        }
        first += count;
    } while (first < pairs);
}

using BlockFunction = void (*)(const Job&, const Segment&, int64_t row, int64_t col);

// [source format][destination format]; ops.py sees to it that only these are asked for
constexpr BlockFunction BLOCKS[4][4] = {
    {run_block<Float32, Float32>, run_block<Float32, BFloat16>, run_block<Float32, Float16>, nullptr},
    {nullptr, run_block<BFloat16, BFloat16>, nullptr, nullptr},
    {nullptr, nullptr, run_block<Float16, Float16>, nullptr},
    {nullptr, run_block<Split, BFloat16>, nullptr, run_block<Split, Split>},
};

}  // namespace

void ESFAST_JOIN(block_, ESFAST_ISA)(const Job& job, const Segment& s, int64_t block) {
    const int64_t per_row = (s.cols + COLS - 1) / COLS;
    BLOCKS[s.src_format][s.dst_format](job, s, block / per_row * ROWS, block % per_row * COLS);
}

}  // namespace esfast
