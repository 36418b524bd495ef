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

#include "orthogonal_qr_rescue.h"
#include "orthogonal_qr_steps.h"

namespace clk {

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

// -- the matrices of a batch ------------------------------------------------------------------------------------------
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
