// A matrix somewhere in memory: pointer, sizes and strides in elements. It owns nothing.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CLK_HOST_DEVICE __host__ __device__
#else
#define CLK_HOST_DEVICE
#endif

namespace clk {

template <typename T>
struct MatrixView {
    T* data;
    int64_t rows, cols;
    int64_t row_stride, col_stride;

    // int64 throughout: row * stride passes 2^31 long before memory ends.
    CLK_HOST_DEVICE T& operator()(int64_t row, int64_t col) const { return data[row * row_stride + col * col_stride]; }
};

// The Python side passes data_ptr() as an integer.
template <typename T>
T* pointer(std::intptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace clk
