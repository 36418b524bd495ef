// The work of one block of threads on one small parameter, phase by phase. A kernel runs each phase with all its
// threads and a barrier between; a test runs the same phases thread by thread on the host, so that the index arithmetic
// and the order of sums are checked without a GPU.
#pragma once

#include <algorithm>

#include "projection.h"
#include "projection_math.h"
#ifdef __CUDACC__
#include "common/math.cuh"
#else
#include "common/dtype.h"
#endif

namespace clk {

#ifndef __CUDACC__
inline float load(const float* p) { return *p; }
inline void store(float* p, float x) { *p = x; }
#endif

// As ProjectionSide, with float matrices and scales. `form` is a SideForm.
struct BlockSide {
    const float* matrix;
    int64_t rank, row_stride, column_stride;
    float identity, span;
    int form;

    CLK_HOST_DEVICE float operator()(int64_t row, int64_t column) const {
        return matrix[row * row_stride + column * column_stride];
    }
};

// W holds the weight and its gradient, S the moments. `u` and `other` hold rows x columns values, `inner` the larger of
// rows x rank (right) and rank x columns (left).
template <typename W, typename S>
struct BlockWork {
    W* weight;
    const W* grad;
    S *exp_avg, *exp_avg_sq, *largest;
    int64_t rows, columns;
    BlockSide left, right;
    float *u, *other, *inner;
};

// One parameter as a kernel gets it.
struct BlockEntry {
    void* weight;
    const void* grad;
    void *exp_avg, *exp_avg_sq, *largest;
    float* step;
    double steps;
    int64_t rows, columns, first_block, blocks;  // a block for each matrix of a batch
    BlockSide left, right;
    const double* scales;  // identity and span of both sides on the device, or null
    float* workspace;
    int64_t inner;
};

template <typename W, typename S>
CLK_HOST_DEVICE inline BlockWork<W, S> block_work(const BlockEntry& e, int64_t matrix) {
    const int64_t size = e.rows * e.columns, begin = matrix * size;
    BlockWork<W, S> w;
    w.weight = static_cast<W*>(e.weight) + begin;
    w.grad = static_cast<const W*>(e.grad) + begin;
    w.exp_avg = static_cast<S*>(e.exp_avg) + begin;
    w.exp_avg_sq = static_cast<S*>(e.exp_avg_sq) + begin;
    w.largest = e.largest ? static_cast<S*>(e.largest) + begin : nullptr;
    w.rows = e.rows;
    w.columns = e.columns;
    w.left = e.left;
    w.right = e.right;
    if (e.scales) {
        w.left.identity = static_cast<float>(e.scales[0]);
        w.left.span = static_cast<float>(e.scales[1]);
        w.right.identity = static_cast<float>(e.scales[2]);
        w.right.span = static_cast<float>(e.scales[3]);
    }
    w.u = e.workspace + matrix * (2 * size + e.inner);
    w.other = w.u + size;
    w.inner = w.other + size;
    return w;
}

inline BlockSide block_side(const ProjectionSide& side) {
    return {static_cast<const float*>(side.matrix),
            side.rank,
            side.row_stride,
            side.column_stride,
            static_cast<float>(side.identity),
            static_cast<float>(side.span),
            static_cast<int>(side.form)};
}

// Floats of workspace that a parameter needs: the update alone, or all that its blocks write on the way.
inline int64_t block_floats(const ProjectedParameter& p, bool whole) {
    const int64_t size = p.rows * p.columns, inner = std::max(p.rows * p.right.rank, p.left.rank * p.columns);
    return whole ? p.batch * size : p.batch * (2 * size + inner);
}

inline BlockEntry block_entry(const ProjectedParameter& p, const StepTensors& tensors, int64_t index,
                              int64_t first_block, float* workspace) {
    const int64_t inner = std::max(p.rows * p.right.rank, p.left.rank * p.columns);
    return {p.weight,
            p.grad,
            p.exp_avg,
            p.exp_avg_sq,
            p.largest,
            p.step,
            p.steps,
            p.rows,
            p.columns,
            first_block,
            p.batch,
            block_side(p.left),
            block_side(p.right),
            tensors.scales ? tensors.scales + 4 * index : nullptr,
            workspace,
            inner};
}

// u[i] for i = first, first + step, ... below count.
template <typename W, typename S>
CLK_HOST_DEVICE inline void adam_phase(const BlockWork<W, S>& w, const AdamNumbers<float>& n, int64_t first,
                                       int64_t step, int64_t count) {
    for (int64_t i = first; i < count; i += step) {
        float m = load(w.exp_avg + i), v = load(w.exp_avg_sq + i);
        const float weight = load(w.weight + i), grad = load(w.grad + i);
        if (w.largest) {
            float largest = load(w.largest + i);
            w.u[i] = adam_update<float, true>(weight, grad, m, v, &largest, n);
            store(w.largest + i, largest);
        } else {
            w.u[i] = adam_update<float, false>(weight, grad, m, v, nullptr, n);
        }
        store(w.exp_avg + i, m);
        store(w.exp_avg_sq + i, v);
    }
}

// inner[j, c] = sum over rows of V[row, j] u[row, c].
template <typename W, typename S>
CLK_HOST_DEVICE inline void left_inner_phase(const BlockWork<W, S>& w, int64_t thread, int64_t threads) {
    for (int64_t j = 0; j < w.left.rank; ++j) {
        for (int64_t c = thread; c < w.columns; c += threads) {
            float sum = 0.0f;
            for (int64_t row = 0; row < w.rows; ++row) sum += w.left(row, j) * w.u[row * w.columns + c];
            w.inner[j * w.columns + c] = sum;
        }
    }
}

// other = P u, from `inner` in the basis form.
template <typename W, typename S>
CLK_HOST_DEVICE inline void left_outer_phase(const BlockWork<W, S>& w, int64_t thread, int64_t threads) {
    const bool dense = w.left.form == 2;
    const float* in = dense ? w.u : w.inner;
    const int64_t depth = dense ? w.rows : w.left.rank;
    for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t c = thread; c < w.columns; c += threads) {
            float sum = 0.0f;
            for (int64_t k = 0; k < depth; ++k) sum += w.left(row, k) * in[k * w.columns + c];
            const int64_t i = row * w.columns + c;
            w.other[i] = dense ? sum : w.left.identity * w.u[i] - w.left.span * sum;
        }
    }
}

// A lane's share of inner[row, j] = sum over c of u[row, c] V[c, j]. A column-major basis is read in order.
template <typename W, typename S>
CLK_HOST_DEVICE inline float right_share(const BlockWork<W, S>& w, const float* u, int64_t row, int64_t j,
                                         int64_t lane) {
    float sum = 0.0f;
    for (int64_t c = lane; c < w.columns; c += 32) sum += u[row * w.columns + c] * w.right(c, j);
    return sum;
}

// p <- keep p + (u P), where `inner` is ready in the basis form.
template <typename W, typename S>
CLK_HOST_DEVICE inline void right_outer_phase(const BlockWork<W, S>& w, const float* u, float keep, int64_t thread,
                                              int64_t threads) {
    for (int64_t row = 0; row < w.rows; ++row) {
        const float* update = u + row * w.columns;
        for (int64_t c = thread; c < w.columns; c += threads) {
            float change = update[c];
            if (w.right.form == 2) {
                change = 0.0f;
                for (int64_t k = 0; k < w.columns; ++k) change += update[k] * w.right(k, c);
            } else if (w.right.form == 1) {
                float sum = 0.0f;
                for (int64_t j = 0; j < w.right.rank; ++j) sum += w.inner[row * w.right.rank + j] * w.right(c, j);
                change = w.right.identity * change - w.right.span * sum;
            }
            W* weight = w.weight + row * w.columns + c;
            store(weight, add_update(load(weight), change, keep));
        }
    }
}

}  // namespace clk
