// What a CUDA launcher needs on the host side. Only .cu files include it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace clk {

// Failures of a kernel that has run. A launch cannot cause one: it meets what earlier work left, as any call would.
inline bool from_earlier_work(cudaError_t status) {
    switch (status) {
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorIllegalInstruction:
        case cudaErrorHardwareStackError:
        case cudaErrorECCUncorrectable:
        case cudaErrorContextIsDestroyed:
            return true;
        default:
            return false;
    }
}

// A failed call becomes a C++ exception, which pybind11 turns into RuntimeError.
inline void cuda_check(cudaError_t status, const char* what, bool pending = false) {
    if (status == cudaSuccess) return;
    std::string message = std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
    if (pending || from_earlier_work(status)) {
        message += " (left by earlier work on this device, not by this call; CUDA_LAUNCH_BLOCKING=1 finds its origin)";
    }
    throw std::runtime_error(message);
}

// Before the first launch of a call: an error that nobody has read yet must not pass for ours.
inline void pending_error_check(const char* what) { cuda_check(cudaGetLastError(), what, true); }

// After <<<...>>>: finds a bad configuration or a missing architecture at once, and waits for nothing.
inline void launch_check(const char* kernel) { cuda_check(cudaGetLastError(), kernel); }

inline cudaStream_t stream_of(std::intptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Blocks of a grid-stride loop over n elements: enough to fill any device, never past the grid's limit, at least one.
inline unsigned grid_for(int64_t n, int threads, int64_t most = 65535) {
    return static_cast<unsigned>(std::clamp<int64_t>((n + threads - 1) / threads, 1, most));
}

}  // namespace clk
