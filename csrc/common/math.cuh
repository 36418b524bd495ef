// Device arithmetic shared by the rooms: conversions to and from the compute type, and sums over a warp and a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "dtype.h"

namespace clk {

__device__ inline float load(const float* p) { return *p; }
__device__ inline double load(const double* p) { return *p; }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(double* p, double x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Every lane gets the sum, added in the same order each time.
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

// Sum over a block of a multiple of 32 threads, at most 1024; every thread gets it. `scratch` holds 32 values of shared
// memory and may be used again straight after the call.
template <typename T>
__device__ inline T block_sum(T x, T* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return x;
}

// Calls f(T{}) with the device type that holds `dtype`.
template <typename F>
void dispatch_device(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32:
            return f(float{});
        case DType::f64:
            return f(double{});
        case DType::f16:
            return f(__half{});
        case DType::bf16:
            return f(__nv_bfloat16{});
    }
    throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace clk
