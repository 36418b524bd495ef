// The projected Adam step of many parameters: p <- p + P_left u P_right, P = identity I - span V V^T or a dense P.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"
#include "common/tensor_view.h"

namespace clk {

// reference.py: NONE, BASIS, DENSE, TWICE. A 16-bit basis is orthonormal to 3 digits only and is applied twice,
// P = (identity - span) I + span (I - V V^T)^2: what the first pass leaves in the span of V, the second removes
// (performance.md 5: 11 to 124 times the exact energy after one pass in bfloat16, 0.9996 to 1.004 after two).
enum class SideForm : int { none = 0, basis = 1, dense = 2, twice = 3 };

// One side: a basis [size, rank] or a dense matrix [size, size], strides in elements, one of them 1.
struct ProjectionSide {
    SideForm form;
    const void* matrix;
    DType dtype;  // the compute type: double for double moments, else float; on the CPU also f16 or bf16
    int64_t rank, row_stride, column_stride;
    double identity, span;
};

// One parameter, [batch, rows, columns] and contiguous like its gradient, of its type, and its moments, of theirs.
struct ProjectedParameter {
    DType weight_type, moment_type;
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

// Parameters from flat lists, as Python passes them. Addresses come field by field: all weights, then all gradients,
// exp_avgs, exp_avg_sqs, largest, steps, left and right matrices. Sizes come parameter by parameter: batch, rows,
// columns, weight and moment type, then form, rank, row stride, column stride and type of the left and of the right
// side. Numbers: identity and span, left and right, of each parameter; then the steps so far of all parameters.
inline constexpr int64_t kPointers = 8, kSizes = 15, kNumbers = 5;
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
        const auto address = [&](int64_t field) { return pointers[field * count + i]; };
        const int64_t* s = sizes.data() + i * kSizes;
        const double* x = numbers.data() + i * (kNumbers - 1);
        const auto type = [](int64_t code) { return static_cast<DType>(code); };
        const auto side = [&](std::intptr_t matrix, const int64_t* z, const double* y) {
            return ProjectionSide{
                static_cast<SideForm>(z[0]), pointer<const void>(matrix), type(z[4]), z[1], z[2], z[3], y[0], y[1]};
        };
        out.push_back({type(s[3]), type(s[4]), pointer<void>(address(0)), pointer<const void>(address(1)),
                       pointer<void>(address(2)), pointer<void>(address(3)), pointer<void>(address(4)),
                       pointer<float>(address(5)), numbers[(kNumbers - 1) * count + i], s[0], s[1], s[2],
                       side(address(6), s + 5, x), side(address(7), s + 10, x + 2)});
    }
    return out;
}

// Moments f32 or f64, or 16-bit like their weights; weights of the moments' type or 16-bit. The result does not depend
// on `threads`. Memory is taken before the first write, and kept for the thread's next step up to 32 MB.
void projected_adam_cpu(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings, int threads);

// What a CUDA step reads from the device; each may be null.
struct StepTensors {
    const void* lr;
    bool lr_is_double;
    const float* grad_scale;
    const float* found_inf;
    const double* scales;  // identity and span, left and right, for each parameter
    bool whole;            // the workspace holds the update alone: the parts for large parameters
};

// All of one pair of types: weights f32, f16 or bf16 with moments f32 or the weights' type, or both f64. The workspace
// is of the compute type (double for double moments, else float) and holds, for each matrix, 2 rows columns
// (3 where a side is applied twice) + max(rows right rank, left rank columns) values; `tensors.whole`: rows columns.
void projected_adam_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                         const StepTensors& tensors, void* workspace, std::intptr_t stream);
void projected_adam_elements_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                                  const StepTensors& tensors, void* workspace, std::intptr_t stream);
void projected_adam_apply_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                               const StepTensors& tensors, void* workspace, std::intptr_t stream);

}  // namespace clk
