// What a matrix without full rank needs: reflections that are orthonormal for any input, and the damped solve of the
// gradient.
#pragma once

#include "orthogonal_qr_steps.h"

namespace clk {

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

}  // namespace clk
