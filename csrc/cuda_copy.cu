// The kernels that restore weights, and their launch. cuda_copy.cuh has the work of one thread.
#include "cuda_copy.cuh"
#include "cuda_device.h"

namespace esfast {
namespace {

template <int SIZE>
__global__ void __launch_bounds__(CopyThread<SIZE>::THREADS) copy_tiles_kernel(uint64_t records) {
    CopyThread<SIZE>(records, blockIdx.x, threadIdx.x).run();
}

}  // namespace

std::string launch_copy(int size, uint64_t records, int64_t tiles, int device, uint64_t stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return text(on.error);
    const void* function = size == 4 ? reinterpret_cast<const void*>(copy_tiles_kernel<4>)
                                     : reinterpret_cast<const void*>(copy_tiles_kernel<2>);
    void* arguments[] = {&records};
    cudaLaunchKernel(function, dim3(unsigned(tiles)), dim3(CopyThread<4>::THREADS), arguments, 0,
                     reinterpret_cast<cudaStream_t>(stream));
    const cudaError_t error = cudaGetLastError();  // an earlier kernel's failure may show here
    return error == cudaSuccess ? "" : "copy_tiles_kernel on " + std::to_string(tiles) + " tiles: " + text(error);
}

}  // namespace esfast
