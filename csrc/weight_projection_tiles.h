// Tiles of a parameter on the CPU: what is worked on at a time stays in L1, whatever the tensors' types.
//
// Sums run over 64 bytes of lanes, whatever the instruction set, in the type of the values; a tile's sum is a double.
// So the rounding of a row's sum is that of kTile / 16 additions, and it does not depend on the threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/simd.h"

namespace clk {

inline constexpr int64_t kTile = 1024;  // 4 KB of each of seven streams of float

template <typename T>
struct Lanes {
    typedef T type __attribute__((vector_size(64)));
    static constexpr int count = 64 / static_cast<int>(sizeof(T));
};

template <typename T>
CLK_INLINE double sum_of_lanes(typename Lanes<T>::type& v) {
    constexpr int kLanes = Lanes<T>::count;
    T x[kLanes];
    std::memcpy(x, &v, sizeof x);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) x[j] += x[j + width];
    }
    return static_cast<double>(x[0]);
}

// sum p q
template <typename T>
CLK_INLINE double tile_dot(const T* p, const T* q, int64_t count) {
    using V = typename Lanes<T>::type;
    constexpr int kLanes = Lanes<T>::count;
    V even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        V a, b, c, d;
        std::memcpy(&a, p + i, sizeof(V));
        std::memcpy(&b, p + i + kLanes, sizeof(V));
        std::memcpy(&c, q + i, sizeof(V));
        std::memcpy(&d, q + i + kLanes, sizeof(V));
        even += a * c;
        odd += b * d;
    }
    for (int j = 0; i < count; ++i, j = (j + 1) % kLanes) even[j] += p[i] * q[i];
    even += odd;
    return sum_of_lanes<T>(even);
}

// sum |p|
template <typename T>
CLK_INLINE double tile_length(const T* p, int64_t count) {
    using V = typename Lanes<T>::type;
    constexpr int kLanes = Lanes<T>::count;
    V even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        V a, b;
        std::memcpy(&a, p + i, sizeof(V));
        std::memcpy(&b, p + i + kLanes, sizeof(V));
        even += a < T(0) ? -a : a;
        odd += b < T(0) ? -b : b;
    }
    for (int j = 0; i < count; ++i, j = (j + 1) % kLanes) even[j] += p[i] < T(0) ? -p[i] : p[i];
    even += odd;
    return sum_of_lanes<T>(even);
}

template <typename T>
inline constexpr DType kComputeType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// `count` values from `begin` on, in the compute type: where they lie, or converted into `buffer`.
template <typename T, typename S>
CLK_INLINE T* tile_values(S* memory, DType type, int64_t begin, int64_t count, T* buffer) {
    if constexpr (sizeof(T) == 4) {
        T* __restrict out = buffer;
        if (type == DType::f16) {
            const Half* __restrict in = static_cast<const Half*>(memory) + begin;
            for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
            return buffer;
        }
        if (type == DType::bf16) {
            const BFloat16* __restrict in = static_cast<const BFloat16*>(memory) + begin;
            for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
            return buffer;
        }
    }
    return static_cast<T*>(const_cast<void*>(static_cast<const void*>(memory))) + begin;
}

// Puts values back, rounded; nothing is done where they were worked on in place.
template <typename T>
CLK_INLINE void tile_store(void* memory, DType type, int64_t begin, int64_t count, const T* values) {
    if constexpr (sizeof(T) == 4) {
        const T* __restrict in = values;
        if (type == DType::f16) {
            Half* __restrict out = static_cast<Half*>(memory) + begin;
            for (int64_t i = 0; i < count; ++i) out[i] = from_float<Half>(in[i]);
            return;
        }
        if (type == DType::bf16) {
            BFloat16* __restrict out = static_cast<BFloat16*>(memory) + begin;
            for (int64_t i = 0; i < count; ++i) out[i] = from_float<BFloat16>(in[i]);
            return;
        }
    }
    T* const out = static_cast<T*>(memory) + begin;
    if (out != values) std::memcpy(out, values, sizeof(T) * static_cast<size_t>(count));
}

}  // namespace clk
