// esfast._cpu: pointers and numbers in, weights changed in place. No torch headers. Everything is validated by
// esfast/core/plan.py and esfast/core/ops.py; this file only spreads tiles over threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "dtypes.h"
#include "noise.h"
#include "products.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace py = pybind11;
using namespace esfast;

namespace {

// Round to nearest, subnormals kept: the definition's arithmetic, whatever mode the process has set
// (torch.set_flush_denormal, libraries linked with -ffast-math). The mode belongs to a thread, hence per thread.
// The destructor makes what the thread streamed past the cache visible to other threads.
class IeeeMode {
  public:
#if defined(__x86_64__)
    IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~IeeeMode() {
        _mm_sfence();
        _mm_setcsr(saved_);
    }
  private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
    }
    ~IeeeMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
  private:
    uint64_t saved_;
#endif
};

// Best first. A variant is there if the compiler could build it, and listed if this processor can run it.
std::vector<std::pair<std::string, TileFunction>> variants() {
    std::vector<std::pair<std::string, TileFunction>> found;
#if defined(ESFAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.emplace_back("avx512", tile_avx512);
#endif
#if defined(ESFAST_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.emplace_back("avx2", tile_avx2);
#endif
    found.emplace_back("baseline", tile_baseline);
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (auto& v : variants()) names.push_back(v.first);
    return names;
}

// From this many bytes on, weights are written past the cache, since too few of them would stay in it. Tests set it.
int64_t streamed_from = int64_t(1) << 26;

bool is_streamed(const Job& job) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < job.segment_count; ++i) {
        const Segment& s = job.segments[i];
        if (s.dst != s.src) bytes += s.rows * s.cols * (s.dst_format == FLOAT32 ? 4 : 2);
    }
    return bytes > 0 && bytes >= streamed_from;
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void check_segments(const Array<int64_t>& segments) {
    constexpr int64_t FIELDS = sizeof(Segment) / sizeof(int64_t);
    if (segments.ndim() != 2 || segments.shape(1) != FIELDS) throw std::invalid_argument("segments: one int64 per field of a segment expected");
}

void check_kind(int64_t kind) {
    if (kind != GAUSSIAN && kind != RADEMACHER && kind != LOW_RANK)
        throw std::invalid_argument("kind: no noise has the number " + std::to_string(kind));
}

TileFunction variant(const std::string& instruction_set) {
    for (auto& v : variants())
        if (v.first == instruction_set) return v.second;
    throw std::invalid_argument("this processor or build has no instruction set " + instruction_set);
}

// The number of each segment's first tile, and behind them that of all tiles
std::vector<int64_t> first_tiles(const Job& job) {
    std::vector<int64_t> first_tile(size_t(job.segment_count) + 1, 0);
    for (int64_t i = 0; i < job.segment_count; ++i)
        first_tile[size_t(i) + 1] = first_tile[size_t(i)] + tiles_of(job.segments[i]);
    return first_tile;
}

float scale_of(int64_t rank) { return float(1 / std::sqrt(double(rank))); }

int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// `low`, `m` and `v` are addresses of the plan's flat buffers, 0 for none; `adam` is {1 - beta1, 1 - beta2, step, eps}.
void add_noise(Array<int64_t> segments, Array<uint64_t> seeds, Array<float> coeffs, int64_t kind, bool stochastic,
               float decay, uintptr_t low, uintptr_t m, uintptr_t v, std::array<float, 4> adam, int threads,
               const std::string& instruction_set, int64_t rank) {
    check_segments(segments);
    if (seeds.size() != coeffs.size()) throw std::invalid_argument("seeds and coeffs differ in length");
    check_kind(kind);
    const TileFunction run = variant(instruction_set);

    Job job = {reinterpret_cast<const Segment*>(segments.data()), nullptr, segments.shape(0), seeds.data(), coeffs.data(),
               seeds.size(), kind, stochastic, false, decay, reinterpret_cast<uint16_t*>(low),
               {reinterpret_cast<float*>(m), reinterpret_cast<float*>(v), adam[0], adam[1], adam[2], adam[3]}, rank, scale_of(rank)};
    job.streamed = is_streamed(job);
    const std::vector<int64_t> first_tile = first_tiles(job);
    job.first_tile = first_tile.data();
    const int64_t tiles = first_tile.back();

    py::gil_scoped_release release;
    // a thread is worth its wake-up (some 10 us) from about 32 tiles on; a block of a matrix is 16 times as large
    const int64_t worth = kind == LOW_RANK ? 2 : 32;
    const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, tiles / worth)));
    if (team == 1) {  // no parallel region: libgomp would wake or resize the team that torch keeps warm
        IeeeMode mode;
        for (int64_t tile = 0; tile < tiles; ++tile) run(job, tile);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        IeeeMode mode;
#pragma omp for schedule(dynamic, worth)
        for (int64_t tile = 0; tile < tiles; ++tile) run(job, tile);
    }
}

#if defined(ESFAST_HAS_AVX512)
// See products.h; addresses and numbers. Threads share the members.
void products(uintptr_t x, uintptr_t weights, uintptr_t bias, uintptr_t y, int64_t members, int64_t rows, int64_t in, int64_t out,
              int threads) {
    py::gil_scoped_release release;
    const Products all = {reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weights),
                          reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y), members, rows, in, out};
    const int team = int(std::min<int64_t>(threads, members));
    if (team <= 1) return products_avx512(all);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int part = 0; part < team; ++part) products_avx512(all.of(members * part / team, members * (part + 1) / team));
}
#endif

// Copies a float32 matrix without gaps to memory where it lies transposed.
void transpose(const float* from, float* to, int64_t rows, int64_t cols) {
    constexpr int64_t STRIP = 256;  // rows of which a line each stays in the first-level cache
    for (int64_t top = 0; top < rows; top += STRIP) {
        const int64_t end = std::min(rows, top + STRIP);
        int64_t c = 0;
#if defined(__x86_64__)
        for (; c + 4 <= cols; c += 4) {
            int64_t r = top;
            for (; r + 4 <= end; r += 4) {
                __m128 part[4];
                for (int i = 0; i < 4; ++i) part[i] = _mm_loadu_ps(from + (r + i) * cols + c);
                _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
                for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (c + i) * rows + r, part[i]);
            }
            for (; r < end; ++r)
                for (int i = 0; i < 4; ++i) to[(c + i) * rows + r] = from[r * cols + c + i];
        }
#endif
        for (; c < cols; ++c)
            for (int64_t r = top; r < end; ++r) to[c * rows + r] = from[r * cols + c];
    }
}

// Where the members of a population have a tensor: a row of write_stacks' table. It has the segments from the end of the
// tensor before up to `end`. They are member 0's; each further member's lie `step` bytes on. A matrix of rows x cols that
// also is to lie transposed does so from `turned` on, each further member's `turned_step` bytes on. If it is to lie only
// transposed, `step` is 0.
struct Stack {
    int64_t end, step, turned, turned_step, rows, cols;
    bool only_turned() const { return turned && !step; }
};

// Tiles that a thread takes at once of weights that don't have to be transposed: half a millisecond of gaussian noise.
constexpr int64_t TILES_AT_ONCE = 512;

// Writes members to stacks of their weights, in one parallel region: member k is src + coeffs[k] * noise(seeds[k]), or a
// copy of src if there are no seeds. The other arguments are those of add_noise.
void write_stacks(Array<int64_t> segments, Array<int64_t> table, int64_t members, Array<uint64_t> seeds, Array<float> coeffs,
                  int64_t kind, bool stochastic, uintptr_t low, int threads, const std::string& instruction_set, int64_t rank) {
    check_segments(segments);
    constexpr int64_t FIELDS = sizeof(Stack) / sizeof(int64_t);
    if (table.ndim() != 2 || table.shape(1) != FIELDS) throw std::invalid_argument("stacks: one int64 per field of a stack expected");
    if (seeds.size() != coeffs.size() || (seeds.size() && seeds.size() != members))
        throw std::invalid_argument("seeds and coeffs: as many as members expected, or none");
    check_kind(kind);
    const TileFunction run = variant(instruction_set);
    const Stack* const stacks = reinterpret_cast<const Stack*>(table.data());
    Job all = {reinterpret_cast<const Segment*>(segments.data()), nullptr, segments.shape(0), nullptr, nullptr,
               seeds.size() ? 1 : 0, kind, stochastic, false, 0, reinterpret_cast<uint16_t*>(low), {}, rank, scale_of(rank)};
    all.streamed = is_streamed(all);
    const std::vector<int64_t> first_tile = first_tiles(all);

    // What one thread does of a member at once, and the memory that it needs for matrices that only lie transposed
    struct Part { int64_t stack, tile, end; };
    std::vector<Part> parts;
    int64_t room = 0, most_segments = 0;
    for (int64_t i = 0, begin = 0; i < table.shape(0); begin = stacks[i++].end) {
        const Stack& s = stacks[i];
        const int64_t at_once = s.turned ? first_tile.back() : TILES_AT_ONCE, end = first_tile[size_t(s.end)];
        for (int64_t tile = first_tile[size_t(begin)]; tile < end; tile += at_once)
            parts.push_back({i, tile, std::min(end, tile + at_once)});
        if (s.only_turned()) room = std::max(room, s.rows * s.cols);
        most_segments = std::max(most_segments, s.end - begin);
    }
    const int64_t count = members * int64_t(parts.size());
    const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    const std::unique_ptr<float[]> rooms(new float[size_t(room * team)]);
    std::vector<Segment> own(size_t(most_segments * team));

    const auto write = [&](int64_t number, int thread) {
        const int64_t k = number / int64_t(parts.size());
        const Part& part = parts[size_t(number % int64_t(parts.size()))];
        const Stack& s = stacks[part.stack];
        const int64_t begin = part.stack ? stacks[part.stack - 1].end : 0, there = all.segments[begin].dst;
        const int64_t to = s.only_turned() ? reinterpret_cast<int64_t>(rooms.get() + room * thread) : there + k * s.step;
        Segment* const mine = own.data() + most_segments * thread;
        for (int64_t i = begin; i < s.end; ++i) {
            mine[i - begin] = all.segments[i];
            mine[i - begin].dst += to - there;
        }
        Job job = all;
        job.segments = mine, job.segment_count = s.end - begin, job.first_tile = first_tile.data() + begin;
        job.seeds = seeds.data() + k, job.coeffs = coeffs.data() + k, job.streamed = all.streamed && !s.turned;
        for (int64_t tile = part.tile; tile < part.end; ++tile) run(job, tile);
        if (s.turned)
            transpose(reinterpret_cast<const float*>(to), reinterpret_cast<float*>(s.turned + k * s.turned_step), s.rows, s.cols);
    };

    py::gil_scoped_release release;
    if (team == 1) {
        IeeeMode mode;
        for (int64_t number = 0; number < count; ++number) write(number, 0);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        IeeeMode mode;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < count; ++number) write(number, thread_number());
    }
}

py::tuple philox_words(uint64_t seed, uint64_t block, uint32_t tensor_id, uint32_t domain) {
    const Words<uint32_t> w = philox(seed, block, tensor_id, domain);
    return py::make_tuple(w.x0, w.x1, w.x2, w.x3);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "The CPU backend of esfast.add_noise_.";
    m.def("add_noise", &add_noise, py::arg("segments"), py::arg("seeds"), py::arg("coeffs"), py::arg("kind"),
          py::arg("stochastic"), py::arg("decay"), py::arg("low"), py::arg("m"), py::arg("v"), py::arg("adam"),
          py::arg("threads"), py::arg("instruction_set"), py::arg("rank") = 1);
#if defined(ESFAST_HAS_AVX512)
    m.def("products", &products, "For processors with AVX-512: see csrc/products.h.");
#endif
    m.def("write_stacks", &write_stacks, py::arg("segments"), py::arg("stacks"), py::arg("members"), py::arg("seeds"),
          py::arg("coeffs"), py::arg("kind"), py::arg("stochastic"), py::arg("low"), py::arg("threads"),
          py::arg("instruction_set"), py::arg("rank") = 1);
    m.def("set_streamed_from", [](int64_t bytes) { streamed_from = bytes; }, "For the tests: see module.cpp.");
    m.def("instruction_sets", &instruction_sets, "Instruction sets that this build and this processor have, best first.");
    m.def("philox", &philox_words, "The four words of one Philox4x32-7 call, for the known-answer test.");
    m.attr("NOISE_VERSION") = NOISE_VERSION;
#if defined(_OPENMP)
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif
    m.attr("COMPILER") = __VERSION__;
}
