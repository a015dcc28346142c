// The kernels and their launch. cuda_kernel.cuh has the template of one thread's work.
#include <cuda_runtime.h>

#include "cuda_device.h"
#include "cuda_kernel.cuh"

namespace esfast {
namespace {

// Blocks of 64 to 256 threads that must fit an SM at once. Left alone, ptxas takes up to 181 registers, and one gaussian
// block fits. What waits for memory gets 80 registers (64 spill). What adds members has work enough for few threads: gaussian
// kernels get 128, rademacher ones 168, of which none spills. Low-rank ones get 128, and what adds members to 128 weights a
// thread 168.
template <uint32_t KIND, Rule RULE>
constexpr int RESIDENT = KIND == LOW_RANK ? 2
                         : RULE == ONE    ? 3
                         : KIND == GAUSSIAN ? 2
                         : RULE == ADD      ? 6
                                            : 3;

template <class Src, class Dst, uint32_t KIND, Rule RULE>
__global__ void __launch_bounds__(Thread<Src, Dst, KIND, RULE>::Held::THREADS, RESIDENT<KIND, RULE>)
add_noise_kernel(const __grid_constant__ CudaJob job) {
    using T = Thread<Src, Dst, KIND, RULE>;
    const T thread(job, blockIdx.x, threadIdx.x);
    float x[T::WEIGHTS];
    if constexpr (KIND == LOW_RANK) {
        __shared__ Factors<RULE> factors[2];
        const bool has_nothing = thread.has_nothing();
        thread.begin(x);
        Drawer<typename T::Tile, RULE> drawer(thread.tile, job, threadIdx.x);
        const int turns = drawer.turns();
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {
            drawer.draw(factors[turn % 2]);
            __syncthreads();
            if (!has_nothing) add_factors<typename T::Tile>(x, factors[turn % 2], threadIdx.x);
        }
        if (!has_nothing) thread.end(x);
    } else {
        if (thread.has_nothing()) return;
        thread.begin(x);
        thread.add(x);
        thread.end(x);
    }
}

using Function = void (*)(CudaJob);
struct Entry {
    Function function;
    int threads;
    std::string name;
};

template <class Src, class Dst, uint32_t KIND>
Entry entry(const std::string& formats, Rule rule) {
    const std::string name = (KIND == GAUSSIAN ? "gaussian, " : KIND == RADEMACHER ? "rademacher, " : "low rank, ") + formats;
    if (rule == ONE) return {add_noise_kernel<Src, Dst, KIND, ONE>, Thread<Src, Dst, KIND, ONE>::Held::THREADS, name};
    if (rule == ADD) return {add_noise_kernel<Src, Dst, KIND, ADD>, Thread<Src, Dst, KIND, ADD>::Held::THREADS, name};
    if constexpr (std::is_same_v<Src, Dst>)  // Adam works in place
        return {add_noise_kernel<Src, Dst, KIND, ADAM>, Thread<Src, Dst, KIND, ADAM>::Held::THREADS, name + ", adam"};
    return {nullptr, 0, name + ", adam"};
}

template <class Src, class Dst>
Entry entry(const std::string& formats, const CudaKernel& k) {
    switch (k.kind) {
        case GAUSSIAN: return entry<Src, Dst, GAUSSIAN>(formats, k.rule);
        case RADEMACHER: return entry<Src, Dst, RADEMACHER>(formats, k.rule);
        case LOW_RANK: return entry<Src, Dst, LOW_RANK>(formats, k.rule);
        default: return {nullptr, 0, "unknown noise"};
    }
}

Entry find(const CudaKernel& k) {
    switch (4 * k.src_format + k.dst_format) {
        case 4 * FLOAT32 + FLOAT32: return entry<Float32, Float32>("float32", k);
        case 4 * FLOAT32 + BFLOAT16: return entry<Float32, BFloat16>("float32 to bfloat16", k);
        case 4 * FLOAT32 + FLOAT16: return entry<Float32, Float16>("float32 to float16", k);
        case 4 * BFLOAT16 + BFLOAT16: return entry<BFloat16, BFloat16>("bfloat16", k);
        case 4 * FLOAT16 + FLOAT16: return entry<Float16, Float16>("float16", k);
        case 4 * SPLIT + SPLIT: return entry<Split, Split>("split float32", k);
        case 4 * SPLIT + BFLOAT16: return entry<Split, BFloat16>("split float32 to bfloat16", k);
        default: return {nullptr, 0, "unknown formats"};
    }
}

}  // namespace

std::string launch(const CudaKernel& kernel, const CudaJob& job, int64_t tiles, int device, uint64_t stream) {
    const Entry e = find(kernel);
    if (!e.function) return "add_noise_kernel (" + e.name + ") does not exist";
    const OnDevice on(device);
    if (on.error != cudaSuccess) return text(on.error);
    void* arguments[] = {const_cast<CudaJob*>(&job)};
    cudaLaunchKernel(reinterpret_cast<const void*>(e.function), dim3(unsigned(tiles)), dim3(unsigned(e.threads)), arguments, 0,
                     reinterpret_cast<cudaStream_t>(stream));
    const cudaError_t error = cudaGetLastError();  // an earlier kernel's failure may show here
    return error == cudaSuccess ? "" : "add_noise_kernel (" + e.name + ") on " + std::to_string(tiles) + " tiles: " + text(error);
}

std::string unusable(int device) {
    int driver = 0, count = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "there is no NVIDIA driver";
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver)
        return "the NVIDIA driver is for CUDA " + version(driver) + ", too old for the CUDA " + version(CUDART_VERSION) +
               " that esfast was built with";
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "there is no CUDA device";
    if (error != cudaSuccess) return "no CUDA device can be used (" + text(error) + ")";
    if (device < 0) return "";
    const OnDevice on(device);
    if (on.error != cudaSuccess) return "device " + std::to_string(device) + " can't be used (" + text(on.error) + ")";
    cudaFuncAttributes attributes;  // loads the code for the device, and so finds whether there is any
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(
                                                   find({BFLOAT16, BFLOAT16, GAUSSIAN, ONE}).function));
    cudaGetLastError();
    if (error == cudaSuccess) return "";
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return "wrong architecture: device " + std::to_string(device) + " is sm_" + std::to_string(major * 10 + minor) +
           ", and esfast was built for " ESFAST_ARCHITECTURES " (" + text(error) + ")";
}

}  // namespace esfast
