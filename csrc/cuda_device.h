// Shared by the launches of cuda_kernel.cu and cuda_copy.cu.
#pragma once
#include <cuda_runtime.h>

#include <string>

namespace esfast {

inline std::string text(cudaError_t error) { return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error); }

// Switches this thread's device while the object lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error = cudaGetDevice(&before_);
        if (error == cudaSuccess && device != before_) error = cudaSetDevice(device);
        if (error != cudaSuccess) before_ = device;
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    cudaError_t error;

  private:
    int before_ = 0;
    bool changed_;
};

}  // namespace esfast
