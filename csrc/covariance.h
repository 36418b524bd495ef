// Second moments on the CPU: C <- beta C + alpha X^T diag(w) X, both triangles written, bit for bit symmetric.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace clk {

// One matrix to update. Strides are in elements; the rows of X are indexed by (outer, inner), so that a view of queries
// [B, H, N, dh] needs no copy. Columns of C are contiguous.
struct GramProblem {
    void* cov;
    int64_t cov_stride;
    DType cov_dtype;  // f32 or f64
    int64_t dim;
    const void* x;
    DType x_dtype;
    int64_t outer, outer_stride, inner, inner_stride, column_stride;
    const void* weight;  // one value per row, contiguous, double where X is double and float otherwise; may be null
    double* sums;        // the weighted column sums of X are added to it; may be null
};

// The results do not depend on `threads`.
void update_grams(const std::vector<GramProblem>& problems, double alpha, double beta, int threads);

}  // namespace clk
