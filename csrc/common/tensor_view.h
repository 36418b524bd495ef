// Memory that Python owns, as the entry points get it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CLK_HOST_DEVICE __host__ __device__
#else
#define CLK_HOST_DEVICE
#endif

namespace clk {

// The Python side passes data_ptr() as an integer.
template <typename T>
T* pointer(std::intptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace clk
