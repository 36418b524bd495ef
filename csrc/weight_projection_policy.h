// From the sums of a tensor's rows to its new radius, and to what that means for the tensor.
#pragma once

#include <cmath>

#include "weight_projection_table.h"

namespace clk::ftp {

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

}  // namespace clk::ftp
