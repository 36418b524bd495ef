// The steps of a pass between its products, for one matrix; see orthogonal_qr_passes.h for the whole and for Engine.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "orthogonal_qr.h"

#ifdef __CUDACC__
#define CLK_TEAM __device__ inline
#else
#define CLK_TEAM CLK_INLINE
#endif

namespace clk {

// One matrix, and where its results go.
template <typename T>
struct QrMatrix {
    const T* a;
    int64_t row_stride, column_stride;
    const T* floor;
    T *q, *r, *solve;
    int32_t* status;
};

template <typename T>
struct QrView {
    const T* data;
    int64_t row_stride, column_stride;
    CLK_TEAM double operator()(int64_t i, int64_t j) const {
        return static_cast<double>(data[i * row_stride + j * column_stride]);
    }
};

// Memory of one matrix: ld x ld arrays of which n x n are in use, `work` with rows of 2 ld, vectors of ld.
struct QrSpace {
    double* work;     // [G | I] before, [R | R^-T] after an elimination
    double* total;    // R of all passes so far
    double* inverse;  // R^-T of all passes so far
    double* other;    // for a product
    double* scale;    // power of two of each column of the input that brings it to a length in [1, 2)
    double* limit;    // squared pivots must be above
    double* line;     // 2 ld: a row in elimination, or whatever is local to one step
    double* numbers;  // 8: results of sums
};

CLK_HOST_DEVICE inline int64_t qr_space_doubles(int64_t ld) { return 5 * ld * ld + 4 * ld + 8; }

CLK_TEAM QrSpace qr_space(double* memory, int64_t ld) {
    QrSpace s;
    s.work = memory;
    s.total = s.work + 2 * ld * ld;
    s.inverse = s.total + ld * ld;
    s.other = s.inverse + ld * ld;
    s.scale = s.other + ld * ld;
    s.limit = s.scale + ld;
    s.line = s.limit + ld;
    s.numbers = s.line + 2 * ld;
    return s;
}

// 2^-k with x 4^-k in [1, 4): brings a column of squared length x to a length in [1, 2).
CLK_TEAM double scale_for(double x) {
    if (!(x > 0.0) || !(x < HUGE_VAL)) return 1.0;
    const int e = ilogb(x);
    return ldexp(1.0, -(e >= 0 ? e / 2 : -((1 - e) / 2)));
}

// Scales the columns of the input by their sums. Squares of doubles overflow from 1e154 on and vanish below 1e-162;
// squares of floats fit into doubles.
template <typename T, typename Engine>
CLK_TEAM void scale_input(Engine& e, const QrView<T>& a) {
    const QrSpace& s = e.space;
    e.sums(e.n, e.m, s.line, [&](int64_t i, int64_t j) { return fabs(a(i, j)) * 0x1p-20; });
    e.each(e.n, [&](int64_t j) {
        const double x = s.line[j];
        const int power = x > 0.0 && x < HUGE_VAL ? -20 - ilogb(x) : 0;
        s.scale[j] = x < HUGE_VAL ? ldexp(1.0, power < 960 ? power : 960) : NAN;  // NaN goes into the Gram matrix
    });
}

// Whether all columns have lengths whose squares have all their digits.
template <typename Engine>
CLK_TEAM bool in_range(Engine& e) {
    const QrSpace& s = e.space;
    e.sums(1, e.n, s.numbers, [&](int64_t j, int64_t) {
        const double x = s.work[j * 2 * e.ld + j];
        return x > 1e-250 && x < 1e250 ? 0.0 : 1.0;
    });
    return s.numbers[0] == 0.0;
}

// Scales the Gram matrix to columns of length [1, 2) and sets the limits of its pivots. False if it is not finite.
template <typename T, typename Engine>
CLK_TEAM bool scale_gram(Engine& e, const T* floor, double limit) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, row = 2 * e.ld;
    e.sums(1, n, s.numbers, [&](int64_t i, int64_t) { return s.work[i * row + i]; });
    if (!(s.numbers[0] < HUGE_VAL)) return false;
    e.each(n, [&](int64_t j) {
        const double length2 = s.work[j * row + j], factor = scale_for(length2);
        s.line[j] = factor;
        s.scale[j] *= factor;
        const double least = floor ? static_cast<double>(floor[j]) * s.scale[j] : 0.0;
        s.limit[j] = fmax(limit * length2 * factor * factor, least * least);
    });
    e.each2(n, n, [&](int64_t i, int64_t j) { s.work[i * row + j] *= s.line[i] * s.line[j]; });
    return true;
}

// Sum of squares of G - I over the columns that are there; sets the limits of the pivots as well.
template <typename Engine>
CLK_TEAM double distance_from_identity(Engine& e, double limit) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, row = 2 * e.ld;
    e.each(n, [&](int64_t j) { s.limit[j] = limit * s.work[j * row + j]; });
    e.sums(n, n, s.line, [&](int64_t i, int64_t j) {
        if (j < i || s.work[j * row + j] == 0.0) return 0.0;
        const double x = s.work[i * row + j] - (i == j ? 1.0 : 0.0);
        return i == j ? x * x : 2.0 * x * x;
    });
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += s.line[j];
    return sum;
}

// Squared bound of the condition of the scaled matrix: |R|_F^2 |R^-1|_F^2.
template <typename Engine>
CLK_TEAM double condition2(Engine& e) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, row = 2 * e.ld;
    e.sums(n, n, s.line, [&](int64_t i, int64_t j) { return s.work[i * row + j] * s.work[i * row + j]; });
    e.sums(n, n, s.line + e.ld, [&](int64_t i, int64_t j) {
        const double x = s.work[i * row + e.ld + j];
        return x * x;
    });
    double factor = 0.0, inverse = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        factor += s.line[j];
        inverse += s.line[e.ld + j];
    }
    return factor * inverse;
}

// total = R of this pass times total, and the like for the inverse: (R2 R1)^-T = R2^-T R1^-T.
template <typename Engine>
CLK_TEAM void compose(Engine& e, bool first) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld, row = 2 * ld;
    if (first) {
        e.each2(n, n, [&](int64_t i, int64_t j) {
            s.total[i * ld + j] = s.work[i * row + j] / s.scale[j];
            s.inverse[i * ld + j] = s.work[i * row + ld + j] * s.scale[j];
        });
        return;
    }
    const auto copy = [&](double* to) {
        e.each2(n, n, [&](int64_t i, int64_t j) { to[i * ld + j] = s.other[i * ld + j]; });
    };
    e.product(s.work, row, s.total, ld, s.other, ld);
    copy(s.total);
    e.product(s.work + ld, row, s.inverse, ld, s.other, ld);
    copy(s.inverse);
}

// Whether a column of `total`, R of a backward stable factorisation, has nothing of its own.
template <typename Engine>
CLK_TEAM bool lacks_rank(Engine& e, double u) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    e.sums(1, n, s.numbers, [&](int64_t j, int64_t) {
        double length2 = 0.0;  // of the column scaled to a length near 1
        for (int64_t i = 0; i <= j; ++i) {
            const double x = s.total[i * ld + j] * s.scale[j];
            length2 += x * x;
        }
        return s.total[j * ld + j] * s.scale[j] > 10.0 * n * u * sqrt(length2) ? 0.0 : 1.0;
    });
    return s.numbers[0] > 0.0;
}

// The largest column of |R^-1| |R| by its sum, for the scaled matrix: products with R^-1 in place of solves lose that
// much of A = Q R. It is small for most ill-conditioned matrices, and not for Kahan's.
template <typename Engine>
CLK_TEAM double growth(Engine& e) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    e.each(n, [&](int64_t k) {
        double sum = 0.0;
        for (int64_t i = 0; i <= k; ++i) sum += fabs(s.inverse[k * ld + i]) / s.scale[i];
        s.limit[k] = sum;
    });
    e.sums(n, n, s.line, [&](int64_t k, int64_t j) { return s.limit[k] * fabs(s.total[k * ld + j]) * s.scale[j]; });
    double largest = 0.0;
    for (int64_t j = 0; j < n; ++j) largest = fmax(largest, s.line[j]);
    return largest;
}

// r, solve and status from total and inverse. A matrix that is not finite is NaN throughout.
template <typename T, typename Engine>
CLK_TEAM void write_factors(Engine& e, const QrMatrix<T>& p, int32_t status) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    const bool lost = status == kQrNonFinite;
    e.each2(n, n, [&](int64_t i, int64_t j) {
        p.r[i * n + j] = static_cast<T>(j < i ? 0.0 : lost ? NAN : s.total[i * ld + j]);
        p.solve[i * n + j] = static_cast<T>(lost ? NAN : s.inverse[i * ld + j]);
        if (i + j == 0) *p.status = status;
    });
    if (lost) e.each(e.m * n, [&](int64_t t) { p.q[t] = static_cast<T>(NAN); });
}

}  // namespace clk
