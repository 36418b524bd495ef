// Device code of the steps with a trainable projection, phase by phase (method: trainable projection, scheme B):
//   step     base step of every element and, for each row, <G, d>, the norms of d and of c        (all tensors at once)
//   policy   the sums of a tensor's rows become its new radius                                     (a block a tensor)
//   rescale  rows outside the radius go back to it; a tensor at the floor exchanges with its anchor (all at once)
// A kernel runs a phase with all its threads; a test runs the same functions thread by thread on the host, so that
// index arithmetic, order of sums and policy are checked without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "weight_projection.h"
#include "weight_projection_math.h"
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

inline constexpr int kThreads = 256, kWarps = kThreads / 32;  // of the step and of the rescaling
inline constexpr int kPolicyThreads = 512;
inline constexpr int64_t kWarpRow = 1024;    // a warp takes rows up to this length: 8 vectors of 4 a lane
inline constexpr int64_t kPart = 8192;       // a block takes this much of a longer row: 32 elements a thread
inline constexpr int64_t kSerialParts = 32;  // so many partial sums of a row are added by one thread, more by a block

enum class Anchor : uint32_t { none = 0, f32 = 1, f16 = 2, bf16 = 3 };
inline constexpr uint32_t kAnchorMask = 3, kVector = 4, kHostStep = 8;  // flags of an entry

// One parameter as the kernels get it, [rows, columns], contiguous like everything of its shape.
struct Entry {
    void* weight;
    const void* grad;
    void *first, *second, *largest;  // moments; SGD: the momentum buffer or null, null, null
    void* anchor;
    float* step;  // the count, on the device; with kHostStep its bits are the count before this step, as a float
    float* radius;
    int64_t rows, columns;
    int64_t slot;          // where its row sums begin
    uint32_t first_block;  // of the step's grid
    uint32_t flags;
    float radius_lr, fixed;  // NaN: the radius is learned
};

// What is the same for all parameters of a call.
struct Settings {
    BaseSettings base;
    RadiusRule rule;
    FtpTensors tensors;
};

// What the step leaves of a row, or of a part of one: <G, d>, sums of |d| or d^2 and of |c| or c^2, whether G is not 0.
struct alignas(16) RowSums {
    float dot, before, after, moved;
};

// What the policy tells the rescaling.
enum class Action : int { none = 0, rescale = 1, collapse = 2, put_back = 3, clear = 4 };
struct Verdict {
    float gamma;
    Action action;
};

// How the blocks of the step share a parameter.
struct Split {
    bool by_warp;
    int64_t rows_each;  // rows of a warp
    int64_t parts;      // blocks of a row
    int64_t blocks;
};

CLK_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

CLK_HOST_DEVICE inline Split split_of(int64_t rows, int64_t columns) {
    if (rows == 0 || columns == 0) return {false, 0, 1, 0};
    if (rows > 1 && columns <= kWarpRow) {  // about kPart elements a block, so that its beginning pays
        int64_t each = kWarpRow / columns;
        each = each > 8 ? 8 : each;
        return {true, each, 1, divide_up(rows, each * kWarps)};
    }
    const int64_t parts = divide_up(columns, kPart);
    return {false, 1, parts, rows * parts};
}

// The last entry that begins at or before a block. Entries without elements begin where the next one does.
CLK_HOST_DEVICE inline int entry_of(const Entry* entries, int count, uint32_t block) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (entries[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Where a block, or one of its warps in its k-th turn, finds work: a row or a part of one.
struct Place {
    int64_t begin, length;  // elements
    int64_t slot;           // of its sums; the row's slot is the first of its parts
    int64_t row;
};

CLK_HOST_DEVICE inline Place place_of(const Entry& e, const Split& split, int64_t block, int64_t warp, int64_t turn) {
    if (split.by_warp) {
        const int64_t row = (block * split.rows_each + turn) * kWarps + warp;
        return {row * e.columns, row < e.rows ? e.columns : 0, e.slot + row, row};
    }
    const int64_t row = block / split.parts, part = block % split.parts;
    const int64_t left = e.columns - part * kPart;
    return {row * e.columns + part * kPart, left < kPart ? left : kPart, e.slot + block, row};
}

CLK_HOST_DEVICE inline int64_t row_slot(const Entry& e, const Split& split, int64_t row) {
    return e.slot + row * split.parts;
}

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

CLK_HOST_DEVICE inline float step_count(const Entry& e) {
    if (e.flags & kHostStep) {
        const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(e.step));
        float count;
#ifdef __CUDA_ARCH__
        count = __uint_as_float(bits);
#else
        __builtin_memcpy(&count, &bits, sizeof count);
#endif
        return count;
    }
    return *e.step;
}

CLK_HOST_DEVICE inline double learning_rate(const Settings& s) {
    if (!s.tensors.lr) return s.base.lr;
    return s.tensors.lr_is_double ? *static_cast<const double*>(s.tensors.lr)
                                  : static_cast<double>(*static_cast<const float*>(s.tensors.lr));
}

CLK_HOST_DEVICE inline bool skips(const Settings& s) { return s.tensors.found_inf && *s.tensors.found_inf != 0.0f; }

template <bool kAdam>
CLK_HOST_DEVICE inline Numbers numbers_of(const Settings& s, const Entry& e) {
    const BaseSettings& b = s.base;
    const double step = static_cast<double>(step_count(e)) + 1.0, lr = learning_rate(s);
    const double scale = s.tensors.grad_scale ? static_cast<double>(*s.tensors.grad_scale) : 1.0;
    Numbers n{};
    n.skip = skips(s);
    n.grad_factor = static_cast<float>(b.grad_factor / scale);
    if constexpr (kAdam) {
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

template <int kWidth, typename W>
CLK_HOST_DEVICE inline void load_some(const W* p, float (&x)[kWidth]) {
    if constexpr (kWidth == 4) {
        const Four<W> four = *reinterpret_cast<const Four<W>*>(p);
        for (int i = 0; i < 4; ++i) x[i] = load(four.x + i);
    } else {
        x[0] = load(p);
    }
}

template <int kWidth, typename W>
CLK_HOST_DEVICE inline void store_some(W* p, const float (&x)[kWidth]) {
    if constexpr (kWidth == 4) {
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
template <typename W, typename S, bool kAdam, int kWidth>
CLK_HOST_DEVICE inline void step_some(const Entry& e, const Numbers& n, int64_t at, RowSums& sums) {
    W* const weight = static_cast<W*>(e.weight) + at;
    S* const first = static_cast<S*>(e.first) + at;
    S* const second = static_cast<S*>(e.second) + at;
    S* const largest = static_cast<S*>(e.largest) + at;
    float w[kWidth], g[kWidth], m[kWidth] = {}, v[kWidth], top[kWidth], slot[kWidth];
    load_some(weight, w);
    load_some(static_cast<const W*>(e.grad) + at, g);
    if (kAdam || e.first) load_some(first, m);
    if constexpr (kAdam) {
        load_some(second, v);
        if (e.largest) load_some(largest, top);
    }
    load_anchor(e, at, slot);
    float moved[kWidth], anchor[kWidth];
    for (int i = 0; i < kWidth; ++i) {
        g[i] *= n.grad_factor;
        anchor[i] = n.floored ? w[i] : slot[i];
        const float d = n.floored ? slot[i] : w[i] - slot[i];
        float change;
        if constexpr (kAdam) {
            change = e.largest ? adam_update<float, true>(w[i], g[i], m[i], v[i], &top[i], n.adam)
                               : adam_update<float, false>(w[i], g[i], m[i], v[i], nullptr, n.adam);
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
    if constexpr (kAdam) {
        store_some(second, v);
        if (e.largest) store_some(largest, top);
    }
    if (!n.moves) return;  // then c is 0 or d, and a tensor that is left alone still has its last displacement
    store_some(weight, moved);
    if (n.floored) store_anchor(e, at, anchor);
}

// The elements begin + lane, + lanes, ... of `length`, four at a time where the addresses allow it.
template <typename W, typename S, bool kAdam>
CLK_HOST_DEVICE inline void step_span(const Entry& e, const Numbers& n, int64_t begin, int64_t length, int64_t lane,
                                      int64_t lanes, RowSums& sums) {
    if (e.flags & kVector) {
        for (int64_t i = 4 * lane; i < length; i += 4 * lanes) step_some<W, S, kAdam, 4>(e, n, begin + i, sums);
    } else {
        for (int64_t i = lane; i < length; i += lanes) step_some<W, S, kAdam, 1>(e, n, begin + i, sums);
    }
}

// -- policy ---------------------------------------------------------------------------------------------------------
struct WideSums {
    double dot, before, after, moved;
};

// Adds up the parts of a row that `lane` of `lanes` is to add, in double.
CLK_HOST_DEVICE inline WideSums gather(const RowSums* parts, int64_t count, int64_t lane, int64_t lanes) {
    WideSums sums{0, 0, 0, 0};
    for (int64_t i = lane; i < count; i += lanes) {
        sums.dot += parts[i].dot;
        sums.before += parts[i].before;
        sums.after += parts[i].after;
        sums.moved += parts[i].moved;
    }
    return sums;
}

CLK_HOST_DEVICE inline RowSums narrow(const WideSums& s) {
    return {static_cast<float>(s.dot), static_cast<float>(s.before), static_cast<float>(s.after),
            static_cast<float>(s.moved)};
}

// Rows of few parts: a thread adds up each into its first slot. (Rows of many are added up by all threads, one by one.)
CLK_HOST_DEVICE inline void gather_rows(const Entry& e, const Split& split, RowSums* slots, int64_t thread,
                                        int64_t threads) {
    for (int64_t row = thread; row < e.rows; row += threads) {
        RowSums* const parts = slots + row_slot(e, split, row);
        *parts = narrow(gather(parts, split.parts, 0, 1));
    }
}

CLK_HOST_DEVICE inline float norm_of(float sum, RowNorm norm) {
    return (norm == RowNorm::l1 ? sum : sqrtf(sum)) + static_cast<float>(kTiny);
}

// What a tensor's rows say, over those that a thread has read, then over all threads.
struct Heard {
    double slope;   // h
    float largest;  // finite norm, negative where there is none
    bool sound;     // some row's term is finite
    bool moved;     // some gradient is not 0
};

CLK_HOST_DEVICE inline Heard hear_rows(const Settings& s, const Entry& e, const Split& split, const RowSums* slots,
                                       int64_t thread, int64_t threads) {
    Heard heard{0.0, -1.0f, false, false};
    const Radius before = load_radius(e.radius);
    for (int64_t row = thread; row < e.rows; row += threads) {
        const RowSums sums = slots[row_slot(e, split, row)];
        const float length = s.rule.norm == RowNorm::l1 ? sums.before : sqrtf(sums.before);
        const double term = radius_term(sums.dot, length, before, s.rule.masked);
        if (is_finite(term)) {
            heard.slope += term;
            heard.sound = true;
        }
        const float n = norm_of(sums.after, s.rule.norm);
        if (is_finite(n) && n > heard.largest) heard.largest = n;
        if (sums.moved != 0.0f) heard.moved = true;
    }
    return heard;
}

CLK_HOST_DEVICE inline bool outside(float n, float gamma) { return is_finite(n) && n > gamma; }

CLK_HOST_DEVICE inline double count_outside(const Settings& s, const Entry& e, const Split& split, const RowSums* slots,
                                            float gamma, int64_t thread, int64_t threads) {
    double count = 0.0;
    for (int64_t row = thread; row < e.rows; row += threads) {
        if (outside(norm_of(slots[row_slot(e, split, row)].after, s.rule.norm), gamma)) count += 1.0;
    }
    return count;
}

// Where the radius goes, and what that means for the tensor. One whose gradient is 0 while lr is 0 is left alone.
struct Decision {
    RadiusMove move;
    Verdict verdict;
};

CLK_HOST_DEVICE inline Decision decide(const Settings& s, const Entry& e, const Heard& heard) {
    const Radius before = load_radius(e.radius);
    const bool moves = learning_rate(s) != 0.0, anchored = (e.flags & kAnchorMask) != 0;
    Decision d;
    d.move = move_radius<float>(before, cut_slope(heard.slope), heard.sound, static_cast<double>(step_count(e)) + 1.0,
                                e.radius_lr, e.fixed, s.rule.kappa, s.rule.floor, anchored);
    Action action = d.move.collapsed ? Action::collapse : Action::rescale;
    // A floored tensor that has not moved was left as it is: the weight is the anchor, the buffer the last c.
    if (before.floored && !moves) action = d.move.collapsed ? Action::clear : Action::put_back;
    if (!moves && !heard.moved) action = Action::none;
    d.verdict = {static_cast<float>(d.move.gamma), action};
    return d;
}

CLK_HOST_DEVICE inline void record(const Entry& e, const Decision& d, const Heard& heard, double hits) {
    store_radius(e.radius, load_radius(e.radius), d.move, cut_slope(heard.slope), heard.largest, hits,
                 static_cast<double>(e.rows), e.fixed == e.fixed);
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

// -- tables of parameters, made on the host --------------------------------------------------------------------------
inline uint32_t flags_of(const AnchoredParameter& p) {
    const Anchor kind = !p.anchor                     ? Anchor::none
                        : p.anchor_type == DType::f32 ? Anchor::f32
                        : p.anchor_type == DType::f16 ? Anchor::f16
                                                      : Anchor::bf16;
    const auto aligned = [](const void* address, DType type) {  // null is
        return reinterpret_cast<uintptr_t>(address) % (type == DType::f32 ? 16 : 8) == 0;
    };
    const bool vector = p.columns % 4 == 0 && aligned(p.weight, p.weight_type) && aligned(p.grad, p.weight_type) &&
                        aligned(p.first, p.moment_type) && aligned(p.second, p.moment_type) &&
                        aligned(p.largest, p.moment_type) && aligned(p.anchor, p.anchor_type);
    return static_cast<uint32_t>(kind) | (vector ? kVector : 0) | (p.step ? 0 : kHostStep);
}

inline int64_t slots_of(const AnchoredParameter& p) { return p.rows * split_of(p.rows, p.columns).parts; }

// Copies parameters from `begin` on into a table until one of two limits: what fits a table, what fits a grid. Returns
// how many; `blocks` are those of the step, `slot` is where their row sums begin and then where they end.
inline int fill_table(const std::vector<AnchoredParameter>& parameters, int64_t begin, int most, Entry* table,
                      int64_t& slot, uint32_t& blocks) {
    constexpr int64_t kGrid = std::numeric_limits<int32_t>::max();
    int64_t total = 0;
    int count = 0;
    for (int64_t i = begin; i < static_cast<int64_t>(parameters.size()) && count < most; ++i, ++count) {
        const AnchoredParameter& p = parameters[i];
        const int64_t more = split_of(p.rows, p.columns).blocks;
        if (more > kGrid) throw std::invalid_argument("ftp_step_cuda: a parameter has too many rows");
        if (total + more > kGrid) break;
        const float steps = static_cast<float>(p.steps);
        uint32_t bits;
        __builtin_memcpy(&bits, &steps, sizeof bits);
        table[count] = {p.weight,
                        p.grad,
                        p.first,
                        p.second,
                        p.largest,
                        p.anchor,
                        p.step ? p.step : reinterpret_cast<float*>(static_cast<uintptr_t>(bits)),
                        static_cast<float*>(p.radius),
                        p.rows,
                        p.columns,
                        slot,
                        static_cast<uint32_t>(total),
                        flags_of(p),
                        static_cast<float>(p.radius_lr),
                        static_cast<float>(p.fixed)};
        total += more;
        slot += slots_of(p);
    }
    blocks = static_cast<uint32_t>(total);
    return count;
}

}  // namespace clk::ftp
