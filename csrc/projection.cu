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

constexpr int kThreads = 256;  // of the parts for large parameters
template <typename T>
constexpr int kBlockThreads = sizeof(T) == 8 ? 256 : 512;  // of one small parameter; doubles need the registers
constexpr int kEntries = 96;  // a table stays below the 32764 bytes that kernel arguments may have

struct Table {
    AdamSettings settings;
    StepTensors tensors;
    void* workspace;
    int count;
    BlockEntry entries[kEntries];
};
static_assert(sizeof(Table) <= 32764, "kernel arguments have a limit");

// What every thread of a block needs, worked out once by the first.
template <typename T>
struct Common {
    AdamNumbers<T> numbers;
    bool skip;
};

__device__ double device_number(const void* p, bool is_double) {
    return is_double ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
}

template <typename T>
__device__ __noinline__ void find_common(const Table& table, const BlockEntry& entry, Common<T>& common) {
    const AdamSettings& s = table.settings;
    const StepTensors& t = table.tensors;
    const double step = (entry.step ? static_cast<double>(*entry.step) : entry.steps) + 1.0;
    const double lr = t.lr ? device_number(t.lr, t.lr_is_double) : s.lr;
    const double factor = t.grad_scale ? s.grad_factor / static_cast<double>(*t.grad_scale) : s.grad_factor;
    common.numbers =
        adam_numbers<T>(step, lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.decoupled, s.project_decay, factor);
    common.skip = t.found_inf && *t.found_inf != 0.0f;
}

// inner[row, j] for all rows and j: a warp for each j, kRows rows at a time.
template <typename Work, typename T>
__device__ void right_inner(const Work& w, const T* x, int64_t thread) {
    const int64_t lane = thread % 32, groups = (w.rows + kRows - 1) / kRows;
    for (int64_t o = thread / 32; o < groups * w.right.rank; o += kBlockThreads<T> / 32) {
        const int64_t row = o / w.right.rank * kRows, j = o % w.right.rank;
        T sums[kRows];
        right_shares(w, x, row, j, lane, sums);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const T sum = warp_sum(sums[i]);
            if (lane == 0 && row + i < w.rows) w.inner[(row + i) * w.right.rank + j] = sum;
        }
    }
}

template <typename W, typename S>
__global__ void __launch_bounds__(kBlockThreads<Compute<S>>)
    cl_projected_adam_block(const __grid_constant__ Table table) {
    using T = Compute<S>;
    __shared__ Common<T> common;
    const int64_t block = blockIdx.x, thread = threadIdx.x, threads = kBlockThreads<T>;
    int index = 0;
    while (index + 1 < table.count && table.entries[index + 1].first_block <= block) ++index;
    const BlockEntry& entry = table.entries[index];
    if (thread == 0) find_common(table, entry, common);
    __syncthreads();
    if (common.skip) return;

    const BlockWork<W, S> w = block_work<W, S>(entry, block - entry.first_block, table.workspace);
    adam_phase(w.weight, w.grad, w.exp_avg, w.exp_avg_sq, w.largest, w.u, common.numbers, thread, threads,
               w.rows * w.columns);
    __syncthreads();
    const T* u = w.u;
    if (w.left.form != SideForm::none) {
        if (w.left.thin()) {
            left_inner_phase(w, w.u, thread, threads);
            __syncthreads();
            if (w.left.form == SideForm::twice) {
                left_outer_phase(w, true, thread, threads);
                __syncthreads();
                left_inner_phase(w, w.rest, thread, threads);
                __syncthreads();
            }
        }
        left_outer_phase(w, false, thread, threads);
        __syncthreads();
        u = w.other;
    }
    if (w.right.thin()) {
        right_inner(w, u, thread);
        __syncthreads();
        if (w.right.form == SideForm::twice) {
            right_outer_phase(w, u, true, common.numbers.keep, thread, threads);
            __syncthreads();
            right_inner(w, w.rest, thread);
            __syncthreads();
        }
    }
    right_outer_phase(w, u, false, common.numbers.keep, thread, threads);
    if (thread == 0 && entry.step && entry.blocks == 1) *entry.step += 1.0f;  // read above, by this thread
}

// The first part of a large parameter: moments and, in the workspace, the update.
template <typename W, typename S>
__global__ void __launch_bounds__(kThreads) cl_projected_adam_elements(const __grid_constant__ Table table) {
    using T = Compute<S>;
    __shared__ Common<T> common;
    const BlockEntry& e = table.entries[blockIdx.y];
    if (threadIdx.x == 0) find_common(table, e, common);
    __syncthreads();
    if (common.skip) return;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    adam_phase(static_cast<W*>(e.weight), static_cast<const W*>(e.grad), static_cast<S*>(e.exp_avg),
               static_cast<S*>(e.exp_avg_sq), static_cast<S*>(e.largest),
               static_cast<T*>(table.workspace) + e.workspace, common.numbers, first,
               static_cast<int64_t>(gridDim.x) * kThreads, e.blocks * e.rows * e.columns);
}

// The last part: p <- keep p + update, where the caller has projected the update in the workspace.
template <typename W, typename S>
__global__ void __launch_bounds__(kThreads) cl_projected_adam_apply(const __grid_constant__ Table table) {
    using T = Compute<S>;
    __shared__ Common<T> common;
    const BlockEntry& entry = table.entries[blockIdx.y];
    if (threadIdx.x == 0) find_common(table, entry, common);
    __syncthreads();
    if (common.skip) return;
    W* weight = static_cast<W*>(entry.weight);
    const T* u = static_cast<const T*>(table.workspace) + entry.workspace;
    const int64_t count = entry.blocks * entry.rows * entry.columns, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
        store(weight + i, add_update(static_cast<T>(load(weight + i)), u[i], common.numbers.keep));
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
                const StepTensors& tensors, void* workspace, const Launch& launch) {
    pending_error_check("projected_adam_cuda");
    const int64_t total = static_cast<int64_t>(parameters.size());
    int64_t offset = 0;
    for (int64_t begin = 0; begin < total; begin += kEntries) {
        Table table;
        table.settings = settings;
        table.tensors = tensors;
        table.workspace = workspace;
        table.count = static_cast<int>(std::min<int64_t>(total - begin, kEntries));
        int64_t blocks = 0, elements = 0;
        for (int i = 0; i < table.count; ++i) {
            const ProjectedParameter& p = parameters[begin + i];
            table.entries[i] = block_entry(p, tensors, begin + i, blocks, offset);
            blocks += p.batch;
            elements = std::max(elements, p.batch * p.rows * p.columns);
            offset += p.batch * matrix_values(p.rows, p.columns, p.left, p.right, tensors.whole);
        }
        if (blocks > 0) launch(table, blocks, elements);  // an empty grid is an error
    }
}

// Calls f(W{}, S{}) with the types of the weights and of the moments.
template <typename F>
void with_types(const std::vector<ProjectedParameter>& parameters, const F& f) {
    if (parameters.empty()) return;
    const DType weight = parameters.front().weight_type, moment = parameters.front().moment_type;
    if (weight == DType::f32 && moment == DType::f32) return f(float{}, float{});
    if (weight == DType::f64 && moment == DType::f64) return f(double{}, double{});
    if (weight == DType::f16 && moment == DType::f32) return f(__half{}, float{});
    if (weight == DType::f16 && moment == DType::f16) return f(__half{}, __half{});
    if (weight == DType::bf16 && moment == DType::f32) return f(__nv_bfloat16{}, float{});
    if (weight == DType::bf16 && moment == DType::bf16) return f(__nv_bfloat16{}, __nv_bfloat16{});
    throw std::invalid_argument("projected_adam_cuda: no kernel for these types of weights and moments");
}

dim3 element_grid(int64_t elements, int count) {
    return dim3(grid_for(elements, kThreads * 4, 2048), static_cast<unsigned>(count));
}

}  // namespace

void projected_adam_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                         const StepTensors& tensors, void* workspace, std::intptr_t stream) {
    with_types(parameters, [&](auto w, auto s) {
        using W = decltype(w);
        using S = decltype(s);
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t blocks, int64_t) {
            constexpr int threads = kBlockThreads<Compute<S>>;
            cl_projected_adam_block<W, S><<<static_cast<unsigned>(blocks), threads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_block");
            if (blocks > table.count) {
                cl_projected_adam_count<<<1, kEntries, 0, stream_of(stream)>>>(table, false);
                launch_check("cl_projected_adam_count");
            }
        });
    });
}

void projected_adam_elements_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                                  const StepTensors& tensors, void* workspace, std::intptr_t stream) {
    with_types(parameters, [&](auto w, auto s) {
        using W = decltype(w);
        using S = decltype(s);
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t, int64_t elements) {
            const dim3 grid = element_grid(elements, table.count);
            cl_projected_adam_elements<W, S><<<grid, kThreads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_elements");
        });
    });
}

void projected_adam_apply_cuda(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings,
                               const StepTensors& tensors, void* workspace, std::intptr_t stream) {
    with_types(parameters, [&](auto w, auto s) {
        using W = decltype(w);
        using S = Compute<decltype(s)>;  // only the compute type matters here
        for_tables(parameters, settings, tensors, workspace, [&](const Table& table, int64_t, int64_t elements) {
            const dim3 grid = element_grid(elements, table.count);
            cl_projected_adam_apply<W, S><<<grid, kThreads, 0, stream_of(stream)>>>(table);
            launch_check("cl_projected_adam_apply");
            cl_projected_adam_count<<<1, kEntries, 0, stream_of(stream)>>>(table, true);
            launch_check("cl_projected_adam_count");
        });
    });
}

}  // namespace clk
