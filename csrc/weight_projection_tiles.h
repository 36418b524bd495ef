// What an FTP step does with a tile of a parameter on the CPU, compiled for each instruction set: a tile stays in L1
// from its first stream to its last, so that 16-bit tensors are widened and narrowed there.
//
// Sums run over 64 bytes of lanes, whatever the instruction set, in the type of the values; a tile's sum is a double.
// So the rounding of a row's sum is that of kTile / 16 additions, and it does not depend on the threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/simd.h"
#include "weight_projection.h"
#include "weight_projection_math.h"

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

template <typename T>
CLK_INLINE void absolute(typename Lanes<T>::type& v) {
    v = v < T(0) ? -v : v;
}

// Adds what is left below a vector to the lanes, through an array: lanes written one by one would live in memory.
template <typename T, typename F>
CLK_INLINE void add_rest(typename Lanes<T>::type& lanes, int64_t from, int64_t count, const F& value) {
    constexpr int kLanes = Lanes<T>::count;
    if (from >= count) return;
    T rest[kLanes] = {};
    for (int j = 0; from < count; ++from, j = (j + 1) % kLanes) rest[j] += value(from);
    typename Lanes<T>::type v;
    std::memcpy(&v, rest, sizeof v);
    lanes += v;
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
    even += odd;
    add_rest<T>(even, i, count, [&](int64_t k) { return p[k] * q[k]; });
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
        absolute<T>(a);
        absolute<T>(b);
        even += a;
        odd += b;
    }
    even += odd;
    add_rest<T>(even, i, count, [&](int64_t k) { return p[k] < T(0) ? -p[k] : p[k]; });
    return sum_of_lanes<T>(even);
}

// What the sums of a row, or of a part of it, are. The radius leaves in kScale what is to be done with the row.
enum Sums : int { kDot, kLength, kMoved, kSums, kScale = kDot };

// The numbers of the base step; the other base's stay unused.
template <typename T>
struct BaseNumbers {
    AdamNumbers<T> adam;
    SgdNumbers<T> sgd;
    bool nesterov;
};

enum BaseStep : int { kAdam, kAmsgrad, kMomentum, kPlain, kBaseSteps };

// d <- w - anchor, w <- w - u, c <- w - anchor; moments are updated, as far as the base step has them. Everything is an
// argument of its own, and the numbers come by value: otherwise GCC 12 does not see that nothing overlaps, and leaves
// the loop scalar.
template <typename T, BaseStep base>
CLK_INLINE void step_body(const BaseNumbers<T> n, T* __restrict w, const T* __restrict g, T* __restrict m,
                          T* __restrict v, T* __restrict top, const T* __restrict a, T* __restrict d, T* __restrict c,
                          int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const T x = w[i];
        T u;
        if constexpr (base == kAdam || base == kAmsgrad) {
            T mean = m[i], square = v[i], most = base == kAmsgrad ? top[i] : T(0);
            u = adam_update<T, base == kAmsgrad>(x, g[i], mean, square, &most, n.adam);
            m[i] = mean;
            v[i] = square;
            if constexpr (base == kAmsgrad) top[i] = most;
        } else {
            T buffer = base == kMomentum ? m[i] : T(0);
            u = sgd_update<T, base == kMomentum>(x, g[i], buffer, n.sgd, n.nesterov);
            if constexpr (base == kMomentum) m[i] = buffer;
        }
        const T y = add_update(x, u, T(1)), anchor = a[i];
        w[i] = y;
        d[i] = x - anchor;
        c[i] = y - anchor;
    }
}

template <typename T>
CLK_INLINE void difference_body(T* __restrict d, const T* __restrict w, const T* __restrict a, int64_t count) {
    for (int64_t i = 0; i < count; ++i) d[i] = w[i] - a[i];
}

// Adds to the sums of `rows` rows that lie one after the other: <g,d>, and of d and c the L1 norm or the square.
template <typename T>
CLK_INLINE void sums_body(bool l1, const T* grad, const T* before, const T* after, int64_t rows, int64_t columns,
                          double* sums) {
    for (int64_t row = 0; row < rows; ++row, sums += kSums) {
        const T *g = grad + row * columns, *d = before + row * columns, *c = after + row * columns;
        sums[kDot] += tile_dot(g, d, columns);
        sums[kLength] += l1 ? tile_length(d, columns) : tile_dot(d, d, columns);
        sums[kMoved] += l1 ? tile_length(c, columns) : tile_dot(c, c, columns);
    }
}

// w <- a + s (w - a)
template <typename T>
CLK_INLINE void rescale_body(T* __restrict w, const T* __restrict a, T s, int64_t count) {
    for (int64_t i = 0; i < count; ++i) w[i] = a[i] + s * (w[i] - a[i]);
}

// w <- a, a <- keep (w - a), as 0 where it is not kept
template <typename T>
CLK_INLINE void collapse_body(T* __restrict w, T* __restrict a, bool keep, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const T c = w[i] - a[i];
        w[i] = a[i];
        a[i] = keep ? c : T(0);
    }
}

template <typename S>
CLK_INLINE void widen_body(float* __restrict out, const void* memory, int64_t begin, int64_t count) {
    const S* __restrict in = static_cast<const S*>(memory) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
template <typename S>
CLK_INLINE void narrow_body(const float* __restrict in, void* memory, int64_t begin, int64_t count) {
    S* __restrict out = static_cast<S*>(memory) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<S>(in[i]);
}

template <typename T>
struct TileOperations {
    void (*step[kBaseSteps])(BaseNumbers<T>, T*, const T*, T*, T*, T*, const T*, T*, T*, int64_t);
    void (*difference)(T*, const T*, const T*, int64_t);
    void (*sums)(bool, const T*, const T*, const T*, int64_t, int64_t, double*);
    void (*rescale)(T*, const T*, T, int64_t);
    void (*collapse)(T*, T*, bool, int64_t);
    void (*widen[2])(float*, const void*, int64_t, int64_t);  // from f16 and from bf16
    void (*narrow[2])(const float*, void*, int64_t, int64_t);
};

#define CLK_FTP_OPERATIONS(NAME, TARGET)                                                                           \
    template <typename T>                                                                                          \
    struct NAME {                                                                                                  \
        template <BaseStep base>                                                                                   \
        TARGET static void step(BaseNumbers<T> n, T* __restrict w, const T* __restrict g, T* __restrict m,         \
                                T* __restrict v, T* __restrict top, const T* __restrict a, T* __restrict d,        \
                                T* __restrict c, int64_t count) {                                                  \
            step_body<T, base>(n, w, g, m, v, top, a, d, c, count);                                                \
        }                                                                                                          \
        TARGET static void difference(T* d, const T* w, const T* a, int64_t count) {                               \
            difference_body(d, w, a, count);                                                                       \
        }                                                                                                          \
        TARGET static void sums(bool l1, const T* g, const T* d, const T* c, int64_t rows, int64_t columns,        \
                                double* out) {                                                                     \
            sums_body(l1, g, d, c, rows, columns, out);                                                            \
        }                                                                                                          \
        TARGET static void rescale(T* w, const T* a, T s, int64_t count) { rescale_body(w, a, s, count); }         \
        TARGET static void collapse(T* w, T* a, bool keep, int64_t count) { collapse_body(w, a, keep, count); }    \
        template <typename S>                                                                                      \
        TARGET static void widen(float* out, const void* in, int64_t begin, int64_t count) {                       \
            widen_body<S>(out, in, begin, count);                                                                  \
        }                                                                                                          \
        template <typename S>                                                                                      \
        TARGET static void narrow(const float* in, void* out, int64_t begin, int64_t count) {                      \
            narrow_body<S>(in, out, begin, count);                                                                 \
        }                                                                                                          \
        static constexpr TileOperations<T> table{{&step<kAdam>, &step<kAmsgrad>, &step<kMomentum>, &step<kPlain>}, \
                                                 &difference,                                                      \
                                                 &sums,                                                            \
                                                 &rescale,                                                         \
                                                 &collapse,                                                        \
                                                 {&widen<Half>, &widen<BFloat16>},                                 \
                                                 {&narrow<Half>, &narrow<BFloat16>}};                              \
    };

CLK_FTP_OPERATIONS(BaseTiles, )
CLK_FTP_OPERATIONS(Avx2Tiles, CLK_TARGET_AVX2)
CLK_FTP_OPERATIONS(Avx512Tiles, CLK_TARGET_AVX512)
#undef CLK_FTP_OPERATIONS

template <typename T>
const TileOperations<T>& tile_operations() {
    switch (isa()) {
        case Isa::avx512:
            return Avx512Tiles<T>::table;
        case Isa::avx2:
            return Avx2Tiles<T>::table;
        default:
            return BaseTiles<T>::table;
    }
}

// `count` values from `begin` on, in the compute type: where they lie, or widened into `buffer`.
template <typename T>
T* tile_values(const TileOperations<T>& o, const void* memory, DType type, int64_t begin, int64_t count, T* buffer) {
    if constexpr (sizeof(T) == 4) {
        if (type == DType::f16 || type == DType::bf16) {
            o.widen[type == DType::bf16](buffer, memory, begin, count);
            return buffer;
        }
    }
    return static_cast<T*>(const_cast<void*>(memory)) + begin;
}

// Puts values back, rounded; nothing is done where they were worked on in place.
template <typename T>
void tile_store(const TileOperations<T>& o, void* memory, DType type, int64_t begin, int64_t count, const T* values) {
    if constexpr (sizeof(T) == 4) {
        if (type == DType::f16 || type == DType::bf16)
            return o.narrow[type == DType::bf16](values, memory, begin, count);
    }
    T* const out = static_cast<T*>(memory) + begin;
    if (out != values) std::memcpy(out, values, sizeof(T) * static_cast<size_t>(count));
}

}  // namespace clk
