// The work of one block of threads on one small parameter, phase by phase. A kernel runs each phase with all its
// threads and a barrier between; a test runs the same phases thread by thread on the host, so that the index arithmetic
// and the order of sums are checked without a GPU.
#pragma once

#include <algorithm>
#include <type_traits>

#include "projection.h"
#include "projection_math.h"
#ifdef __CUDACC__
#include "common/math.cuh"
#else
#include "common/dtype.h"
#endif

namespace clk {

#ifndef __CUDACC__
template <typename W>
inline auto load(const W* p) {
    return to_float(*p);
}
inline void store(double* p, double x) { *p = x; }
template <typename W>
inline void store(W* p, float x) {
    *p = from_float<W>(x);
}
#endif

// Rows of the update that share each value read from a basis: the bases are most of what a step of few rows reads.
inline constexpr int kRows = 4;

// Doubles are computed with in double, everything else in float.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// As ProjectionSide, with matrix and scales of the compute type.
template <typename T>
struct BlockSide {
    const T* matrix;
    int64_t rank, row_stride, column_stride;
    T identity, span;
    SideForm form;

    CLK_HOST_DEVICE T operator()(int64_t row, int64_t column) const {
        return matrix[row * row_stride + column * column_stride];
    }
    CLK_HOST_DEVICE bool thin() const { return form == SideForm::basis || form == SideForm::twice; }
};

// W holds the weight and its gradient, S the moments. `u`, `other` and (where a side is applied twice) `rest` hold rows
// x columns values, `inner` the larger of rows x rank (right) and rank x columns (left).
template <typename W, typename S>
struct BlockWork {
    using T = Compute<S>;
    W* weight;
    const W* grad;
    S *exp_avg, *exp_avg_sq, *largest;
    int64_t rows, columns;
    BlockSide<T> left, right;
    T *u, *other, *rest, *inner;
};

// One parameter as a kernel gets it.
struct BlockEntry {
    void* weight;
    const void* grad;
    void *exp_avg, *exp_avg_sq, *largest;
    float* step;
    double steps;
    int64_t rows, columns, first_block, blocks;  // a block for each matrix of a batch
    ProjectionSide left, right;
    const double* scales;  // identity and span of both sides on the device, or null
    int64_t workspace;     // where its part begins, in values
};

// Values of workspace that each matrix of a parameter needs: the update alone, or all that its block writes on the way.
CLK_HOST_DEVICE inline int64_t matrix_values(int64_t rows, int64_t columns, const ProjectionSide& left,
                                             const ProjectionSide& right, bool whole) {
    if (whole) return rows * columns;
    const int64_t a = rows * right.rank, b = left.rank * columns;
    const bool twice = left.form == SideForm::twice || right.form == SideForm::twice;
    return (twice ? 3 : 2) * rows * columns + (a > b ? a : b);
}

template <typename T>
CLK_HOST_DEVICE inline BlockSide<T> block_side(const ProjectionSide& s, const double* scales) {
    return {static_cast<const T*>(s.matrix),
            s.rank,
            s.row_stride,
            s.column_stride,
            static_cast<T>(scales ? scales[0] : s.identity),
            static_cast<T>(scales ? scales[1] : s.span),
            s.form};
}

template <typename W, typename S>
CLK_HOST_DEVICE inline BlockWork<W, S> block_work(const BlockEntry& e, int64_t matrix, void* workspace) {
    using T = Compute<S>;
    const int64_t size = e.rows * e.columns, begin = matrix * size;
    BlockWork<W, S> w;
    w.weight = static_cast<W*>(e.weight) + begin;
    w.grad = static_cast<const W*>(e.grad) + begin;
    w.exp_avg = static_cast<S*>(e.exp_avg) + begin;
    w.exp_avg_sq = static_cast<S*>(e.exp_avg_sq) + begin;
    w.largest = e.largest ? static_cast<S*>(e.largest) + begin : nullptr;
    w.rows = e.rows;
    w.columns = e.columns;
    w.left = block_side<T>(e.left, e.scales);
    w.right = block_side<T>(e.right, e.scales ? e.scales + 2 : nullptr);
    w.u = static_cast<T*>(workspace) + e.workspace + matrix * matrix_values(e.rows, e.columns, e.left, e.right, false);
    w.other = w.u + size;
    w.rest = w.other + size;
    w.inner = w.left.form == SideForm::twice || w.right.form == SideForm::twice ? w.rest + size : w.rest;
    return w;
}

inline BlockEntry block_entry(const ProjectedParameter& p, const StepTensors& tensors, int64_t index,
                              int64_t first_block, int64_t workspace) {
    return {p.weight,  p.grad,
            p.exp_avg, p.exp_avg_sq,
            p.largest, p.step,
            p.steps,   p.rows,
            p.columns, first_block,
            p.batch,   p.left,
            p.right,   tensors.scales ? tensors.scales + 4 * index : nullptr,
            workspace};
}

// u[i] for i = first, first + step, ... below count.
template <typename W, typename S, typename T>
CLK_HOST_DEVICE inline void adam_phase(W* weight, const W* grad, S* exp_avg, S* exp_avg_sq, S* largest, T* u,
                                       const AdamNumbers<T>& n, int64_t first, int64_t step, int64_t count) {
    for (int64_t i = first; i < count; i += step) {
        T m = load(exp_avg + i), v = load(exp_avg_sq + i);
        const T p = load(weight + i), g = load(grad + i);
        if (largest) {
            T top = load(largest + i);
            u[i] = adam_update<T, true>(p, g, m, v, &top, n);
            store(largest + i, top);
        } else {
            u[i] = adam_update<T, false>(p, g, m, v, nullptr, n);
        }
        store(exp_avg + i, m);
        store(exp_avg_sq + i, v);
    }
}

// inner[j, c] = sum over rows of V[row, j] x[row, c].
template <typename Work, typename T>
CLK_HOST_DEVICE inline void left_inner_phase(const Work& w, const T* x, int64_t thread, int64_t threads) {
    for (int64_t j = 0; j < w.left.rank; ++j) {
        for (int64_t c = thread; c < w.columns; c += threads) {
            T sum = 0;
            for (int64_t row = 0; row < w.rows; ++row) sum += w.left(row, j) * x[row * w.columns + c];
            w.inner[j * w.columns + c] = sum;
        }
    }
}

// other = P u, from `inner` in the basis form. First of two passes: rest = u - V inner.
template <typename Work>
CLK_HOST_DEVICE inline void left_outer_phase(const Work& w, bool first_of_two, int64_t thread, int64_t threads) {
    using T = typename Work::T;
    const bool dense = w.left.form == SideForm::dense;
    const T* in = dense ? w.u : w.inner;
    const int64_t depth = dense ? w.rows : w.left.rank;
    for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t c = thread; c < w.columns; c += threads) {
            T sum = 0;
            for (int64_t k = 0; k < depth; ++k) sum += w.left(row, k) * in[k * w.columns + c];
            const int64_t i = row * w.columns + c;
            if (dense) {
                w.other[i] = sum;
            } else if (first_of_two) {
                w.rest[i] = w.u[i] - sum;
            } else {
                if (w.left.form == SideForm::twice) sum += w.u[i] - w.rest[i];
                w.other[i] = w.left.identity * w.u[i] - w.left.span * sum;
            }
        }
    }
}

// A lane's shares of inner[row .. row + kRows, j] = sum over c of x[row, c] V[c, j], a column-major basis read in
// order.
template <typename Work, typename T>
CLK_HOST_DEVICE inline void right_shares(const Work& w, const T* x, int64_t row, int64_t j, int64_t lane, T* sums) {
    const int64_t count = w.rows - row < kRows ? w.rows - row : kRows;
    for (int i = 0; i < kRows; ++i) sums[i] = 0;
    x += row * w.columns;
    if (count == kRows) {
        for (int64_t c = lane; c < w.columns; c += 32) {
            const T v = w.right(c, j);
            for (int i = 0; i < kRows; ++i) sums[i] += x[i * w.columns + c] * v;
        }
    } else {
        for (int64_t c = lane; c < w.columns; c += 32) {
            const T v = w.right(c, j);
            for (int i = 0; i < kRows; ++i) {
                if (i < count) sums[i] += x[i * w.columns + c] * v;
            }
        }
    }
}

// p <- keep p + (u P), where `inner` is ready in the basis form. First of two passes: rest = u - inner V^T.
template <typename Work, typename T>
CLK_HOST_DEVICE inline void right_outer_phase(const Work& w, const T* u, bool first_of_two, T keep, int64_t thread,
                                              int64_t threads) {
    const T* in = w.right.form == SideForm::dense ? u : w.inner;
    const int64_t depth = w.right.form == SideForm::dense ? w.columns : w.right.thin() ? w.right.rank : 0;
    for (int64_t row = 0; row < w.rows; row += kRows) {
        const int64_t count = w.rows - row < kRows ? w.rows - row : kRows;
        for (int64_t c = thread; c < w.columns; c += threads) {
            T sums[kRows] = {};
            for (int64_t k = 0; k < depth; ++k) {
                const T v = w.right.form == SideForm::dense ? w.right(k, c) : w.right(c, k);
                for (int i = 0; i < kRows; ++i) {
                    if (i < count) sums[i] += in[(row + i) * depth + k] * v;
                }
            }
            for (int i = 0; i < kRows; ++i) {
                if (i >= count) break;
                const int64_t at = (row + i) * w.columns + c;
                T change = u[at];
                if (first_of_two) {
                    w.rest[at] = change - sums[i];
                    continue;
                }
                if (w.right.form == SideForm::dense) {
                    change = sums[i];
                } else if (w.right.thin()) {
                    const T product = w.right.form == SideForm::twice ? sums[i] + (change - w.rest[at]) : sums[i];
                    change = w.right.identity * change - w.right.span * product;
                }
                store(w.weight + at, add_update(static_cast<T>(load(w.weight + at)), change, keep));
            }
        }
    }
}

}  // namespace clk
