// Tables of parameters for the CUDA steps with a trainable projection, and how blocks share a parameter.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "weight_projection.h"
#include "weight_projection_math.h"

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

// The base steps, each with kernels of its own: the largest second moments cost registers that plain Adam has not.
enum class Form { sgd, adam, amsgrad };

inline Form form_of(const BaseSettings& base, const AnchoredParameter& p) {
    return base.kind == BaseKind::sgd ? Form::sgd : p.largest ? Form::amsgrad : Form::adam;
}

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
