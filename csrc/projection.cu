// Projected Adam step on CUDA: one block of threads for each small parameter, all of them in one launch.
//
// A block owns its matrix from gradient to weight, so nothing is read that another block writes, and barriers inside
// the block are all the synchronisation there is. Parameters travel as kernel arguments: nothing is copied to the
// device, a captured graph keeps what it was given, and lr, steps, scale and found_inf are read from device memory at
// each replay. Large weights (full-weight training) run in three parts: projected_adam_elements_cuda leaves the update
// in memory, the caller multiplies it by the thin bases with the library's matrix product, projected_adam_apply_cuda
// adds it.
#include "common/launch.h"
#include "projection.h"
#include "projection_block.h"

namespace clk {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 96;  // a table stays below the 32764 bytes that kernel arguments may have

struct Table {
    AdamSettings settings;
    StepTensors tensors;
    int count;
    BlockEntry entries[kEntries];
};
static_assert(sizeof(Table) <= 32764, "kernel arguments have a limit");

// What every thread of a block needs, worked out once by the first.
struct Common {
    AdamNumbers<float> numbers;
    bool skip;
};

__device__ double device_number(const void* p, bool is_double) {
    return is_double ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
}

__device__ void find_common(const Table& table, const BlockEntry& entry, Common& common) {
    const AdamSettings& s = table.settings;
    const StepTensors& t = table.tensors;
    const double step = (entry.step ? static_cast<double>(*entry.step) : entry.steps) + 1.0;
    const double lr = t.lr ? device_number(t.lr, t.lr_is_double) : s.lr;
    const double factor = t.grad_scale ? s.grad_factor / static_cast<double>(*t.grad_scale) : s.grad_factor;
    common.numbers =
        adam_numbers<float>(step, lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.decoupled, s.project_decay, factor);
    common.skip = t.found_inf && *t.found_inf != 0.0f;
}

template <typename W, typename S>
__global__ void __launch_bounds__(kThreads) cl_projected_adam_block(const __grid_constant__ Table table) {
    __shared__ Common common;
    const int64_t block = blockIdx.x, thread = threadIdx.x;
    int index = 0;
    while (index + 1 < table.count && table.entries[index + 1].first_block <= block) ++index;
    const BlockEntry& entry = table.entries[index];
    if (thread == 0) find_common(table, entry, common);
    __syncthreads();
    if (common.skip) return;

    const BlockWork<W, S> w = block_work<W, S>(entry, block - entry.first_block);
    adam_phase(w, common.numbers, thread, static_cast<int64_t>(kThreads), w.rows * w.columns);
    __syncthreads();
    const float* u = w.u;
    if (w.left.form != 0) {
        if (w.left.form == 1) {
            left_inner_phase(w, thread, static_cast<int64_t>(kThreads));
            __syncthreads();
        }
        left_outer_phase(w, thread, static_cast<int64_t>(kThreads));
        __syncthreads();
        u = w.other;
    }
    if (w.right.form == 1) {
        const int64_t lane = thread % 32, outputs = w.rows * w.right.rank;
        for (int64_t o = thread / 32; o < outputs; o += kThreads / 32) {
            const float sum = warp_sum(right_share(w, u, o / w.right.rank, o % w.right.rank, lane));
            if (lane == 0) w.inner[o] = sum;
        }
        __syncthreads();
    }
    right_outer_phase(w, u, common.numbers.keep, thread, static_cast<int64_t>(kThreads));
    if (thread == 0 && entry.step && entry.blocks == 1) *entry.step += 1.0f;  // read above, by this thread
}

// The first part of a large parameter: moments and, in the workspace, the update.
template <typename W, typename S>
__global__ void __launch_bounds__(kThreads) cl_projected_adam_elements(const __grid_constant__ Table table) {
    __shared__ Common common;
    const BlockEntry& entry = table.entries[blockIdx.y];
    if (threadIdx.x == 0) find_common(table, entry, common);
    __syncthreads();
    if (common.skip) return;
    const BlockWork<W, S> w = block_work<W, S>(entry, 0);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    adam_phase(w, common.numbers, first, static_cast<int64_t>(gridDim.x) * kThreads, entry.blocks * w.rows * w.columns);
}

// The last part: p <- keep p + update, where the caller has projected the update in the workspace.
template <typename W>
__global__ void __launch_bounds__(kThreads) cl_projected_adam_apply(const __grid_constant__ Table table) {
    __shared__ Common common;
    const BlockEntry& entry = table.entries[blockIdx.y];
    if (threadIdx.x == 0) find_common(table, entry, common);
    __syncthreads();
    if (common.skip) return;
    W* weight = static_cast<W*>(entry.weight);
    const int64_t count = entry.blocks * entry.rows * entry.columns, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
        store(weight + i, add_update(load(weight + i), entry.workspace[i], common.numbers.keep));
    }
}

// Counts the steps of parameters that several blocks have worked on, after all of them are done.
__global__ void cl_projected_adam_count(const __grid_constant__ Table table, bool all) {
    const int64_t i = threadIdx.x;
    if (i >= table.count || (table.tensors.found_inf && *table.tensors.found_inf != 0.0f)) return;
    const BlockEntry& entry = table.entries[i];
    if (entry.step && (all || entry.blocks > 1)) *entry.step += 1.0f;
}

// Tables of at most kEntries parameters, each handed to `launch(table, matrices, largest parameter's elements)`.
template <typename Launch>
void for_tables(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                const StepTensors& tensors, float* workspace, const Launch& launch) {
    pending_error_check("projected_adam_cuda");
    const int64_t total = static_cast<int64_t>(parameters.size());
    for (int64_t begin = 0; begin < total; begin += kEntries) {
        Table table;
        table.settings = settings;
        table.tensors = tensors;
        table.count = static_cast<int>(std::min<int64_t>(total - begin, kEntries));
        int64_t blocks = 0, elements = 0;
        for (int i = 0; i < table.count; ++i) {
            const ProjectedParameter& p = parameters[begin + i];
            table.entries[i] = block_entry(p, tensors, begin + i, blocks, workspace);
            blocks += p.batch;
            elements = std::max(elements, p.batch * p.rows * p.columns);
            workspace += block_floats(p, tensors.whole);
        }
        if (blocks > 0) launch(table, blocks, elements);  // an empty grid is an error
    }
}

// Calls f(W{}, S{}) with the types of the weights and of the moments.
template <typename F>
void with_types(DType weight, DType moment, const F& f) {
    if (weight == DType::f32 && moment == DType::f32) return f(float{}, float{});
    if (weight == DType::bf16 && moment == DType::f32) return f(__nv_bfloat16{}, float{});
    if (weight == DType::bf16 && moment == DType::bf16) return f(__nv_bfloat16{}, __nv_bfloat16{});
    throw std::invalid_argument(
        "projected_adam_cuda: float32 or bfloat16 weights, float32 moments or the weights' type");
}

dim3 element_grid(int64_t elements, int count) {
    return dim3(grid_for(elements, kThreads * 4, 2048), static_cast<unsigned>(count));
}

}  // namespace

void projected_adam_cuda(const std::vector<ProjectedParameter>& parameters, DType weight, DType moment,
                         const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                         std::intptr_t stream) {
    with_types(weight, moment, [&](auto w, auto s) {
        using W = decltype(w);
        using S = decltype(s);
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t blocks, int64_t) {
            cl_projected_adam_block<W, S><<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_block");
            if (blocks > table.count) {
                cl_projected_adam_count<<<1, kEntries, 0, stream_of(stream)>>>(table, false);
                launch_check("cl_projected_adam_count");
            }
        });
    });
}

void projected_adam_elements_cuda(const std::vector<ProjectedParameter>& parameters, DType weight, DType moment,
                                  const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                                  std::intptr_t stream) {
    with_types(weight, moment, [&](auto w, auto s) {
        using W = decltype(w);
        using S = decltype(s);
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t, int64_t elements) {
            const dim3 grid = element_grid(elements, table.count);
            cl_projected_adam_elements<W, S><<<grid, kThreads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_elements");
        });
    });
}

void projected_adam_apply_cuda(const std::vector<ProjectedParameter>& parameters, DType weight,
                               const AdamSettings& settings, const StepTensors& tensors, float* workspace,
                               std::intptr_t stream) {
    with_types(weight, DType::f32, [&](auto w, auto) {
        using W = decltype(w);
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t, int64_t elements) {
            const dim3 grid = element_grid(elements, table.count);
            cl_projected_adam_apply<W><<<grid, kThreads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_apply");
            cl_projected_adam_count<<<1, kEntries, 0, stream_of(stream)>>>(table, true);
            launch_check("cl_projected_adam_count");
        });
    });
}

}  // namespace clk
