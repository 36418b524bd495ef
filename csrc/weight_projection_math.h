// One row's and one radius's arithmetic in an FTP step, the same for the CPU and the CUDA kernels (reference.py).
#pragma once

#include <cmath>

#include "common/tensor_view.h"
#include "projection_math.h"

namespace clk {

inline constexpr double kTiny = 1e-8;  // added to every row norm, and the official floor of the radius
inline constexpr double kRadiusBeta1 = 0.9, kRadiusBeta2 = 0.999;
inline constexpr double kMaskSlack = 1e-4;  // reference.py: MASK_SLACK
inline constexpr double kSteepest = 1e19;   // reference.py: STEEPEST

// The state of one radius, [8] floats or doubles; all zero means fresh. What they mean stands in reference.py.
enum RadiusField : int { kGamma, kFirst, kSecond, kLargest, kFloored, kGradient, kProjected, kFired, kRadiusFields };

struct Radius {
    double gamma, first, second, largest, fired;
    bool floored;
};

template <typename R>
CLK_HOST_DEVICE inline Radius load_radius(const R* r) {
    return {r[kGamma], r[kFirst], r[kSecond], r[kLargest], r[kFired], r[kFloored] != R(0)};
}

CLK_HOST_DEVICE inline bool is_finite(double x) { return x - x == 0.0; }

// What a row adds to h, from <G_i, d_i> and ||d_i||. NaN and infinity are left out by whoever sums. d is c of the step
// before where the tensor is floored.
CLK_HOST_DEVICE inline double radius_term(double dot, double length, const Radius& before, bool masked) {
    const double n = length + kTiny;
    if (masked && !before.floored && n < before.gamma * (1.0 - kMaskSlack)) return 0.0;
    return dot / (before.floored || n < before.gamma ? n : before.gamma);
}

struct RadiusMove {
    double gamma;  // to project with; the clip to the largest norm comes after, and cannot change this step
    double first, second;
    bool collapsed;  // the tensor falls onto its anchor, and the anchor's buffer takes c
};

// R is the type that the radius is stored in: every later use must see the rounded value. `heard`: some row's term was
// finite. t is the count after this step; `fixed` is NaN where the radius is learned.
template <typename R>
CLK_HOST_DEVICE inline RadiusMove move_radius(const Radius& before, double h, bool heard, double t, double radius_lr,
                                              double fixed, double kappa, double floor, bool anchored) {
    const auto stored = [](double x) { return static_cast<double>(static_cast<R>(x)); };
    if (fixed == fixed) return {stored(fixed), before.first, before.second, false};
    const double least = stored(floor);
    if (before.gamma == 0.0) return {least, 0.0, 0.0, anchored && floor <= kTiny};
    RadiusMove move{before.gamma, before.first, before.second, false};
    if (heard) {
        const double slope = h > 0.0 ? kappa * h : h;
        move.first = kRadiusBeta1 * before.first + (1.0 - kRadiusBeta1) * slope;
        move.second = kRadiusBeta2 * before.second + (1.0 - kRadiusBeta2) * slope * slope;
        const double direction =
            move.first / (1.0 - pow(kRadiusBeta1, t)) / (sqrt(move.second / (1.0 - pow(kRadiusBeta2, t))) + kTiny);
        const double moved = stored(before.gamma - radius_lr * direction);
        move.gamma = moved > least ? moved : least;
    }
    move.collapsed = anchored && floor <= kTiny && move.gamma <= least;
    return move;
}

// h as it enters the radius: cut so that its square stays a float.
CLK_HOST_DEVICE inline double cut_slope(double h) {
    return h < -kSteepest ? -kSteepest : h > kSteepest ? kSteepest : h;
}

// `largest` is the largest finite row norm, negative where there is none; `hits` of `rows` rows were projected.
template <typename R>
CLK_HOST_DEVICE inline void store_radius(R* r, const Radius& before, const RadiusMove& move, double h, double largest,
                                         double hits, double rows, bool is_fixed) {
    const bool clipped = !is_fixed && largest >= 0.0 && largest < move.gamma;
    r[kGamma] = static_cast<R>(clipped ? largest : move.gamma);
    r[kFirst] = static_cast<R>(move.first);
    r[kSecond] = static_cast<R>(move.second);
    r[kLargest] = static_cast<R>(largest >= 0.0 ? largest : before.largest);
    r[kFloored] = static_cast<R>(move.collapsed ? 1.0 : 0.0);
    r[kGradient] = static_cast<R>(h);
    r[kProjected] = static_cast<R>(hits / rows);
    r[kFired] = static_cast<R>(before.fired + (hits > 0.0 ? 1.0 : 0.0));
}

// One step's numbers of SGD for one parameter.
template <typename T>
struct SgdNumbers {
    T rate, momentum, one_minus_dampening, grad_factor, decay;
    bool first;  // the buffer takes the gradient
};

template <typename T>
CLK_HOST_DEVICE inline SgdNumbers<T> sgd_numbers(double step, double lr, double momentum, double dampening,
                                                 double weight_decay, double grad_factor) {
    return {static_cast<T>(lr),          static_cast<T>(momentum),     static_cast<T>(1.0 - dampening),
            static_cast<T>(grad_factor), static_cast<T>(weight_decay), step == 1.0};
}

// -u of one element; the buffer is updated.
template <typename T, bool kMomentum>
CLK_HOST_DEVICE inline T sgd_update(T weight, T grad, T& buffer, const SgdNumbers<T>& n, bool nesterov) {
    grad = grad * n.grad_factor + n.decay * weight;
    if constexpr (!kMomentum) return -n.rate * grad;
    buffer = n.first ? grad : n.momentum * buffer + n.one_minus_dampening * grad;
    return -n.rate * (nesterov ? grad + n.momentum * buffer : buffer);
}

}  // namespace clk
