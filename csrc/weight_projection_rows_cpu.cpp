// The primitives of FTP's relatives on the CPU: rows projected onto a ball, sums of displacements, rows rescaled.
//
// An item is some whole rows, or a part of a long one. What an item needs to know of its rows is summed first; whole
// rows are then written while they are in the cache, parts after all parts of their row have been summed.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "weight_projection.h"
#include "weight_projection_math.h"
#include "weight_projection_tiles.h"

namespace clk {
namespace {

constexpr int64_t kItem = 16384;  // elements
constexpr int kFound = 4;         // sums of a part: <g,d>, |d|_1, |d|_2^2, |g|_2^2

struct Item {
    const AnchoredRows* tensor;
    int64_t row, begin, end;  // elements; the first row
    int64_t parts, found;     // of its rows; where its sums are
};

template <typename T>
struct Tiles {
    alignas(64) T weight[kTile], anchor[kTile], grad[kTile], d[kTile];

    explicit Tiles(const AnchoredRows& t) {
        if (!t.anchor) std::memset(anchor, 0, sizeof anchor);
    }
};

// The sums over a stretch of one row, added to `found`.
template <typename T>
void sum_stretch(const TileOperations<T>& o, const AnchoredRows& t, int64_t begin, int64_t end, bool products,
                 RowNorm norm, double* found, Tiles<T>& b) {
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t count = std::min(end - at, kTile);
        const T* const w = tile_values(o, t.weight, t.weight_type, at, count, b.weight);
        const T* const a = t.anchor ? tile_values(o, t.anchor, t.anchor_type, at, count, b.anchor) : b.anchor;
        o.difference(b.d, w, a, count);
        double sums[kSums] = {0.0, 0.0, 0.0};
        if (!products) {
            o.sums(norm == RowNorm::l1, b.d, b.d, b.d, 1, count, sums);
            found[norm == RowNorm::l1 ? 1 : 2] += sums[kLength];
            continue;
        }
        const T* const g = t.other ? tile_values(o, t.other, t.weight_type, at, count, b.grad) : b.d;
        o.sums(false, g, b.d, g, 1, count, sums);
        found[0] += t.other ? sums[kDot] : 0.0;
        found[2] += sums[kLength];
        found[3] += t.other ? sums[kMoved] : 0.0;
        sums[kLength] = 0.0;
        o.sums(true, b.d, b.d, b.d, 1, count, sums);
        found[1] += sums[kLength];
    }
}

// The weight with its displacement scaled, into `out`; a scale of 1 copies.
template <typename T>
void write_stretch(const TileOperations<T>& o, const AnchoredRows& t, void* out, int64_t begin, int64_t end, T scale,
                   Tiles<T>& b) {
    if (scale == T(1) && out == t.weight) return;
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t count = std::min(end - at, kTile);
        const T* const w = tile_values(o, t.weight, t.weight_type, at, count, b.weight);
        const T* const a = t.anchor ? tile_values(o, t.anchor, t.anchor_type, at, count, b.anchor) : b.anchor;
        std::copy_n(scale == T(0) ? a : w, count, b.d);
        if (scale != T(1) && scale != T(0)) o.rescale(b.d, a, scale, count);
        tile_store(o, out, t.weight_type, at, count, static_cast<const T*>(b.d));
    }
}

// The scale that puts a row within its radius; NaN and infinite norms leave it.
template <typename T>
T scale_of(const AnchoredRows& t, int64_t row, RowNorm norm, const double* found) {
    const T n = static_cast<T>((norm == RowNorm::l1 ? found[1] : std::sqrt(found[2])) + kTiny);
    const T radius = static_cast<T>(t.numbers[row * t.step]);
    return radius < n ? radius / n : T(1);
}

template <typename T>
void first_pass(const TileOperations<T>& o, const Item& item, RowsTask task, RowNorm norm, double* found) {
    const AnchoredRows& t = *item.tensor;
    Tiles<T> b(t);
    int64_t row = item.row;
    for (int64_t begin = item.begin; begin < item.end; ++row, found += kFound) {
        const int64_t end = item.parts > 1 ? item.end : begin + t.columns;
        if (task == RowsTask::rescale) {
            write_stretch(o, t, t.weight, begin, end, static_cast<T>(t.numbers[row * t.step]), b);
        } else {
            std::fill_n(found, kFound, 0.0);
            sum_stretch(o, t, begin, end, task == RowsTask::products, norm, found, b);
            if (task == RowsTask::project && item.parts == 1) {
                write_stretch(o, t, t.other, begin, end, scale_of<T>(t, row, norm, found), b);
            }
        }
        begin = end;
    }
}

// Parts of a long row, once all of them are summed.
template <typename T>
void second_pass(const TileOperations<T>& o, const Item& item, RowNorm norm, const double* found) {
    double whole[kFound] = {};
    for (int64_t part = 0; part < item.parts; ++part) {
        for (int k = 0; k < kFound; ++k) whole[k] += found[part * kFound + k];
    }
    Tiles<T> b(*item.tensor);
    const T scale = scale_of<T>(*item.tensor, item.row, norm, whole);
    write_stretch(o, *item.tensor, item.tensor->other, item.begin, item.end, scale, b);
}

// <G,d>, |d|_1, |d|_2^2, the largest row's |d|_1, |G|_2^2: rows in their order.
void add_up(const AnchoredRows& t, int64_t parts, const double* found) {
    double sums[5] = {};
    for (int64_t row = 0; row < t.rows; ++row) {
        double length = 0.0;
        for (int64_t part = 0; part < parts; ++part, found += kFound) {
            sums[0] += found[0];
            length += found[1];
            sums[2] += found[2];
            sums[4] += found[3];
        }
        sums[1] += length;
        sums[3] = length > sums[3] || length != length ? length : sums[3];  // NaN wins, as in torch.amax
    }
    std::copy_n(sums, 5, t.numbers);
}

int64_t parts_of(const AnchoredRows& t) { return t.columns > kItem ? (t.columns + kItem - 1) / kItem : 1; }

}  // namespace

void anchored_rows_cpu(const std::vector<AnchoredRows>& tensors, RowsTask task, RowNorm norm, int threads) {
    std::vector<Item> items;
    std::vector<int64_t> found_at;
    int64_t found = 0;
    for (const AnchoredRows& t : tensors) {
        const bool anchors =
            !t.anchor || t.anchor_type == t.weight_type || (t.weight_type == DType::f32 && t.anchor_type != DType::f64);
        if (!anchors) throw std::invalid_argument("anchored_rows_cpu: no kernel for these types");
        found_at.push_back(found);
        const int64_t parts = parts_of(t), height = parts > 1 ? 1 : std::max<int64_t>(kItem / t.columns, 1);
        for (int64_t row = 0; row < t.rows; row += height) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t begin = row * t.columns + part * kItem, last = std::min(row + height, t.rows) * t.columns;
                const int64_t end = parts > 1 ? std::min(begin + kItem, last) : last;
                items.push_back({&t, row, begin, end, parts, found + (row * parts + part) * kFound});
            }
        }
        found += t.rows * parts * kFound;
    }
    std::vector<double> sums(static_cast<size_t>(task == RowsTask::rescale ? 0 : found));
    const int64_t count = static_cast<int64_t>(items.size());
    threads = static_cast<int>(std::clamp<int64_t>(count, 1, std::max(threads, 1)));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const Item& item = items[i];
            double* const own = sums.empty() ? nullptr : sums.data() + item.found;
            if (item.tensor->weight_type == DType::f64) {
                first_pass(tile_operations<double>(), item, task, norm, own);
            } else {
                first_pass(tile_operations<float>(), item, task, norm, own);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const Item& item = items[i];
            if (task != RowsTask::project || item.parts == 1) continue;
            const double* const row =
                sums.data() + found_at[item.tensor - tensors.data()] + item.row * item.parts * kFound;
            if (item.tensor->weight_type == DType::f64) {
                second_pass(tile_operations<double>(), item, norm, row);
            } else {
                second_pass(tile_operations<float>(), item, norm, row);
            }
        }
    }
    for (size_t i = 0; task == RowsTask::products && i < tensors.size(); ++i) {
        add_up(tensors[i], parts_of(tensors[i]), sums.data() + found_at[i]);
    }
}

}  // namespace clk
