// Distillation losses of logits and their gradients on the CPU: cross-entropy of one head, tempered KL of another to a
// teacher, over a slice of the columns; the KL may be decoupled into (target, rest) and the rest alone.
#pragma once

#include <array>
#include <cstdint>

#include "common/dtype.h"
#include "common/tensor_view.h"

namespace clk {

// [rows, columns]; strides in elements. Without data there is no such matrix.
struct Logits {
    const void* data;
    DType dtype;
    int64_t row_stride, column_stride;
};

struct DistillationBatch {
    Logits hard, student, teacher;
    int64_t rows, columns, first, last;  // columns [first, last) are seen; gradients of the others are 0
    const int64_t* target;               // for the hard loss and the decoupled one; counted over all columns
    int64_t target_stride;
    const double* weight;  // of each row instead of `scale`, contiguous; may be null. Rows of weight 0 are not read
    void* hard_grad;       // contiguous [rows, columns] in the dtype of the logits; null where it is not wanted
    void* student_grad;
    void* loss;  // one number, or one for each row
    bool loss_is_double, each_row;
    bool decoupled;
    double hard_weight, soft_weight, two_way_weight, temperature, scale;
};

// The fields in their order: three of Logits, then integers, addresses and flags; `numbers` are the last five.
inline DistillationBatch distillation_batch(const std::array<int64_t, 25>& f, const std::array<double, 5>& numbers) {
    const auto logits = [&f](int at) {
        return Logits{pointer<const void>(f[at]), static_cast<DType>(f[at + 1]), f[at + 2], f[at + 3]};
    };
    return {logits(0),
            logits(4),
            logits(8),
            f[12],
            f[13],
            f[14],
            f[15],
            pointer<const int64_t>(f[16]),
            f[17],
            pointer<const double>(f[18]),
            pointer<void>(f[19]),
            pointer<void>(f[20]),
            pointer<void>(f[21]),
            f[22] != 0,
            f[23] != 0,
            f[24] != 0,
            numbers[0],
            numbers[1],
            numbers[2],
            numbers[3],
            numbers[4]};
}

// A target outside of the slice, NaN, +inf and a row without a finite column make the loss of the row NaN. The results
// do not depend on `threads`.
void distillation_cpu(const DistillationBatch& batch, int threads);

}  // namespace clk
