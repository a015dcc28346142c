// esfast._cpu: pointers and numbers in, weights changed in place. No torch headers. Everything is validated by
// esfast/core/plan.py and esfast/core/ops.py; this file only spreads tiles over threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
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

// `low`, `m` and `v` are addresses of the plan's flat buffers, 0 for none; `adam` is {1 - beta1, 1 - beta2, step, eps}.
void add_noise(Array<int64_t> segments, Array<uint64_t> seeds, Array<float> coeffs, int64_t kind, bool stochastic,
               float decay, uintptr_t low, uintptr_t m, uintptr_t v, std::array<float, 4> adam, int threads,
               const std::string& instruction_set, int64_t rank) {
    constexpr int64_t FIELDS = sizeof(Segment) / sizeof(int64_t);
    if (segments.ndim() != 2 || segments.shape(1) != FIELDS) throw std::invalid_argument("segments: one int64 per field of a segment expected");
    if (seeds.size() != coeffs.size()) throw std::invalid_argument("seeds and coeffs differ in length");
    if (kind != GAUSSIAN && kind != RADEMACHER && kind != LOW_RANK)
        throw std::invalid_argument("kind: no noise has the number " + std::to_string(kind));
    TileFunction run = nullptr;
    for (auto& v : variants())
        if (v.first == instruction_set) run = v.second;
    if (!run) throw std::invalid_argument("this processor or build has no instruction set " + instruction_set);

    Job job = {reinterpret_cast<const Segment*>(segments.data()), nullptr, segments.shape(0), seeds.data(), coeffs.data(),
               seeds.size(), kind, stochastic, false, decay, reinterpret_cast<uint16_t*>(low),
               {reinterpret_cast<float*>(m), reinterpret_cast<float*>(v), adam[0], adam[1], adam[2], adam[3]}, rank, float(1 / std::sqrt(double(rank)))};
    job.streamed = is_streamed(job);
    std::vector<int64_t> first_tile(size_t(job.segment_count) + 1, 0);
    for (int64_t i = 0; i < job.segment_count; ++i)
        first_tile[size_t(i) + 1] = first_tile[size_t(i)] + tiles_of(job.segments[i]);
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
// See products.h; addresses and numbers.
void products(uintptr_t x, uintptr_t weights, uintptr_t bias, uintptr_t y, int64_t members, int64_t rows, int64_t in, int64_t out) {
    py::gil_scoped_release release;
    products_avx512({reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weights),
                     reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y), members, rows, in, out});
}
#endif

// Copies float32 matrices to memory where they lie transposed, without gaps. A row of `matrices` has the addresses of a
// matrix and of its copy, and the matrix's rows and columns.
void transpose(Array<int64_t> matrices) {
    if (matrices.ndim() != 2 || matrices.shape(1) != 4) throw std::invalid_argument("matrices: rows of four numbers expected");
    const int64_t* row = matrices.data();
    const int64_t count = matrices.shape(0);
    py::gil_scoped_release release;
    for (int64_t i = 0; i < count; ++i, row += 4) {
        const float* const from = reinterpret_cast<const float*>(row[0]);
        float* const to = reinterpret_cast<float*>(row[1]);
        const int64_t rows = row[2], cols = row[3];
        constexpr int64_t STRIP = 256;  // rows of which a line each stays in the first-level cache
        for (int64_t first = 0; first < rows; first += STRIP) {
            const int64_t end = std::min(rows, first + STRIP);
            for (int64_t c = 0; c < cols; ++c)
                for (int64_t r = first; r < end; ++r) to[c * rows + r] = from[r * cols + c];
        }
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
    m.def("transpose", &transpose, py::arg("matrices"));
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
