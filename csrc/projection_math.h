// The element of an Adam step, the same for the CPU and the CUDA kernel.
#pragma once

#include <cmath>

#include "common/tensor_view.h"

namespace clk {

// One step's numbers for one parameter, worked out in double and then rounded once.
template <typename T>
struct AdamNumbers {
    T rate;         // lr / (1 - beta1^t)
    T denominator;  // 1 / sqrt(1 - beta2^t)
    T beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    T grad_factor;  // -1 for maximize, divided by the gradient scale
    T coupled;      // L2 decay, added to the gradient
    T decoupled;    // lr wd, part of the projected update
    T keep;         // 1 - lr wd where decoupled decay is not projected, else 1
};

// step is the count after this step. NaN and infinity go through, as they do in torch.
template <typename T>
CLK_HOST_DEVICE inline AdamNumbers<T> adam_numbers(double step, double lr, double beta1, double beta2, double eps,
                                                   double weight_decay, bool decoupled, bool project_decay,
                                                   double grad_factor) {
    const double free_decay = decoupled && !project_decay ? lr * weight_decay : 0.0;
    AdamNumbers<T> n;
    n.rate = static_cast<T>(lr / (1.0 - pow(beta1, step)));
    n.denominator = static_cast<T>(1.0 / sqrt(1.0 - pow(beta2, step)));
    n.beta1 = static_cast<T>(beta1);
    n.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    n.beta2 = static_cast<T>(beta2);
    n.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    n.eps = static_cast<T>(eps);
    n.grad_factor = static_cast<T>(grad_factor);
    n.coupled = static_cast<T>(decoupled ? 0.0 : weight_decay);
    n.decoupled = static_cast<T>(decoupled && project_decay ? lr * weight_decay : 0.0);
    n.keep = static_cast<T>(1.0 - free_decay);
    return n;
}

// <cmath> alone declares only the double form outside std, which took float steps through double, four times as long.
CLK_HOST_DEVICE inline float root(float x) { return sqrtf(x); }
CLK_HOST_DEVICE inline double root(double x) { return sqrt(x); }

// The complete update of one element, -lr and decay included; the moments are updated. `largest` is null without
// amsgrad. Where the first moment is 0 the direction is 0 too, so that eps = 0 makes no NaN.
template <typename T, bool kAmsgrad>
CLK_HOST_DEVICE inline T adam_update(T weight, T grad, T& m, T& v, T* largest, const AdamNumbers<T>& n) {
    grad = grad * n.grad_factor + n.coupled * weight;
    m = n.beta1 * m + n.one_minus_beta1 * grad;
    v = n.beta2 * v + n.one_minus_beta2 * grad * grad;
    T top = v;
    if constexpr (kAmsgrad) {
        top = (v > *largest || v != v) ? v : *largest;  // NaN wins, as in torch.maximum
        *largest = top;
    }
    const T direction = m / (root(top) * n.denominator + n.eps);
    return -n.rate * (m == T(0) ? m : direction) - n.decoupled * weight;
}

// p <- keep p + change, bit for bit keep p where the change is 0 (so that -0.0 stays).
template <typename T>
CLK_HOST_DEVICE inline T add_update(T weight, T change, T keep) {
    const T kept = keep * weight;
    return change == T(0) ? kept : kept + change;
}

}  // namespace clk
