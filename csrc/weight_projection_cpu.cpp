// FTP steps on the CPU: step and reduce, radius, rescale the projected rows (method page 9.3, scheme B).
//
// The first pass reads all streams once and writes the moments, the unprojected weights and three sums for each row. A
// radius pass first and one row pass after it (scheme C) writes weights once, but reads 12 bytes more. On one Zen 5
// core and 28.4 M parameters, in times of torch's fused AdamW (28 bytes a parameter): C 1.9 to 2.1; this 1.4 with no
// row projected, 1.6 with a quarter, 1.9 to 2.0 with all, and 1.7 with all where the radius is fixed and one pass does.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/kept_memory.h"
#include "weight_projection.h"
#include "weight_projection_math.h"
#include "weight_projection_tiles.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clk {
namespace {

constexpr int64_t kItem = 16384;             // elements that a thread takes at a time: whole rows, or a part of one
constexpr int64_t kWave = int64_t{1} << 18;  // elements between two barriers; a larger parameter is a wave of its own

constexpr double kStays = 2.0, kSpoiled = 3.0;  // in place of a row's scale: within the ball; not finite

struct Item {
    int64_t job, begin, end;  // elements
    int64_t sums;             // of its first row, or of its part
};

template <typename T>
struct Job {
    const AnchoredParameter* parameter;
    const RadiusRule* rule;
    BaseStep base;
    BaseNumbers<T> numbers;
    bool early;                // the radius is known beforehand: a row is rescaled as soon as it is summed
    bool still;                // lr is 0 and so is the gradient: the weight and its radius stay as they are
    double step, grad_factor;  // the count after this step
    Radius before;
    RadiusMove move;
    int64_t parts;          // of a row
    int64_t sums_at;        // in the wave's sums
    int64_t moved_at = -1;  // in the wave's scratch: 16-bit weights, which are rounded once, and not before the rescale
    double* sums;
    T* moved;
};

template <typename T>
struct Buffers {
    alignas(64) T weight[kTile], grad[kTile], first[kTile], second[kTile], largest[kTile], anchor[kTile];
    alignas(64) T before[kTile], after[kTile];

    // `anchor` stays zero where there is none.
    explicit Buffers(const AnchoredParameter& p) {
        if (!p.anchor) std::memset(anchor, 0, sizeof anchor);
    }
};

// One tile of the first pass; b.before and b.after hold d and c then. Returns the gradient.
template <typename T>
const T* step_tile(const TileOperations<T>& o, const Job<T>& job, int64_t begin, int64_t count, Buffers<T>& b) {
    const AnchoredParameter& p = *job.parameter;
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    const auto values = [&](const void* memory, DType type, T* buffer) {
        return memory ? tile_values(o, memory, type, begin, count, buffer) : nullptr;
    };
    const T* const grad = values(p.grad, p.weight_type, b.grad);
    T* weight = values(p.weight, p.weight_type, job.moved ? job.moved + begin : b.weight);
    if (job.still) weight = static_cast<T*>(std::memcpy(b.weight, weight, bytes));
    T* const first = values(p.first, p.moment_type, b.first);
    T* const second = values(p.second, p.moment_type, b.second);
    T* const largest = values(p.largest, p.moment_type, b.largest);
    T* const anchor = p.anchor ? values(p.anchor, p.anchor_type, b.anchor) : b.anchor;
    const bool floored = job.before.floored && !job.still && p.anchor;
    if (floored) {  // the anchor's slot holds c of the step before, and the weight is the anchor
        std::memcpy(b.weight, anchor, bytes);
        std::memcpy(anchor, weight, bytes);
        tile_store(o, p.anchor, p.anchor_type, begin, count, anchor);
    }
    o.step[job.base](job.numbers, weight, grad, first, second, largest, anchor, b.before, b.after, count);
    if (floored) std::memcpy(b.before, b.weight, bytes);
    if (first) tile_store(o, p.first, p.moment_type, begin, count, first);
    if (second) tile_store(o, p.second, p.moment_type, begin, count, second);
    if (largest) tile_store(o, p.largest, p.moment_type, begin, count, largest);
    return grad;
}

// What is to be done with a row whose norm is n.
template <typename T>
double scale_of(const Job<T>& job, double n) {
    if (!is_finite(n)) return kSpoiled;
    return n > job.move.gamma ? static_cast<double>(static_cast<T>(job.move.gamma) / static_cast<T>(n)) : kStays;
}

// One stretch of a row: W <- W_0 + scale c; c goes into the anchor's slot where the tensor falls onto its anchor.
template <typename T>
void rescale_tile(const TileOperations<T>& o, const Job<T>& job, int64_t begin, int64_t count, double scale,
                  Buffers<T>& b) {
    const AnchoredParameter& p = *job.parameter;
    T* const weight = job.moved ? job.moved + begin : static_cast<T*>(p.weight) + begin;
    if (job.move.collapsed) {
        T* const slot = tile_values(o, p.anchor, p.anchor_type, begin, count, b.anchor);
        o.collapse(weight, slot, scale != kSpoiled, count);
        tile_store(o, p.anchor, p.anchor_type, begin, count, slot);
    } else if (scale != kStays && scale != kSpoiled) {
        const T* anchor = b.anchor;
        if (p.anchor) anchor = tile_values(o, p.anchor, p.anchor_type, begin, count, b.anchor);
        o.rescale(weight, anchor, static_cast<T>(scale), count);
    }
    if (job.moved) tile_store(o, p.weight, p.weight_type, begin, count, weight);
}

// Rows of an item, or the part of one that it is.
template <typename T>
void rescale_rows(const TileOperations<T>& o, const Job<T>& job, int64_t begin, int64_t end, const double* sums,
                  Buffers<T>& b) {
    const int64_t columns = job.parameter->columns;
    for (int64_t at = begin; at < end; sums += job.parts * kSums) {
        const int64_t last = std::min(end, (at / columns + 1) * columns);
        const double moved = job.rule->norm == RowNorm::l1 ? sums[kMoved] : std::sqrt(sums[kMoved]);
        const double scale = job.early ? scale_of(job, moved + kTiny) : sums[kScale];
        const bool skipped = !job.moved && !job.move.collapsed && (scale == kStays || scale == kSpoiled);
        for (; !skipped && at < last; at += std::min(last - at, kTile)) {
            rescale_tile(o, job, at, std::min(last - at, kTile), scale, b);
        }
        at = last;
    }
}

// The first pass over whole rows, or over one part of a row.
template <typename T>
void step_item(const TileOperations<T>& o, const Job<T>& job, const Item& item) {
    Buffers<T> b(*job.parameter);
    const int64_t columns = job.parameter->columns;
    const bool l1 = job.rule->norm == RowNorm::l1;
    double* sums = job.sums + item.sums * kSums;
    if (columns > kTile) {
        for (int64_t at = item.begin; at < item.end; sums += kSums) {
            const int64_t end = job.parts > 1 ? item.end : at + columns;
            std::fill_n(sums, kSums, 0.0);
            for (; at < end; at += std::min(end - at, kTile)) {
                const int64_t count = std::min(end - at, kTile);
                const T* const grad = step_tile(o, job, at, count, b);
                o.sums(l1, grad, b.before, b.after, 1, count, sums);
            }
            if (job.early) rescale_rows(o, job, end - columns, end, sums, b);
        }
        return;
    }
    for (int64_t at = item.begin; at < item.end;) {
        const int64_t count = std::min(kTile / columns * columns, item.end - at), rows = count / columns;
        const T* const grad = step_tile(o, job, at, count, b);
        std::fill_n(sums, rows * kSums, 0.0);
        o.sums(l1, grad, b.before, b.after, rows, columns, sums);
        if (job.early) rescale_rows(o, job, at, at + count, sums, b);
        sums += rows * kSums;
        at += count;
    }
}

template <typename T>
void rescale_item(const TileOperations<T>& o, const Job<T>& job, const Item& item) {
    Buffers<T> b(*job.parameter);
    const int64_t row = item.begin / job.parameter->columns;
    rescale_rows(o, job, item.begin, item.end, job.sums + row * job.parts * kSums, b);
}

BaseStep base_step(const AnchoredParameter& p, BaseKind kind) {
    if (kind == BaseKind::adam) return p.largest ? kAmsgrad : kAdam;
    return p.first ? kMomentum : kPlain;
}

// The radius of one parameter from the sums of its rows, and what is to be done with each row.
template <typename T, typename R>
void move_radius_of(Job<T>& job) {
    const AnchoredParameter& p = *job.parameter;
    const RadiusRule& rule = *job.rule;
    double h = 0.0, largest = -1.0, hits = 0.0;
    bool heard = false;
    for (int64_t row = 0; row < p.rows; ++row) {
        double* const first = job.sums + row * job.parts * kSums;
        double dot = first[kDot], length = first[kLength], moved = first[kMoved];
        for (int64_t part = 1; part < job.parts; ++part) {
            dot += first[part * kSums + kDot];
            length += first[part * kSums + kLength];
            moved += first[part * kSums + kMoved];
        }
        if (rule.norm != RowNorm::l1) {
            length = std::sqrt(length);
            moved = std::sqrt(moved);
        }
        const double term = radius_term(dot * job.grad_factor, length, job.before, rule.masked);
        if (is_finite(term)) {
            h += term;
            heard = true;
        }
        first[kMoved] = moved + kTiny;
        if (is_finite(moved)) largest = std::max(largest, first[kMoved]);
    }
    h = cut_slope(h);
    const bool fixed = p.fixed == p.fixed;
    job.move = move_radius<R>(job.before, h, heard, job.step, p.radius_lr, p.fixed, rule.kappa, rule.floor,
                              p.anchor != nullptr);
    for (int64_t row = 0; row < p.rows; ++row) {
        double* const first = job.sums + row * job.parts * kSums;
        const double n = first[kMoved];
        hits += is_finite(n) && n > job.move.gamma ? 1.0 : 0.0;
        first[kScale] = scale_of(job, n);
    }
    store_radius(static_cast<R*>(p.radius), job.before, job.move, h, largest, hits, static_cast<double>(p.rows), fixed);
}

template <typename T>
void move_radius_of(Job<T>& job) {
    if (job.parameter->radius_type == DType::f64) return move_radius_of<T, double>(job);
    move_radius_of<T, float>(job);
}

// Whether a gradient is all zero; asked only where lr is 0.
bool is_zero(const AnchoredParameter& p) {
    const int64_t count = p.rows * p.columns;
    switch (p.weight_type) {
        case DType::f64:
            return std::all_of(static_cast<const double*>(p.grad), static_cast<const double*>(p.grad) + count,
                               [](double x) { return x == 0.0; });
        case DType::f32:
            return std::all_of(static_cast<const float*>(p.grad), static_cast<const float*>(p.grad) + count,
                               [](float x) { return x == 0.0f; });
        default:
            return std::all_of(static_cast<const uint16_t*>(p.grad), static_cast<const uint16_t*>(p.grad) + count,
                               [](uint16_t x) { return (x & 0x7fffu) == 0; });
    }
}

struct Wave {
    int64_t jobs, items;  // ends
};

template <typename T>
struct Plan {
    std::vector<Job<T>> jobs;
    std::vector<Item> items;
    std::vector<Wave> waves;
    int64_t sums = 0, moved = 0;  // the largest wave's
};

template <typename T>
void add_job(Plan<T>& plan, const AnchoredParameter& p, const BaseSettings& base, const RadiusRule& rule) {
    Job<T> job{};
    job.parameter = &p;
    job.rule = &rule;
    job.step = 1.0 + (p.step ? static_cast<double>(*p.step) : p.steps);
    if (base.kind == BaseKind::adam) {
        job.numbers.adam = adam_numbers<T>(job.step, base.lr, base.beta1, base.beta2, base.eps, base.weight_decay,
                                           base.flag, true, base.grad_factor);
    } else {
        job.numbers.sgd =
            sgd_numbers<T>(job.step, base.lr, base.beta1, base.beta2, base.weight_decay, base.grad_factor);
        job.numbers.nesterov = base.flag;
    }
    job.grad_factor = base.grad_factor;
    job.before = p.radius_type == DType::f64 ? load_radius(static_cast<const double*>(p.radius))
                                             : load_radius(static_cast<const float*>(p.radius));
    job.still = base.lr == 0.0 && is_zero(p);
    job.parts = p.columns > kItem ? (p.columns + kItem - 1) / kItem : 1;
    job.base = base_step(p, base.kind);
    if (p.fixed == p.fixed) {
        const bool wide = p.radius_type == DType::f64;
        job.move = {wide ? p.fixed : static_cast<float>(p.fixed), job.before.first, job.before.second, false};
        job.early = job.parts == 1 && !job.still;
    }
    plan.jobs.push_back(job);
}

template <typename T>
void add_items(Plan<T>& plan, int64_t index) {
    const Job<T>& job = plan.jobs[index];
    const int64_t rows = job.parameter->rows, columns = job.parameter->columns;
    if (job.parts > 1) {
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t part = 0; part < job.parts; ++part) {
                const int64_t begin = row * columns + part * kItem, end = std::min(begin + kItem, (row + 1) * columns);
                plan.items.push_back({index, begin, end, row * job.parts + part});
            }
        }
        return;
    }
    const int64_t height = std::max<int64_t>(kItem / columns, 1);
    for (int64_t row = 0; row < rows; row += height) {
        plan.items.push_back({index, row * columns, std::min(row + height, rows) * columns, row});
    }
}

// Parameters of compute type T, in waves.
template <typename T>
Plan<T> make_plan(const std::vector<AnchoredParameter>& parameters, const BaseSettings& base, const RadiusRule& rule) {
    Plan<T> plan;
    int64_t sums = 0, moved = 0, elements = 0;
    const auto end_wave = [&] {
        if (elements == 0) return;
        plan.waves.push_back({static_cast<int64_t>(plan.jobs.size()), static_cast<int64_t>(plan.items.size())});
        plan.sums = std::max(plan.sums, sums);
        plan.moved = std::max(plan.moved, moved);
        sums = moved = elements = 0;
    };
    for (const AnchoredParameter& p : parameters) {
        if ((p.weight_type == DType::f64) != (sizeof(T) == 8)) continue;
        const bool moments =
            !p.first || p.moment_type == p.weight_type || (p.moment_type == DType::f32 && p.weight_type != DType::f64);
        const bool narrow = p.weight_type == DType::f16 || p.weight_type == DType::bf16;
        const bool anchors =
            !p.anchor || p.anchor_type == p.weight_type || (p.weight_type == DType::f32 && p.anchor_type != DType::f64);
        if (!moments || !anchors) throw std::invalid_argument("ftp_step_cpu: no kernel for these types");
        const int64_t size = p.rows * p.columns;
        if (elements + size > kWave) end_wave();
        add_job(plan, p, base, rule);
        Job<T>& job = plan.jobs.back();
        job.sums_at = sums;
        if (narrow) {
            job.moved_at = moved;
            moved += size;
        }
        sums += p.rows * job.parts * kSums;
        elements += size;
        add_items(plan, static_cast<int64_t>(plan.jobs.size()) - 1);
    }
    end_wave();
    return plan;
}

template <typename T>
size_t bytes_of(const Plan<T>& plan) {
    return sizeof(double) * static_cast<size_t>(plan.sums) + sizeof(T) * static_cast<size_t>(plan.moved);
}

template <typename T>
void run(Plan<T>& plan, void* memory, int threads) {
    double* const sums = static_cast<double*>(memory);
    T* const moved = reinterpret_cast<T*>(sums + plan.sums);
    const TileOperations<T>& o = tile_operations<T>();
    for (Job<T>& job : plan.jobs) {
        job.sums = sums + job.sums_at;
        job.moved = job.moved_at < 0 ? nullptr : moved + job.moved_at;
    }
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const int64_t thread = 0, team = 1;
#endif
        Wave from{0, 0};
        for (const Wave& wave : plan.waves) {
            const int64_t count = wave.items - from.items;  // a thread rescales what it stepped
            const int64_t begin = from.items + count * thread / team, end = from.items + count * (thread + 1) / team;
            for (int64_t i = begin; i < end; ++i) {
                const Item& item = plan.items[i];
                step_item(o, plan.jobs[item.job], item);
            }
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t i = from.jobs; i < wave.jobs; ++i) {
                if (!plan.jobs[i].still) move_radius_of(plan.jobs[i]);
            }
            for (int64_t i = end - 1; i >= begin; --i) {
                const Item& item = plan.items[i];  // backwards: the last ones are still in the cache
                const Job<T>& job = plan.jobs[item.job];
                if (!job.still && !job.early) rescale_item(o, job, item);
            }
#pragma omp barrier
            from = wave;
        }
    }
}

KeptMemory& memory_of_this_thread() {
    thread_local KeptMemory memory;
    return memory;
}

}  // namespace

void ftp_step_cpu(const std::vector<AnchoredParameter>& parameters, const BaseSettings& base, const RadiusRule& rule,
                  int threads) {
    Plan<float> singles = make_plan<float>(parameters, base, rule);
    Plan<double> doubles = make_plan<double>(parameters, base, rule);
    const int64_t work = std::max(singles.items.size(), doubles.items.size());
    threads = static_cast<int>(std::clamp<int64_t>(work, 1, std::max(threads, 1)));
    KeptMemory& memory = memory_of_this_thread();
    void* const space = memory.take(std::max(bytes_of(singles), bytes_of(doubles)));
    if (!singles.items.empty()) run(singles, space, threads);
    if (!doubles.items.empty()) run(doubles, space, threads);
    for (const AnchoredParameter& p : parameters) {
        if (p.step) *p.step += 1.0f;
    }
    memory.release();
}

}  // namespace clk
