// What a CUDA launcher needs on the host side. Only .cu files include it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace clk {

// A failed call becomes a C++ exception, which pybind11 turns into RuntimeError.
inline void cuda_check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                                 cudaGetErrorString(status));
    }
}

// After <<<...>>>: finds a bad configuration or a missing architecture at once, and waits for nothing.
inline void launch_check(const char* kernel) { cuda_check(cudaGetLastError(), kernel); }

inline cudaStream_t stream_of(std::intptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Blocks of a grid-stride loop over n elements: enough to fill any device, never past the grid's limit, at least one.
inline unsigned grid_for(int64_t n, int threads, int64_t most = 65535) {
    return static_cast<unsigned>(std::clamp<int64_t>((n + threads - 1) / threads, 1, most));
}

}  // namespace clk
