// Device code of the steps with a trainable projection, phase by phase (method: trainable projection, scheme B):
//   step     base step of every element and, for each row, <G, d>, the norms of d and of c        (all tensors at once)
//   policy   the sums of a tensor's rows become its new radius: weight_projection_policy.h          (a block a tensor)
//   rescale  rows outside the radius go back to it; a tensor at the floor exchanges with its anchor (all at once)
// A kernel runs a phase with all its threads; a test runs the same functions thread by thread on the host, so that
// index arithmetic, order of sums and policy are checked without a GPU.
#pragma once

#include "weight_projection_policy.h"
#ifdef __CUDACC__
#include "common/math.cuh"
#else
#include "common/dtype.h"
#endif

namespace clk {
#ifndef __CUDACC__
inline float load(const float* p) { return *p; }
inline float load(const Half* p) { return to_float(*p); }
inline float load(const BFloat16* p) { return to_float(*p); }
inline void store(float* p, float x) { *p = x; }
inline void store(Half* p, float x) { *p = from_float<Half>(x); }
inline void store(BFloat16* p, float x) { *p = from_float<BFloat16>(x); }
using half_type = Half;
using bfloat_type = BFloat16;
#else
using half_type = __half;
using bfloat_type = __nv_bfloat16;
#endif
}  // namespace clk

namespace clk::ftp {

// One step's numbers of one parameter, as the threads of a block share them.
struct Numbers {
    AdamNumbers<float> adam;
    SgdNumbers<float> sgd;
    float grad_factor;
    bool nesterov;
    bool floored;  // the anchor's buffer holds the last displacement and the weight the anchor
    bool moves;    // the learning rate is not 0
    bool squares;
    bool skip;
};

template <Form kForm>
CLK_HOST_DEVICE inline Numbers numbers_of(const Settings& s, const Entry& e) {
    const BaseSettings& b = s.base;
    const double step = static_cast<double>(step_count(e)) + 1.0, lr = learning_rate(s);
    const double scale = s.tensors.grad_scale ? static_cast<double>(*s.tensors.grad_scale) : 1.0;
    Numbers n{};
    n.skip = skips(s);
    n.grad_factor = static_cast<float>(b.grad_factor / scale);
    if constexpr (kForm != Form::sgd) {
        n.adam = adam_numbers<float>(step, lr, b.beta1, b.beta2, b.eps, b.weight_decay, b.flag, true, 1.0);
    } else {
        n.sgd = sgd_numbers<float>(step, lr, b.beta1, b.beta2, b.weight_decay, 1.0);
        n.nesterov = b.flag;
    }
    n.floored = e.radius[kFloored] != 0.0f;
    n.moves = lr != 0.0;
    n.squares = s.rule.norm != RowNorm::l1;
    return n;
}

// -- four elements at a time, or one --------------------------------------------------------------------------------
template <typename W>
struct alignas(4 * sizeof(W)) Four {
    W x[4];
};

// A GPU faults where four are not aligned to their size; the host would not say so.
template <typename W>
CLK_HOST_DEVICE inline void check_aligned(const W* p) {
#ifndef __CUDACC__
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Four<W>) != 0) throw std::logic_error("four elements are not aligned");
#else
    static_cast<void>(p);
#endif
}

template <int kWidth, typename W>
CLK_HOST_DEVICE inline void load_some(const W* p, float (&x)[kWidth]) {
    if constexpr (kWidth == 4) {
        check_aligned(p);
        const Four<W> four = *reinterpret_cast<const Four<W>*>(p);
        for (int i = 0; i < 4; ++i) x[i] = load(four.x + i);
    } else {
        x[0] = load(p);
    }
}

template <int kWidth, typename W>
CLK_HOST_DEVICE inline void store_some(W* p, const float (&x)[kWidth]) {
    if constexpr (kWidth == 4) {
        check_aligned(p);
        Four<W> four;
        for (int i = 0; i < 4; ++i) store(four.x + i, x[i]);
        *reinterpret_cast<Four<W>*>(p) = four;
    } else {
        store(p, x[0]);
    }
}

// The anchor's type is a property of each tensor; the branch is the same for all threads of a block.
template <int kWidth>
CLK_HOST_DEVICE inline void load_anchor(const Entry& e, int64_t at, float (&x)[kWidth]) {
    switch (static_cast<Anchor>(e.flags & kAnchorMask)) {
        case Anchor::f32:
            return load_some(static_cast<const float*>(e.anchor) + at, x);
        case Anchor::f16:
            return load_some(static_cast<const half_type*>(e.anchor) + at, x);
        case Anchor::bf16:
            return load_some(static_cast<const bfloat_type*>(e.anchor) + at, x);
        default:
            for (int i = 0; i < kWidth; ++i) x[i] = 0.0f;
    }
}

template <int kWidth>
CLK_HOST_DEVICE inline void store_anchor(const Entry& e, int64_t at, const float (&x)[kWidth]) {
    switch (static_cast<Anchor>(e.flags & kAnchorMask)) {
        case Anchor::f32:
            return store_some(static_cast<float*>(e.anchor) + at, x);
        case Anchor::f16:
            return store_some(static_cast<half_type*>(e.anchor) + at, x);
        case Anchor::bf16:
            return store_some(static_cast<bfloat_type*>(e.anchor) + at, x);
        default:
            return;
    }
}

// -- step -----------------------------------------------------------------------------------------------------------
template <typename W, typename S, Form kForm, int kWidth>
CLK_HOST_DEVICE inline void step_some(const Entry& e, const Numbers& n, int64_t at, RowSums& sums) {
    constexpr bool kAdam = kForm != Form::sgd, kLargest = kForm == Form::amsgrad;
    W* const weight = static_cast<W*>(e.weight) + at;
    S* const first = static_cast<S*>(e.first) + at;
    S* const second = static_cast<S*>(e.second) + at;
    S* const largest = static_cast<S*>(e.largest) + at;
    float w[kWidth], g[kWidth], m[kWidth] = {}, v[kWidth], top[kWidth], slot[kWidth];
    load_some(weight, w);
    load_some(static_cast<const W*>(e.grad) + at, g);
    if (kAdam || e.first) load_some(first, m);
    if constexpr (kAdam) load_some(second, v);
    if constexpr (kLargest) load_some(largest, top);
    load_anchor(e, at, slot);
    float moved[kWidth], anchor[kWidth];
    for (int i = 0; i < kWidth; ++i) {
        g[i] *= n.grad_factor;
        anchor[i] = n.floored ? w[i] : slot[i];
        const float d = n.floored ? slot[i] : w[i] - slot[i];
        float change;
        if constexpr (kAdam) {
            change = adam_update<float, kLargest>(w[i], g[i], m[i], v[i], kLargest ? &top[i] : nullptr, n.adam);
        } else {
            float buffer = m[i];
            change = e.first ? sgd_update<float, true>(w[i], g[i], buffer, n.sgd, n.nesterov)
                             : sgd_update<float, false>(w[i], g[i], buffer, n.sgd, n.nesterov);
            m[i] = buffer;
        }
        moved[i] = n.moves ? add_update(w[i], change, 1.0f) : w[i];
        const float c = moved[i] - anchor[i];
        sums.dot += g[i] * d;
        sums.before += n.squares ? d * d : fabsf(d);
        sums.after += n.squares ? c * c : fabsf(c);
        if (g[i] != 0.0f) sums.moved = 1.0f;  // NaN is not 0
    }
    if (kAdam || e.first) store_some(first, m);
    if constexpr (kAdam) store_some(second, v);
    if constexpr (kLargest) store_some(largest, top);
    if (!n.moves) return;  // then c is 0 or d, and a tensor that is left alone still has its last displacement
    store_some(weight, moved);
    if (n.floored) store_anchor(e, at, anchor);
}

// The elements begin + lane, + lanes, ... of `length`, four at a time where the addresses allow it.
template <typename W, typename S, Form kForm>
CLK_HOST_DEVICE inline void step_span(const Entry& e, const Numbers& n, int64_t begin, int64_t length, int64_t lane,
                                      int64_t lanes, RowSums& sums) {
    if (e.flags & kVector) {
        for (int64_t i = 4 * lane; i < length; i += 4 * lanes) step_some<W, S, kForm, 4>(e, n, begin + i, sums);
    } else {
        for (int64_t i = lane; i < length; i += lanes) step_some<W, S, kForm, 1>(e, n, begin + i, sums);
    }
}

// -- rescale --------------------------------------------------------------------------------------------------------
template <typename W, int kWidth>
CLK_HOST_DEVICE inline void rescale_some(const Entry& e, Action action, float scale, bool finite, int64_t at) {
    W* const weight = static_cast<W*>(e.weight) + at;
    float w[kWidth], anchor[kWidth];
    load_some(weight, w);
    load_anchor(e, at, anchor);
    for (int i = 0; i < kWidth; ++i) {
        const float a = anchor[i], c = w[i] - a;
        switch (action) {
            case Action::collapse:
                w[i] = a;
                anchor[i] = finite ? c : 0.0f;
                break;
            case Action::put_back:
                anchor[i] = w[i];
                break;
            case Action::clear:
                anchor[i] = 0.0f;
                break;
            default:
                w[i] = a + scale * c;
        }
    }
    if (action == Action::collapse || action == Action::rescale) store_some(weight, w);
    if (action != Action::rescale) store_anchor(e, at, anchor);
}

template <typename W>
CLK_HOST_DEVICE inline void rescale_span(const Entry& e, Verdict verdict, float n, int64_t begin, int64_t length,
                                         int64_t lane, int64_t lanes) {
    if (verdict.action == Action::rescale && !outside(n, verdict.gamma)) return;
    const float scale = verdict.gamma / n;
    if (e.flags & kVector) {
        for (int64_t i = 4 * lane; i < length; i += 4 * lanes) {
            rescale_some<W, 4>(e, verdict.action, scale, is_finite(n), begin + i);
        }
    } else {
        for (int64_t i = lane; i < length; i += lanes) {
            rescale_some<W, 1>(e, verdict.action, scale, is_finite(n), begin + i);
        }
    }
}

}  // namespace clk::ftp
