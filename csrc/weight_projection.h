// Steps of many parameters whose rows are kept within a learned distance of their pre-trained values, the anchor:
// W <- W_0 + min(gamma / n_i, 1) c_i, c = (W - u) - W_0, n_i = ||c_i|| + 1e-8 (fast trainable projection).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"
#include "common/tensor_view.h"

namespace clk {

// reference.py: NORMS. The whole tensor is one row where the norm is l2; Python passes rows = 1 then.
enum class RowNorm : int { l1 = 0, l2 = 1, whole_l2 = 2 };

// One parameter as rows [rows, columns], all its tensors contiguous in the same order of elements; never empty.
struct AnchoredParameter {
    DType weight_type, moment_type, anchor_type, radius_type;
    void* weight;
    const void* grad;  // of the weight's type
    void* first;       // Adam's first moment or SGD's momentum buffer; null for SGD without momentum
    void* second;      // Adam alone
    void* largest;     // amsgrad; null without
    void* anchor;      // null: zero. Holds c instead while the radius says FLOORED, and the weight holds the anchor
    float* step;       // counted up by the step; null where the caller counts, `steps` is then the count before it
    void* radius;      // [8], f32 or f64: weight_projection_math.h
    int64_t rows, columns;
    double radius_lr;
    double fixed;  // the radius; NaN: it is learned
    double steps;
};

enum class BaseKind : int { adam = 0, sgd = 1 };

struct BaseSettings {
    BaseKind kind;
    double lr, weight_decay;
    double beta1, beta2, eps;  // SGD: momentum, dampening, unused
    bool flag;                 // Adam: decoupled weight decay; SGD: nesterov
    double grad_factor;        // -1 for maximize, divided by the gradient scale where the host knows it
};

struct RadiusRule {
    double kappa, floor;
    bool masked;
    RowNorm norm;
};

// Parameters from flat lists, as Python passes them. Addresses come field by field: all weights, then all gradients,
// firsts, seconds, largests, anchors, steps and radii. Sizes come parameter by parameter: rows, columns, then the types
// of weight, moments, anchor and radius. Numbers come parameter by parameter: radius_lr, fixed radius, steps so far.
inline constexpr int64_t kAnchoredPointers = 8, kAnchoredSizes = 6, kAnchoredNumbers = 3;
inline std::vector<AnchoredParameter> anchored_parameters(const std::vector<std::intptr_t>& pointers,
                                                          const std::vector<int64_t>& sizes,
                                                          const std::vector<double>& numbers) {
    const int64_t count = static_cast<int64_t>(pointers.size()) / kAnchoredPointers;
    if (pointers.size() != static_cast<size_t>(count * kAnchoredPointers) ||
        sizes.size() != static_cast<size_t>(count * kAnchoredSizes) ||
        numbers.size() != static_cast<size_t>(count * kAnchoredNumbers)) {
        throw std::invalid_argument("anchored parameters: lists of different lengths");
    }
    std::vector<AnchoredParameter> out;
    out.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        const auto address = [&](int64_t field) { return pointers[field * count + i]; };
        const int64_t* s = sizes.data() + i * kAnchoredSizes;
        const double* x = numbers.data() + i * kAnchoredNumbers;
        const auto type = [](int64_t code) { return static_cast<DType>(code); };
        out.push_back({type(s[2]), type(s[3]), type(s[4]), type(s[5]), pointer<void>(address(0)),
                       pointer<const void>(address(1)), pointer<void>(address(2)), pointer<void>(address(3)),
                       pointer<void>(address(4)), pointer<void>(address(5)), pointer<float>(address(6)),
                       pointer<void>(address(7)), s[0], s[1], x[0], x[1], x[2]});
    }
    return out;
}

// Moments f32 or f64, or 16-bit like their weights; weights of the moments' type or 16-bit; anchors of the weights'
// type, or 16-bit beside f32 weights. The result does not depend on `threads`. Memory is taken before the first write.
void ftp_step_cpu(const std::vector<AnchoredParameter>& parameters, const BaseSettings& base, const RadiusRule& rule,
                  int threads);

// One tensor of the primitives of FTP's relatives, as rows [rows, columns], all contiguous in one order of elements.
struct AnchoredRows {
    DType weight_type, anchor_type;
    void* weight;
    const void* anchor;  // null: zero
    void* other;         // project: the result; products: the gradient or null, of the weight's type
    double* numbers;     // project: radii; rescale: scales; products: the five sums
    int64_t rows, columns;
    int64_t step;  // between the numbers of two rows: 1, or 0 where one serves all
};

// y = W_0 + min(radius / n, 1) c; the five sums of displacement_products; W <- W_0 + s (W - W_0).
enum class RowsTask : int { project = 0, products = 1, rescale = 2 };

// Weights f32, f64 or 16-bit; anchors of their type, or 16-bit beside f32. The result does not depend on `threads`.
void anchored_rows_cpu(const std::vector<AnchoredRows>& tensors, RowsTask task, RowNorm norm, int threads);

// What a CUDA step reads from the device; each may be null.
struct FtpTensors {
    const void* lr;
    bool lr_is_double;
    const float* grad_scale;
    const float* found_inf;
};

// All of one pair of types: weights f32, or f16 or bf16 with moments f32 or the weights' type; radii f32. The workspace
// is aligned to 16 bytes and holds 16 for each row, or each 8192 elements of a longer one, and 8 for each parameter.
void ftp_step_cuda(const std::vector<AnchoredParameter>& parameters, const BaseSettings& base, const RadiusRule& rule,
                   const FtpTensors& tensors, void* workspace, std::intptr_t stream);

}  // namespace clk
