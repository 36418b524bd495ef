// Plays csrc/projection.cu on the host: the same entries and phases, a block after the other and thread by thread. A
// phase ends where the kernel has a barrier; the sum over a warp is the butterfly of common/math.cuh. Threads run in
// reverse order too, when asked: a phase whose threads depended on each other would give another result.
#include <algorithm>
#include <utility>
#include <vector>

#include "projection.h"
#include "projection_block.h"

namespace {

using namespace clk;

constexpr int64_t kThreads = 512;
bool reversed = false;

template <typename Phase>
void for_threads(const Phase& phase) {
    for (int64_t i = 0; i < kThreads; ++i) phase(reversed ? kThreads - 1 - i : i);
}

template <typename T>
T warp_sum(std::vector<T> x) {
    for (int offset = 16; offset > 0; offset /= 2) {
        std::vector<T> y(32);
        for (int lane = 0; lane < 32; ++lane) y[lane] = x[lane] + x[lane ^ offset];
        x = y;
    }
    return x[0];
}

template <typename Work, typename T>
void right_inner(const Work& w, const T* x) {
    for (int64_t row = 0; row < w.rows; row += kRows) {
        for (int64_t j = 0; j < w.right.rank; ++j) {
            std::vector<std::vector<T>> lanes(kRows, std::vector<T>(32));
            for (int lane = 0; lane < 32; ++lane) {
                T sums[kRows];
                right_shares(w, x, row, j, lane, sums);
                for (int i = 0; i < kRows; ++i) lanes[i][lane] = sums[i];
            }
            for (int i = 0; i < kRows && row + i < w.rows; ++i) w.inner[(row + i) * w.right.rank + j] = warp_sum(lanes[i]);
        }
    }
}

template <typename W, typename S>
void block(const BlockEntry& entry, int64_t matrix, void* workspace, const AdamNumbers<Compute<S>>& n) {
    using T = Compute<S>;
    const auto w = block_work<W, S>(entry, matrix, workspace);
    for_threads([&](int64_t t) {
        adam_phase(w.weight, w.grad, w.exp_avg, w.exp_avg_sq, w.largest, w.u, n, t, kThreads, w.rows * w.columns);
    });
    const T* u = w.u;
    if (w.left.form != SideForm::none) {
        if (w.left.thin()) {
            for_threads([&](int64_t t) { left_inner_phase(w, w.u, t, kThreads); });
            if (w.left.form == SideForm::twice) {
                for_threads([&](int64_t t) { left_outer_phase(w, true, t, kThreads); });
                for_threads([&](int64_t t) { left_inner_phase(w, w.rest, t, kThreads); });
            }
        }
        for_threads([&](int64_t t) { left_outer_phase(w, false, t, kThreads); });
        u = w.other;
    }
    if (w.right.thin()) {
        right_inner(w, u);
        if (w.right.form == SideForm::twice) {
            for_threads([&](int64_t t) { right_outer_phase(w, u, true, n.keep, t, kThreads); });
            right_inner(w, w.rest);
        }
    }
    for_threads([&](int64_t t) { right_outer_phase(w, u, false, n.keep, t, kThreads); });
}

// One part of a step on one parameter whose part of the workspace begins at `offset`.
template <typename W, typename S>
void play_one(int part, const ProjectedParameter& p, const StepTensors& device, int64_t index, int64_t offset,
              void* workspace, const double* a) {
    using T = Compute<S>;
    const BlockEntry e = block_entry(p, device, index, 0, offset);
    const auto n = adam_numbers<T>((p.step ? *p.step : p.steps) + 1.0, a[0], a[1], a[2], a[3], a[4], a[5] != 0,
                                   a[6] != 0, a[7]);
    const int64_t elements = p.batch * p.rows * p.columns;
    T* u = static_cast<T*>(workspace) + offset;
    W* weight = static_cast<W*>(e.weight);
    if (part == 0) {
        for (int64_t matrix = 0; matrix < p.batch; ++matrix) block<W, S>(e, matrix, workspace, n);
    } else if (part == 1) {
        for_threads([&](int64_t t) {
            adam_phase(weight, static_cast<const W*>(e.grad), static_cast<S*>(e.exp_avg), static_cast<S*>(e.exp_avg_sq),
                       static_cast<S*>(e.largest), u, n, t, kThreads, elements);
        });
    } else {
        for (int64_t k = 0; k < elements; ++k) store(weight + k, add_update(static_cast<T>(load(weight + k)), u[k], n.keep));
    }
    if (p.step && part != 1) *p.step += 1.0f;
}

}  // namespace

// Arguments as those of the module's projected_adam_cuda: integers, numbers, addresses, in the order of bindings.cpp.
extern "C" void play(int part, const int64_t* pointers, const int64_t* sizes, const double* numbers, int64_t count,
                     const double* settings, const int64_t* tensors, bool reverse) {
    reversed = reverse;
    const std::vector<ProjectedParameter> parameters =
        projected_parameters({pointers, pointers + count * kPointers}, {sizes, sizes + count * kSizes},
                             {numbers, numbers + count * kNumbers});
    const StepTensors device{nullptr,        false, nullptr, nullptr, reinterpret_cast<const double*>(tensors[0]),
                             tensors[1] != 0};
    void* workspace = reinterpret_cast<void*>(tensors[2]);
    int64_t offset = 0;
    for (int64_t i = 0; i < count; ++i) {
        const ProjectedParameter& p = parameters[i];
        const auto type = std::pair(p.weight_type, p.moment_type);
        const auto one = type == std::pair(DType::f64, DType::f64)     ? play_one<double, double>
                         : type == std::pair(DType::f16, DType::f32)   ? play_one<Half, float>
                         : type == std::pair(DType::f16, DType::f16)   ? play_one<Half, Half>
                         : type == std::pair(DType::bf16, DType::f32)  ? play_one<BFloat16, float>
                         : type == std::pair(DType::bf16, DType::bf16) ? play_one<BFloat16, BFloat16>
                                                                       : play_one<float, float>;
        one(part, p, device, i, offset, workspace, settings);
        offset += p.batch * matrix_values(p.rows, p.columns, p.left, p.right, device.whole);
    }
}
