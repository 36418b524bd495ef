// The factorisation of one matrix, written once for a block of CUDA threads, for a CPU thread, and for a host test that
// plays the block. It goes in passes: Gram matrix, Cholesky factor and its inverse in double, Q = A R^-1 in double,
// rounded once. A float matrix whose condition is below 1e4 needs one pass, all others a second on the Q of the first.
//
// An Engine is a team of threads with the room they share and with the four products of a pass. Its team part is
//     each(count, f)              f(i) for every i < count, in any order, then a barrier
//     each2(rows, columns, f)     f(i, j) for every i < rows and j < columns, in any order, then a barrier
//     sums(count, terms, out, f)  out[j] = sum over i < terms of f(i, j) for every j < count, then a barrier
// Every thread runs everything outside of them and reads the same shared values there, so branches are taken together.
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

// A power of two near the largest column of R, and delta = 10 n u max R_jj in its unit; 0 and 0 for R = 0.
template <typename Engine>
CLK_TEAM void damping(Engine& e, double u, double& unit, double& delta) {
    const QrSpace& s = e.space;
    double largest = 0.0, pivot = 0.0;
    for (int64_t t = 0; t < e.n * e.n; ++t) {
        const int64_t i = t / e.n, j = t % e.n;
        if (j < i) continue;
        largest = fmax(largest, fabs(s.total[i * e.ld + j]));
        if (i == j) pivot = fmax(pivot, s.total[i * e.ld + j]);
    }
    unit = largest > 0.0 ? ldexp(1.0, ilogb(largest)) : 0.0;
    delta = largest > 0.0 ? 10.0 * e.n * u * (pivot / unit) : 0.0;
}

// inverse = R (R^T R + delta^2 I)^-1 through a Cholesky factor of the bracket. Its condition is at most 1 / delta^2,
// 1e10 with the delta of float: doubles can do that.
template <typename Engine>
CLK_TEAM void damped_by_cholesky(Engine& e, double u) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld, row = 2 * ld;
    double unit, delta;
    damping(e, u, unit, delta);
    if (!(unit > 0.0)) {
        e.each2(n, n, [&](int64_t i, int64_t j) { s.inverse[i * ld + j] = 0.0; });
        return;
    }
    e.each2(n, n, [&](int64_t i, int64_t j) {
        s.inverse[i * ld + j] = s.total[i * ld + j] / unit;
        s.other[j * ld + i] = s.total[i * ld + j] / unit;
    });
    e.product(s.other, ld, s.inverse, ld, s.work, row);
    e.each2(n, n, [&](int64_t i, int64_t j) {
        s.work[i * row + ld + j] = i == j ? 1.0 : 0.0;
        if (i == j) s.work[i * row + i] += delta * delta;
        if (i == 0) s.limit[j] = 0.0;
    });
    e.eliminate(false);  // [L^T | L^-1]
    e.each2(n, n, [&](int64_t i, int64_t j) { s.other[j * ld + i] = s.work[i * row + ld + j]; });
    e.product(s.inverse, ld, s.other, ld, s.work, row);
    e.product(s.work, row, s.work + ld, row, s.inverse, ld);
    e.each2(n, n, [&](int64_t i, int64_t j) { s.inverse[i * ld + j] /= unit; });
}

// The same by singular values, for double, where R^T R has no digits left: one-sided Jacobi, R V = W with orthogonal
// columns, and the result is the sum of w v^T / (|w|^2 + delta^2). All pairs of a step are disjoint.
template <typename Engine>
CLK_TEAM void damped_by_jacobi(Engine& e, double u) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld, even = n + n % 2, pairs = even / 2;
    double unit, delta;
    damping(e, u, unit, delta);
    if (!(unit > 0.0)) {
        e.each2(n, n, [&](int64_t i, int64_t j) { s.inverse[i * ld + j] = 0.0; });
        return;
    }
    e.each2(n, n, [&](int64_t i, int64_t j) {
        s.work[i * 2 * ld + j] = s.total[i * ld + j] / unit;
        s.work[i * 2 * ld + ld + j] = i == j ? 1.0 : 0.0;
    });
    double* const dots = s.other;  // 3 for each pair
    for (int sweep = 0; sweep < 30; ++sweep) {
        double turned = 0.0;
        for (int64_t step = 0; step + 1 < even; ++step) {
            // Round robin: the last stays, the others go round.
            const auto first = [&](int64_t k) { return k == 0 ? even - 1 : (step + k) % (even - 1); };
            const auto second = [&](int64_t k) { return (step + even - 1 - k) % (even - 1); };
            e.sums(3 * pairs, n, dots, [&](int64_t i, int64_t j) {
                const int64_t p = first(j / 3), q = second(j / 3);
                if (p >= n || q >= n) return 0.0;
                const double x = s.work[i * 2 * ld + (j % 3 == 1 ? q : p)];
                return x * s.work[i * 2 * ld + (j % 3 == 0 ? p : q)];
            });
            const auto turns = [&](int64_t k) {
                return fabs(dots[3 * k + 2]) > 1e-15 * sqrt(dots[3 * k]) * sqrt(dots[3 * k + 1]);
            };
            e.sums(1, pairs, s.numbers, [&](int64_t k, int64_t) { return turns(k) ? 1.0 : 0.0; });
            turned += s.numbers[0];
            e.each2(pairs, 2 * n, [&](int64_t k, int64_t i) {
                const int64_t p = first(k), q = second(k);
                if (!turns(k)) return;
                const double zeta = (dots[3 * k + 1] - dots[3 * k]) / (2.0 * dots[3 * k + 2]);
                const double tangent = (zeta < 0.0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
                const double c = 1.0 / sqrt(1.0 + tangent * tangent), d = c * tangent;
                double* const row = s.work + (i < n ? i * 2 * ld : (i - n) * 2 * ld + ld);
                const double x = row[p], y = row[q];
                row[p] = c * x - d * y;
                row[q] = d * x + c * y;
            });
        }
        if (turned == 0.0) break;
    }
    e.sums(n, n, s.line, [&](int64_t i, int64_t j) { return s.work[i * 2 * ld + j] * s.work[i * 2 * ld + j]; });
    e.each2(n, n, [&](int64_t i, int64_t j) {
        double sum = 0.0;
        for (int64_t k = 0; k < n; ++k) {
            sum += s.work[i * 2 * ld + k] * s.work[j * 2 * ld + ld + k] / (s.line[k] + delta * delta);
        }
        s.inverse[i * ld + j] = sum / unit;
    });
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

// Householder reflections in place in q, one column after the other; orthonormal whatever the input. The vectors lie
// below the diagonal, R of the scaled input in `total`.
template <typename T, typename Engine>
CLK_TEAM void householder(Engine& e, const QrMatrix<T>& p) {
    const QrSpace& s = e.space;
    const int64_t m = e.m, n = e.n, ld = e.ld;
    const QrView<T> a{p.a, p.row_stride, p.column_stride};
    T* const q = p.q;
    e.each2(m, n, [&](int64_t i, int64_t j) {
        q[i * n + j] = static_cast<T>(a(i, j) * s.scale[j]);
        if (i < n) s.total[i * ld + j] = 0.0;
    });
    double* const tau = s.limit;
    for (int64_t k = 0; k < n; ++k) {
        e.sums(1, m - k, s.numbers, [&](int64_t i, int64_t) {
            const double x = static_cast<double>(q[(k + i) * n + k]);
            return x * x;
        });
        const double length = sqrt(s.numbers[0]), head = static_cast<double>(q[k * n + k]);
        const double beta = head > 0.0 ? -length : length;  // of the other sign: no cancellation in head - beta
        const bool none = !(length > 0.0);
        e.each(m - k, [&](int64_t i) {
            if (i == 0) {
                tau[k] = none ? 0.0 : (beta - head) / beta;
                s.total[k * ld + k] = none ? 0.0 : beta;
            } else if (!none) {
                q[(k + i) * n + k] = static_cast<T>(static_cast<double>(q[(k + i) * n + k]) / (head - beta));
            }
        });
        const int64_t rest = n - k - 1;
        e.sums(rest, m - k, s.line, [&](int64_t i, int64_t j) {
            const double v = i == 0 ? 1.0 : static_cast<double>(q[(k + i) * n + k]);
            return v * static_cast<double>(q[(k + i) * n + k + 1 + j]);
        });
        e.each2(m - k, rest, [&](int64_t i, int64_t j) {
            const double v = i == 0 ? 1.0 : static_cast<double>(q[(k + i) * n + k]);
            const double x = static_cast<double>(q[(k + i) * n + k + 1 + j]) - tau[k] * v * s.line[j];
            q[(k + i) * n + k + 1 + j] = static_cast<T>(x);
            if (i == 0) s.total[k * ld + k + 1 + j] = x;
        });
    }
    // Q = H_0 ... H_{n-1} I from the last to the first, each column replacing its vector.
    for (int64_t k = n - 1; k >= 0; --k) {
        const int64_t rest = n - k - 1;
        e.sums(rest, m - k, s.line, [&](int64_t i, int64_t j) {  // row k of the columns to the right is still 0
            return i == 0 ? 0.0
                          : static_cast<double>(q[(k + i) * n + k]) * static_cast<double>(q[(k + i) * n + k + 1 + j]);
        });
        e.each2(m - k, rest, [&](int64_t i, int64_t j) {
            T& x = q[(k + i) * n + k + 1 + j];
            x = static_cast<T>(i == 0 ? -tau[k] * s.line[j]
                                      : static_cast<double>(x) -
                                            tau[k] * static_cast<double>(q[(k + i) * n + k]) * s.line[j]);
        });
        e.each(m, [&](int64_t i) {
            T& x = q[i * n + k];
            x = static_cast<T>(i < k ? 0.0 : i == k ? 1.0 - tau[k] : -tau[k] * static_cast<double>(x));
        });
    }
    e.each2(m, n, [&](int64_t i, int64_t j) {  // diag(R) >= 0
        if (s.total[j * ld + j] < 0.0) q[i * n + j] = -q[i * n + j];
    });
    e.each(n, [&](int64_t i) {
        const double sign = s.total[i * ld + i] < 0.0 ? -1.0 : 1.0;
        for (int64_t j = i; j < n; ++j) s.total[i * ld + j] *= sign;
    });
}

// R^-T of `total` by substitution, a column of it for each i.
template <typename Engine>
CLK_TEAM void invert_total(Engine& e) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    e.each(n, [&](int64_t c) {
        for (int64_t i = 0; i < n; ++i) {
            double sum = i == c ? 1.0 : 0.0;
            for (int64_t k = c; k < i; ++k) sum -= s.total[k * ld + i] * s.inverse[k * ld + c];
            s.inverse[i * ld + c] = i < c ? 0.0 : sum / s.total[i * ld + i];
        }
    });
}

// The way out for a matrix that is too close to singular, or singular. `pivot`: a pivot was below its limit. The
// inverse is there if the status is good.
template <typename T, typename Engine>
CLK_TEAM int32_t by_householder(Engine& e, const QrMatrix<T>& p, bool pivot) {
    constexpr bool wide = sizeof(T) == 8;
    constexpr double u = wide ? 0x1p-53 : 0x1p-24;
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    householder(e, p);
    e.each2(n, n, [&](int64_t i, int64_t j) { s.total[i * ld + j] /= s.scale[j]; });
    if (lacks_rank(e, u) || (pivot && !wide)) return kQrDeficient;
    invert_total(e);
    return kQrOk;
}

enum class QrOutcome { done, nonfinite, dropped, pivot, unstable };

// Beside the team, an Engine has m, n, ld and space, and
//     gram(view, scale)     work = [G | I], G = S A^T A S (its upper triangle), S = diag(scale) or I where that is null
//     eliminate(drop)       [G | I] -> [R | R^-T] with their zeros. False if a pivot was not above its limit: it ends
//                           there, or if `drop` goes on with a row of zeros
//     apply(view, scale, q) q = A S R^-1, S as above; the view may be q itself
//     product(a, ..., out)  out = A B of n x n matrices, each with the length of its rows
//     kBlock                whether it is a block of CUDA threads, which must finish every matrix. The CPU's leaves
//                           doubles without full rank to its caller, who has LAPACK, and for floats has
//     fill(q)               unit vectors orthogonal to the others in place of dropped columns
template <typename T, typename Engine>
CLK_TEAM QrOutcome qr_passes(Engine& e, const QrMatrix<T>& p) {
    constexpr bool wide = sizeof(T) == 8;
    constexpr double u = wide ? 0x1p-53 : 0x1p-24;
    const QrSpace& s = e.space;
    const double limit = wide ? 10.0 * e.n * u : 0x1p-44;  // of squared pivots: 1e-7 and 2^-22 for the pivots
    const QrView<T> input{p.a, p.row_stride, p.column_stride}, output{p.q, e.n, 1};
    int shifts = 0;
    bool scaled = false, deficient = false;
    e.each(e.n, [&](int64_t j) { s.scale[j] = 1.0; });
    for (int pass = 0; pass < 8; ++pass) {
        const bool first = pass == 0;
        e.gram(first ? input : output, first && scaled ? s.scale : nullptr);
        if (wide && first && !scaled && !in_range(e)) {
            scale_input(e, input);
            scaled = true;
            pass = -1;
            continue;
        }
        double defect2 = 0.0;
        if (!first) {
            defect2 = distance_from_identity(e, limit);
        } else if (!scale_gram(e, p.floor, limit)) {
            return QrOutcome::nonfinite;
        }
        // The Gram matrix of doubles has no digits for a condition above 1e7. With a little on its diagonal the pass
        // leaves a Q of a condition that the next one can take (shifted CholeskyQR3), up to 1e13.
        if (pass < shifts) {
            e.each(e.n, [&](int64_t j) { s.work[j * 2 * e.ld + j] += 100.0 * e.n * u * (s.limit[j] / limit); });
        }
        const bool shifted = pass < shifts;
        // A float column that the CPU drops is below the rounding of its storage.
        const bool drop = p.floor || (!Engine::kBlock && !wide);
        if (!e.eliminate(drop) && !p.floor) {
            if (wide && !shifted && pass < 2) {
                shifts = pass + 1;
                scaled = true;
                --pass;
                continue;
            }
            if (Engine::kBlock || wide) return QrOutcome::pivot;
            deficient = true;
        }
        if (pass == 6 && !drop) return QrOutcome::unstable;
        const bool good = first ? !wide && condition2(e) <= 1e8 : !shifted && defect2 <= 0.25;
        compose(e, first);
        e.apply(first ? input : output, first ? s.scale : nullptr, p.q);
        if (good) break;
    }
    if (wide && !p.floor) {
        // Q is orthonormal by now, but the residual may have grown. Measured on Kahan's matrices and on random ones to
        // a condition of 1e13: it stays below 1e-14 up to this limit, which random ones reach at 1e10.
        if (growth(e) > 400.0 * sqrt(static_cast<double>(e.n))) return QrOutcome::unstable;
        if (shifts > 0 && lacks_rank(e, u)) return QrOutcome::unstable;
    }
    return deficient ? QrOutcome::dropped : QrOutcome::done;
}

// One matrix from input to factors.
template <typename T, typename Engine>
CLK_TEAM void qr_matrix(Engine& e, const QrMatrix<T>& p) {
    constexpr bool wide = sizeof(T) == 8;
    constexpr double u = wide ? 0x1p-53 : 0x1p-24;
    const QrOutcome outcome = qr_passes(e, p);
    int32_t status = kQrOk;
    if (outcome == QrOutcome::nonfinite) {
        status = kQrNonFinite;
    } else if (outcome == QrOutcome::pivot || outcome == QrOutcome::unstable) {
        if constexpr (Engine::kBlock) {
            status = by_householder(e, p, outcome == QrOutcome::pivot);
        } else {
            *p.status = kQrDeclined;
            return;
        }
    } else if (outcome == QrOutcome::dropped) {
        status = kQrDeficient;
        if constexpr (!Engine::kBlock && !wide) e.fill(p.q);
    }
    if (status == kQrDeficient) {
        if constexpr (!wide) {
            damped_by_cholesky(e, u);
        } else if constexpr (Engine::kBlock) {
            damped_by_jacobi(e, u);
        }
    }
    write_factors(e, p, status);
}

// -- the backward ---------------------------------------------------------------------------------------------------
template <typename T>
struct QrGradient {
    const T *gq, *gr;
    int64_t gq_row, gq_column, gr_row, gr_column;
    const T *q, *r, *solve;
    T* ga;
};

// gA = (gQ + Q C) S with M = R gR^T - gQ^T Q and C the symmetric matrix that has M's lower triangle. An Engine has
//     cross(x, y)                work = X^T Y on and below the diagonal, rows of 2 ld
//     combine(x, y, c, s, out)   out = (X + Y C) S; x may be null
template <typename T, typename Engine>
CLK_TEAM void qr_backward_matrix(Engine& e, const QrGradient<T>& p) {
    const QrSpace& s = e.space;
    const int64_t n = e.n, ld = e.ld;
    const QrView<T> gq{p.gq, p.gq_row, p.gq_column}, q{p.q, n, 1}, gr{p.gr, p.gr_row, p.gr_column}, r{p.r, n, 1};
    if (p.gr) {  // below its diagonal gR does not count
        e.each2(n, n, [&](int64_t i, int64_t j) {
            s.other[i * ld + j] = r(i, j);
            s.total[j * ld + i] = j >= i ? gr(i, j) : 0.0;
        });
        e.product(s.other, ld, s.total, ld, s.inverse, ld);
    }
    if (p.gq) e.cross(gq, q);
    e.each2(n, n, [&](int64_t i, int64_t j) {
        if (j > i) return;
        const double x = (p.gr ? s.inverse[i * ld + j] : 0.0) - (p.gq ? s.work[i * 2 * ld + j] : 0.0);
        s.other[i * ld + j] = x;
        s.other[j * ld + i] = x;
    });
    e.each2(n, n, [&](int64_t i, int64_t j) { s.inverse[i * ld + j] = static_cast<double>(p.solve[i * n + j]); });
    e.combine(gq, q, s.other, s.inverse, p.ga);
}

// -- the products of a block of threads -------------------------------------------------------------------------------
constexpr int64_t kQrStage = 4096;  // doubles for rows on their way through a product, or for partial sums
constexpr int64_t kQrTile = 4;      // a thread computes 4 x 4 results at a time
constexpr int64_t kQrItems = 256;   // of these at once: kQrItems kQrTile^2 = kQrStage

// The Engine made of a team: ld = n, so an array of n x n is whole.
template <typename T, typename Team>
struct QrBlockEngine : Team {
    static constexpr bool kBlock = true;
    int64_t m, n, ld;
    QrSpace space;
    double* stage;

    CLK_TEAM QrBlockEngine(const Team& team, int64_t m_, int64_t n_, double* memory, double* stage_)
        : Team(team), m(m_), n(n_), ld(n_), space(qr_space(memory, n_)), stage(stage_) {}

    // The triangle of X^T Y in tiles, rows in slices whose sums are added up in order: above the diagonal, or below it.
    CLK_TEAM void triangle(const QrView<T>& x, const QrView<T>& y, const double* scale, bool above) const {
        const int64_t tiles = (n + kQrTile - 1) / kQrTile, pairs = tiles * (tiles + 1) / 2, height = m, width = n;
        const int64_t slices = pairs < kQrItems ? kQrItems / pairs : 1;
        double* const partial = stage;
        double* const work = space.work;
        const auto place = [&](int64_t pair, int64_t& i0, int64_t& j0) {
            int64_t low = 0;
            while (pair >= tiles - low) pair -= tiles - low++;
            i0 = kQrTile * (above ? low : low + pair);
            j0 = kQrTile * (above ? low + pair : low);
        };
        const auto put = [&](int64_t i, int64_t j, double value) {
            if (i < width && j < width && (above ? j >= i : j <= i)) work[i * 2 * width + j] = value;
        };
        this->each2(n, n, [&](int64_t i, int64_t j) {
            work[i * 2 * width + j] = 0.0;
            work[i * 2 * width + width + j] = i == j ? 1.0 : 0.0;
        });
        this->each(pairs * slices, [&](int64_t item) {
            int64_t i0, j0;
            place(item % pairs, i0, j0);
            double sum[kQrTile][kQrTile] = {};
            for (int64_t k = item / pairs; k < height; k += slices) {
                double a[kQrTile], b[kQrTile];
                for (int c = 0; c < kQrTile; ++c) {
                    const int64_t i = i0 + c, j = j0 + c;
                    a[c] = i < width ? x(k, i) * (scale ? scale[i] : 1.0) : 0.0;
                    b[c] = j < width ? y(k, j) * (scale ? scale[j] : 1.0) : 0.0;
                }
                for (int r = 0; r < kQrTile; ++r) {
                    for (int c = 0; c < kQrTile; ++c) sum[r][c] += a[r] * b[c];
                }
            }
            for (int r = 0; r < kQrTile; ++r) {
                for (int c = 0; c < kQrTile; ++c) {
                    if (slices > 1) {
                        partial[item * kQrTile * kQrTile + r * kQrTile + c] = sum[r][c];
                    } else {
                        put(i0 + r, j0 + c, sum[r][c]);
                    }
                }
            }
        });
        if (slices == 1) return;
        this->each(pairs * kQrTile * kQrTile, [&](int64_t t) {
            int64_t i0, j0;
            place(t / (kQrTile * kQrTile), i0, j0);
            double sum = 0.0;
            for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * pairs * kQrTile * kQrTile + t];
            put(i0 + t / kQrTile % kQrTile, j0 + t % kQrTile, sum);
        });
    }

    CLK_TEAM void gram(const QrView<T>& v, const double* scale) const { triangle(v, v, scale, true); }
    CLK_TEAM void cross(const QrView<T>& x, const QrView<T>& y) const { triangle(x, y, nullptr, false); }

    CLK_TEAM bool eliminate(bool drop) const {
        const int64_t width = n, row = 2 * n;
        double *const work = space.work, *const line = space.line;
        bool regular = true;
        for (int64_t k = 0; k < n; ++k) {
            const double pivot = work[k * row + k];
            const bool good = pivot > space.limit[k];
            if (!good && !drop) return false;
            regular = regular && good;
            const double factor = good ? 1.0 / sqrt(pivot) : 0.0;
            this->each(row, [&](int64_t c) {
                const bool there = good && (c < width ? c >= k : c <= width + k);
                line[c] = there ? work[k * row + c] * factor : 0.0;
            });
            this->each2(n - k, n + 1, [&](int64_t r, int64_t c) {  // columns k to n - 1 of R, 0 to k of its inverse
                const int64_t i = k + r, j = c < width - k ? k + c : width + c - (width - k);
                if (j < i && j < width) return;  // below the diagonal all is zero
                double& x = work[i * row + j];
                x = i == k ? line[j] : x - line[i] * line[j];
            });
        }
        return regular;
    }

    CLK_TEAM void product(const double* a, int64_t lda, const double* b, int64_t ldb, double* out, int64_t ldo) const {
        const int64_t depth = n;
        this->each2(n, n, [&](int64_t i, int64_t j) {
            double sum = 0.0;
            for (int64_t k = 0; k < depth; ++k) sum += a[i * lda + k] * b[k * ldb + j];
            out[i * ldo + j] = sum;
        });
    }

    // put(row, j, value) of `count` staged rows times a matrix of `factor(k, j)`, k < depth(j0): rows in strides, so
    // that neighbouring threads read neighbouring rows, whose odd length keeps them in different banks.
    template <typename Factor, typename Put>
    CLK_TEAM void staged_product(const double* rows, int64_t length, int64_t count, bool upper, const Factor& factor,
                                 const Put& put) const {
        const int64_t groups = (count + kQrTile - 1) / kQrTile, tiles = (n + kQrTile - 1) / kQrTile, width = n;
        this->each2(tiles, groups, [&](int64_t tile, int64_t group) {
            const int64_t j0 = tile * kQrTile, depth = upper && j0 + kQrTile < width ? j0 + kQrTile : width;
            double sum[kQrTile][kQrTile] = {};
            for (int64_t k = 0; k < depth; ++k) {
                double a[kQrTile], b[kQrTile];
                for (int c = 0; c < kQrTile; ++c) {
                    const int64_t i = group + c * groups;
                    a[c] = i < count ? rows[i * length + k] : 0.0;
                    b[c] = j0 + c < width ? factor(k, j0 + c) : 0.0;
                }
                for (int r = 0; r < kQrTile; ++r) {
                    for (int c = 0; c < kQrTile; ++c) sum[r][c] += a[r] * b[c];
                }
            }
            for (int r = 0; r < kQrTile; ++r) {
                for (int c = 0; c < kQrTile; ++c) {
                    if (group + r * groups < count && j0 + c < width) put(group + r * groups, j0 + c, sum[r][c]);
                }
            }
        });
    }

    CLK_TEAM void apply(const QrView<T>& v, const double* scale, T* q) const {
        const int64_t length = n | 1, width = n, step = kQrStage / length / kQrTile * kQrTile;
        double *const rows = stage, *const work = space.work;
        for (int64_t first = 0; first < m; first += step) {
            const int64_t count = m - first < step ? m - first : step;
            this->each2(count, n, [&](int64_t i, int64_t j) {
                rows[i * length + j] = v(first + i, j) * (scale ? scale[j] : 1.0);
            });
            staged_product(
                rows, length, count, true, [&](int64_t k, int64_t j) { return work[j * 2 * width + width + k]; },
                [&](int64_t i, int64_t j, double value) { q[(first + i) * width + j] = static_cast<T>(value); });
        }
    }

    CLK_TEAM void combine(const QrView<T>& x, const QrView<T>& y, const double* c, const double* s, T* out) const {
        const int64_t length = n | 1, width = n, step = kQrStage / (2 * length) / kQrTile * kQrTile;
        double *const rows = stage, *const sums = stage + step * length;
        for (int64_t first = 0; first < m; first += step) {
            const int64_t count = m - first < step ? m - first : step;
            this->each2(count, n, [&](int64_t i, int64_t j) {
                rows[i * length + j] = y(first + i, j);
                sums[i * length + j] = x.data ? x(first + i, j) : 0.0;
            });
            staged_product(
                rows, length, count, false, [&](int64_t k, int64_t j) { return c[k * width + j]; },
                [&](int64_t i, int64_t j, double value) { sums[i * length + j] += value; });
            staged_product(
                sums, length, count, false, [&](int64_t k, int64_t j) { return s[k * width + j]; },
                [&](int64_t i, int64_t j, double value) { out[(first + i) * width + j] = static_cast<T>(value); });
        }
    }
};

constexpr int64_t kQrMostColumns = 480;  // four staged rows, twice, must fit

// Matrix `i` of a batch.
template <typename T>
CLK_TEAM QrMatrix<T> qr_matrix_of(const QrBatch& b, int64_t i) {
    const int64_t mn = b.m * b.n, nn = b.n * b.n;
    return {static_cast<const T*>(b.a) + i * b.batch_stride,
            b.row_stride,
            b.column_stride,
            b.floor ? static_cast<const T*>(b.floor) + i * b.n : nullptr,
            static_cast<T*>(b.q) + i * mn,
            static_cast<T*>(b.r) + i * nn,
            static_cast<T*>(b.solve) + i * nn,
            b.status + i};
}

template <typename T>
CLK_TEAM QrGradient<T> qr_gradient_of(const QrGradients& b, int64_t i) {
    const int64_t mn = b.m * b.n, nn = b.n * b.n;
    return {b.gq ? static_cast<const T*>(b.gq) + i * b.gq_matrix : nullptr,
            b.gr ? static_cast<const T*>(b.gr) + i * b.gr_matrix : nullptr,
            b.gq_row,
            b.gq_column,
            b.gr_row,
            b.gr_column,
            static_cast<const T*>(b.q) + i * mn,
            static_cast<const T*>(b.r) + i * nn,
            static_cast<const T*>(b.solve) + i * nn,
            static_cast<T*>(b.ga) + i * mn};
}

}  // namespace clk
