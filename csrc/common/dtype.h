// Element types as the Python side names them (ops/_native.py: DTYPE), and 16-bit floats on the CPU.
#pragma once

#include <bit>
#include <cstdint>

namespace clk {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Storage only: arithmetic is done in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Branch-free apart from the selection of subnormals, so that it vectorises; exact for every input.
inline float to_float(Half x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // also turns half subnormals into floats
    uint32_t bits = std::bit_cast<uint32_t>(scaled);
    bits = (x.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits;  // inf and nan
    return std::bit_cast<float>(bits | sign);
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

// Round to nearest, ties to even; a nan stays a (quiet) nan.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return BFloat16{static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {  // nan
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal half: the float adder does the rounding
        half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return Half{static_cast<uint16_t>(half | sign)};
}

}  // namespace clk
