// esfast._cuda: pointers and numbers in, a kernel started. No torch headers, and without a driver it can be imported all
// the same. Everything is validated by esfast/core/plan.py and esfast/core/ops.py. Built without nvcc, the module only says so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cuda_job.h"

namespace py = pybind11;
using namespace esfast;

namespace {

#if defined(ESFAST_CUDA_ABSENT)
constexpr const char* ABSENT = ESFAST_CUDA_ABSENT;
#else
constexpr const char* ABSENT = "";

// Addresses are of device memory; `extras`, `segments`, `low` and `moments` are 0 where there are none.
void add_noise(uint64_t tiles, uint64_t extras, uint64_t segments, int64_t tile_count, int src_format, int dst_format,
               uint64_t seeds, uint64_t coeffs, int members, int kind, int rank, float scale, bool stochastic, float decay,
               uint64_t low, std::array<uint64_t, 2> moments, std::array<float, 4> adam, int device, uint64_t stream) {
    const CudaJob job = {tiles, extras, segments, seeds, coeffs, low, moments[0], moments[1], members,
                         stochastic && members > 0, rank, scale, decay, adam[0], adam[1], adam[2], adam[3]};
    std::string error;
    {
        py::gil_scoped_release release;
        error = launch({src_format, dst_format, kind, rule_of(job, dst_format)}, job, tile_count, device, stream);
    }
    if (!error.empty()) throw std::runtime_error(error);
}

void copy_tiles(uint64_t tiles, int64_t tile_count, int size, int device, uint64_t stream) {
    std::string error;
    {
        py::gil_scoped_release release;
        error = launch_copy(size, tiles, tile_count, device, stream);
    }
    if (!error.empty()) throw std::runtime_error(error);
}
#endif

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA backend of esfast.add_noise_.";
    m.attr("ABSENT") = ABSENT;  // why there are no kernels in this build, or empty
    m.attr("TILE") = CUDA_TILE;
    m.attr("MATRIX_TILE") = MATRIX_TILE;
#if !defined(ESFAST_CUDA_ABSENT)
    m.attr("ARCHITECTURES") = ESFAST_ARCHITECTURES;
    m.def("add_noise", &add_noise, py::arg("tiles"), py::arg("extras"), py::arg("segments"), py::arg("tile_count"),
          py::arg("src_format"), py::arg("dst_format"), py::arg("seeds"), py::arg("coeffs"), py::arg("members"),
          py::arg("kind"), py::arg("rank"), py::arg("scale"), py::arg("stochastic"), py::arg("decay"), py::arg("low"), py::arg("moments"), py::arg("adam"), py::arg("device"),
          py::arg("stream"));
    m.def("copy_tiles", &copy_tiles, py::arg("tiles"), py::arg("tile_count"), py::arg("size"), py::arg("device"),
          py::arg("stream"));
    m.def("unusable", &unusable, py::arg("device"), "Why no kernel can run on this device (-1: on any), or empty.");
#endif
}
