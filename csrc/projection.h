// The projected Adam step of many parameters: p <- p + P_left u P_right, P = identity I - span V V^T or a dense P.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"
#include "common/tensor_view.h"

namespace clk {

enum class SideForm : int { none = 0, basis = 1, dense = 2 };  // reference.py: NONE, BASIS, DENSE

// One side: a basis [size, rank] or a dense matrix [size, size], strides in elements, one of them 1.
struct ProjectionSide {
    SideForm form;
    const void* matrix;
    int64_t rank, row_stride, column_stride;
    double identity, span;
};

// One parameter, [batch, rows, columns] and contiguous like its gradient and its moments.
struct ProjectedParameter {
    void* weight;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    void* largest;  // amsgrad; null without
    float* step;    // counted up by the step; null where the caller counts, `steps` is then the count before it
    double steps;
    int64_t batch, rows, columns;
    ProjectionSide left, right;
};

struct AdamSettings {
    double lr, beta1, beta2, eps, weight_decay;
    bool decoupled, project_decay;
    double grad_factor;  // -1 for maximize, divided by the gradient scale where the host knows it
};

// Parameters from flat lists, as Python passes them: for each one kPointers addresses (weight, grad, exp_avg,
// exp_avg_sq, largest, step, left, right), kSizes integers (batch, rows, columns, then form, rank, row stride, column
// stride of the left and of the right side) and kNumbers values (identity and span, left and right, and the steps so
// far).
inline constexpr int64_t kPointers = 8, kSizes = 11, kNumbers = 5;
inline std::vector<ProjectedParameter> projected_parameters(const std::vector<std::intptr_t>& pointers,
                                                            const std::vector<int64_t>& sizes,
                                                            const std::vector<double>& numbers) {
    const int64_t count = static_cast<int64_t>(pointers.size()) / kPointers;
    if (pointers.size() != static_cast<size_t>(count * kPointers) ||
        sizes.size() != static_cast<size_t>(count * kSizes) ||
        numbers.size() != static_cast<size_t>(count * kNumbers)) {
        throw std::invalid_argument("projected parameters: lists of different lengths");
    }
    std::vector<ProjectedParameter> out;
    out.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        const std::intptr_t* p = pointers.data() + i * kPointers;
        const int64_t* s = sizes.data() + i * kSizes;
        const double* x = numbers.data() + i * kNumbers;
        const auto side = [](std::intptr_t matrix, const int64_t* z, const double* y) {
            return ProjectionSide{
                static_cast<SideForm>(z[0]), pointer<const void>(matrix), z[1], z[2], z[3], y[0], y[1]};
        };
        out.push_back({pointer<void>(p[0]), pointer<const void>(p[1]), pointer<void>(p[2]), pointer<void>(p[3]),
                       pointer<void>(p[4]), pointer<float>(p[5]), x[4], s[0], s[1], s[2], side(p[6], s + 3, x),
                       side(p[7], s + 7, x + 2)});
    }
    return out;
}

// All of one element type, f32 or f64. The result does not depend on `threads`. Memory is taken before the first write.
void projected_adam_cpu(const std::vector<ProjectedParameter>& parameters, DType dtype, const AdamSettings& settings,
                        int threads);

// What a CUDA step reads from the device; each may be null.
struct StepTensors {
    const void* lr;
    bool lr_is_double;
    const float* grad_scale;
    const float* found_inf;
    const double* scales;  // identity and span, left and right, for each parameter
    bool whole;            // the workspace holds the update alone: the parts for large parameters
};

// Weights and gradients f32 or bf16, moments f32 or the weights' type, matrices f32. The workspace holds, for each
// matrix, 2 rows columns + max(rows right rank, left rank columns) floats; `tensors.whole`: rows columns.
void projected_adam_cuda(const std::vector<ProjectedParameter>& parameters, DType weight, DType moment,
                         const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                         std::intptr_t stream);
void projected_adam_elements_cuda(const std::vector<ProjectedParameter>& parameters, DType weight, DType moment,
                                  const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                                  std::intptr_t stream);
void projected_adam_apply_cuda(const std::vector<ProjectedParameter>& parameters, DType weight,
                               const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                               std::intptr_t stream);

}  // namespace clk
