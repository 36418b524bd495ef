// Plays csrc/projection.cu on the host: the same entries and phases, a block after the other and thread by thread. A
// phase ends where the kernel has a barrier; the sum over a warp is the butterfly of common/math.cuh. Threads run in
// reverse order too, when asked: a phase whose threads depended on each other would give another result.
#include <algorithm>
#include <vector>

#include "projection.h"
#include "projection_block.h"

namespace {

using namespace clk;

constexpr int64_t kThreads = 256;
bool reversed = false;

template <typename Phase>
void for_threads(const Phase& phase) {
    for (int64_t i = 0; i < kThreads; ++i) phase(reversed ? kThreads - 1 - i : i);
}

float warp_sum(std::vector<float> x) {
    for (int offset = 16; offset > 0; offset /= 2) {
        std::vector<float> y(32);
        for (int lane = 0; lane < 32; ++lane) y[lane] = x[lane] + x[lane ^ offset];
        x = y;
    }
    return x[0];
}

void block(const BlockWork<float, float>& w, const AdamNumbers<float>& n) {
    for_threads([&](int64_t t) { adam_phase(w, n, t, kThreads, w.rows * w.columns); });
    const float* u = w.u;
    if (w.left.form != 0) {
        if (w.left.form == 1) for_threads([&](int64_t t) { left_inner_phase(w, t, kThreads); });
        for_threads([&](int64_t t) { left_outer_phase(w, t, kThreads); });
        u = w.other;
    }
    for (int64_t o = 0; w.right.form == 1 && o < w.rows * w.right.rank; ++o) {
        std::vector<float> lanes(32);
        for (int lane = 0; lane < 32; ++lane) lanes[lane] = right_share(w, u, o / w.right.rank, o % w.right.rank, lane);
        w.inner[o] = warp_sum(lanes);
    }
    for_threads([&](int64_t t) { right_outer_phase(w, u, n.keep, t, kThreads); });
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
    float* workspace = reinterpret_cast<float*>(tensors[2]);
    const double* a = settings;
    for (int64_t i = 0; i < count; ++i) {
        const ProjectedParameter& p = parameters[i];
        const BlockEntry entry = block_entry(p, device, i, 0, workspace);
        const auto n = adam_numbers<float>((p.step ? *p.step : p.steps) + 1.0, a[0], a[1], a[2], a[3], a[4], a[5] != 0,
                                           a[6] != 0, a[7]);
        const int64_t elements = p.batch * p.rows * p.columns;
        if (part == 0) {
            for (int64_t matrix = 0; matrix < p.batch; ++matrix) block(block_work<float, float>(entry, matrix), n);
        } else if (part == 1) {
            const auto w = block_work<float, float>(entry, 0);
            for_threads([&](int64_t t) { adam_phase(w, n, t, kThreads, elements); });
        } else {
            float* weight = static_cast<float*>(p.weight);
            for (int64_t k = 0; k < elements; ++k) weight[k] = add_update(weight[k], entry.workspace[k], n.keep);
        }
        workspace += block_floats(p, device.whole);
    }
}
