// Thin matrix products for the CPU step, written once and compiled for each instruction set (common/simd.h).
//
// Both are C = A B with the rows of B contiguous ("outer" form, which broadcasts A), or C = A B^T with the rows of A
// and B contiguous ("inner" form, which needs a sum across the vector). With kAdd the product is added to C:
// accumulators start at zero all the same, so that a sum is rounded at its own size and only once at that of C.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"

namespace clk {

template <typename T, int Bytes>
struct Vec {
    typedef T type __attribute__((vector_size(Bytes)));
    static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
};

// Vectors go by reference: by value their calling convention would depend on the target.
template <typename V, typename T>
CLK_INLINE void load(V& v, const T* p) {
    std::memcpy(&v, p, sizeof(V));
}

template <typename V, typename T>
CLK_INLINE void store(T* p, const V& v) {
    std::memcpy(p, &v, sizeof(V));
}

// C[MR, NV vectors] = A[MR, k] B[k, NV vectors]; A by any strides, B and C by rows.
template <typename T, int Bytes, int MR, int NV, bool kAdd>
CLK_INLINE void outer_tile(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t k) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    V acc[MR][NV] = {};
    for (int64_t q = 0; q < k; ++q) {
        V row[NV];
        for (int j = 0; j < NV; ++j) load(row[j], b + q * bs + j * L);
        for (int i = 0; i < MR; ++i) {
            const T x = a[i * as + q * ak];
            for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < MR; ++i) {
        for (int j = 0; j < NV; ++j) {
            if constexpr (kAdd) {
                V old;
                load(old, c + i * cs + j * L);
                acc[i][j] += old;
            }
            store(c + i * cs + j * L, acc[i][j]);
        }
    }
}

// One panel of NV vectors of B for all rows: it stays in L1 from tile to tile.
template <typename T, int Bytes, int MR, int NV, bool kAdd>
CLK_INLINE void outer_panel(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                            int64_t k) {
    int64_t i = 0;
    for (; i + MR <= m; i += MR) outer_tile<T, Bytes, MR, NV, kAdd>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
    if (MR > 4 && i + 4 <= m) {
        outer_tile<T, Bytes, 4, NV, kAdd>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        i += 4;
    }
    switch (m - i) {
        case 3:
            return outer_tile<T, Bytes, 3, NV, kAdd>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        case 2:
            return outer_tile<T, Bytes, 2, NV, kAdd>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        case 1:
            return outer_tile<T, Bytes, 1, NV, kAdd>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        default:
            return;
    }
}

// C[m, n] = A[m, k] B[k, n]. Tiles hold 16 accumulators where they can: two multiply-adds a cycle, four deep, need 8.
template <typename T, int Bytes, bool kAdd>
CLK_INLINE void outer(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                      int64_t n, int64_t k) {
    constexpr int L = Vec<T, Bytes>::lanes;
    int64_t j = 0;
    for (; j + 4 * L <= n; j += 4 * L) outer_panel<T, Bytes, 4, 4, kAdd>(a, as, ak, b + j, bs, c + j, cs, m, k);
    for (; j + 2 * L <= n; j += 2 * L) outer_panel<T, Bytes, 8, 2, kAdd>(a, as, ak, b + j, bs, c + j, cs, m, k);
    for (; j + L <= n; j += L) outer_panel<T, Bytes, 8, 1, kAdd>(a, as, ak, b + j, bs, c + j, cs, m, k);
    if (j == n) return;
    if (!kAdd && n >= L) {  // the last vector overlaps the one before: the same values are written twice
        outer_panel<T, Bytes, 8, 1, kAdd>(a, as, ak, b + n - L, bs, c + n - L, cs, m, k);
        return;
    }
    if constexpr (Bytes > 16) {  // ranks below a vector are common: measured, 7 to 20 of 128 at 95 % of the energy
        outer<T, Bytes / 2, kAdd>(a, as, ak, b + j, bs, c + j, cs, m, n - j, k);
    } else {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t jj = j; jj < n; ++jj) {
                T sum = 0;
                for (int64_t q = 0; q < k; ++q) sum += a[i * as + q * ak] * b[q * bs + jj];
                c[i * cs + jj] = kAdd ? c[i * cs + jj] + sum : sum;
            }
        }
    }
}

// The sum over the lanes of one vector, halving it: the same order every time.
template <typename T, int Bytes>
CLK_INLINE T lane_sum(const typename Vec<T, Bytes>::type& v) {
    T x[Vec<T, Bytes>::lanes];
    std::memcpy(x, &v, sizeof(v));
    for (int half = Vec<T, Bytes>::lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
}

// Groups of `Width` lanes of a and b in turn, lower halves plus upper halves.
template <typename T, int Bytes, int Width>
CLK_INLINE void fold(typename Vec<T, Bytes>::type& out, const typename Vec<T, Bytes>::type& a,
                     const typename Vec<T, Bytes>::type& b) {
    using Index = typename Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    Index low, high;
    for (int i = 0; i < L; ++i) {
        const int group = i / Width, from = (group % 2) * L + (group / 2) * Width + i % Width;
        low[i] = from;
        high[i] = from + L / 2;
    }
    out = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The lane sums of four vectors: 13 operations in place of 32.
template <typename T, int Bytes>
CLK_INLINE void lane_sums(const typename Vec<T, Bytes>::type* v, T* out) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    if constexpr (L < 4) {
        for (int j = 0; j < 4; ++j) out[j] = lane_sum<T, Bytes>(v[j]);
    } else {
        V a, b, c;
        fold<T, Bytes, 1>(a, v[0], v[1]);
        fold<T, Bytes, 1>(b, v[2], v[3]);
        fold<T, Bytes, 2>(c, a, b);
        T x[L];
        std::memcpy(x, &c, sizeof(c));
        for (int j = 0; j < 4; ++j) {
            T sum = x[j];
            for (int i = 4; i < L; i += 4) sum += x[i + j];
            out[j] = sum;
        }
    }
}

template <typename T, int Bytes, int MR, int NR, bool kAdd>
CLK_INLINE void inner_tile(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t k) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    V acc[MR][NR] = {};
    int64_t q = 0;
    for (; q + L <= k; q += L) {
        V column[NR];
        for (int j = 0; j < NR; ++j) load(column[j], b + j * bs + q);
        for (int i = 0; i < MR; ++i) {
            V x;
            load(x, a + i * as + q);
            for (int j = 0; j < NR; ++j) acc[i][j] += x * column[j];
        }
    }
    for (int i = 0; i < MR; ++i) {
        T sums[NR];
        if constexpr (NR == 4) {
            lane_sums<T, Bytes>(acc[i], sums);
        } else {
            for (int j = 0; j < NR; ++j) sums[j] = lane_sum<T, Bytes>(acc[i][j]);
        }
        for (int j = 0; j < NR; ++j) {
            for (int64_t r = q; r < k; ++r) sums[j] += a[i * as + r] * b[j * bs + r];
            c[i * cs + j] = kAdd ? c[i * cs + j] + sums[j] : sums[j];
        }
    }
}

template <typename T, int Bytes, int MR, bool kAdd>
CLK_INLINE void inner_rows(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t n, int64_t k) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) inner_tile<T, Bytes, MR, 4, kAdd>(a, as, b + j * bs, bs, c + j, cs, k);
    for (; j < n; ++j) inner_tile<T, Bytes, MR, 1, kAdd>(a, as, b + j * bs, bs, c + j, cs, k);
}

// C[m, n] = A[m, k] B[n, k]^T.
template <typename T, int Bytes, bool kAdd>
CLK_INLINE void inner(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m, int64_t n,
                      int64_t k) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) inner_rows<T, Bytes, 4, kAdd>(a + i * as, as, b, bs, c + i * cs, cs, n, k);
    for (; i < m; ++i) inner_rows<T, Bytes, 1, kAdd>(a + i * as, as, b, bs, c + i * cs, cs, n, k);
}

}  // namespace clk
