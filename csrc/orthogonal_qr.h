// Batched thin QR of tall matrices, A = Q R with diag(R) >= 0, and its backward.
#pragma once

#include <array>
#include <cstdint>

#include "common/dtype.h"
#include "common/tensor_view.h"

namespace clk {

// What became of a matrix; the same numbers as in reference.py.
enum QrStatus : int32_t { kQrOk = 0, kQrDeficient = 1, kQrNonFinite = 2, kQrDeclined = 3 };

// A batch of m x n matrices, m >= n, given by any strides in elements. q, r and solve are contiguous; solve is the
// matrix S with gA = X S: R^-T, or its damped form where the rank is deficient. `floor` is null or holds, for each
// column, the length below which its new part counts as nothing: then that column of q and row of r are zero.
struct QrBatch {
    const void* a;
    int64_t batch, m, n, batch_stride, row_stride, column_stride;
    const void* floor;
    void *q, *r, *solve;
    int32_t* status;
};

// The gradient of one batch. gq and gr may be null (not wanted) and have any strides; the rest is contiguous.
struct QrGradients {
    const void* gq;
    const void* gr;
    const void *q, *r, *solve;
    void* ga;
    int64_t batch, m, n;
    int64_t gq_matrix, gq_row, gq_column, gr_matrix, gr_row, gr_column;  // strides
};

// From the fields in their order, as Python passes them.
inline QrBatch qr_batch(const std::array<int64_t, 12>& f) {
    return {pointer<const void>(f[0]),
            f[1],
            f[2],
            f[3],
            f[4],
            f[5],
            f[6],
            pointer<const void>(f[7]),
            pointer<void>(f[8]),
            pointer<void>(f[9]),
            pointer<void>(f[10]),
            pointer<int32_t>(f[11])};
}
inline QrGradients qr_gradients(const std::array<int64_t, 15>& f) {
    return {pointer<const void>(f[0]),
            pointer<const void>(f[1]),
            pointer<const void>(f[2]),
            pointer<const void>(f[3]),
            pointer<const void>(f[4]),
            pointer<void>(f[5]),
            f[6],
            f[7],
            f[8],
            f[9],
            f[10],
            f[11],
            f[12],
            f[13],
            f[14]};
}

// All of one element type, f32 or f64. The result for a matrix depends neither on `threads` nor on its neighbours.
// On the CPU an f64 matrix without full rank is left alone, with status kQrDeclined: the caller has LAPACK.
void qr_cpu(const QrBatch& batch, DType dtype, int threads);
void qr_backward_cpu(const QrGradients& batch, DType dtype, int threads);

// Doubles of workspace that CUDA needs for each matrix of n columns, n <= 480; few columns fit into shared memory.
inline constexpr int64_t kQrSharedColumns = 32;
inline int64_t qr_workspace(int64_t n) { return n <= kQrSharedColumns ? 0 : 5 * n * n + 4 * n + 8; }
void qr_cuda(const QrBatch& batch, DType dtype, double* workspace, std::intptr_t stream);
void qr_backward_cuda(const QrGradients& batch, DType dtype, double* workspace, std::intptr_t stream);

}  // namespace clk
