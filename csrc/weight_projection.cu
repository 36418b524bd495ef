// Steps with a trainable projection on CUDA: three launches for all tensors of a model (weight_projection_rows.h says
// what each does). Nothing waits for the host: steps, learning rate, scale, found_inf and radii are read on the device,
// sums are added in a fixed order, and parameters travel as kernel arguments, so a captured graph keeps what it was
// given.
//
// Bytes a parameter: the step reads W, G, m, v, W_0 and writes W, m, v (32); rescaled rows are read and written once
// more (12). Blocks of 256 threads take about 8192 elements, 32 a thread. The step holds five vectors of 4 floats and
// three sums in 72 to 80 registers (ptxas, sm_80 and sm_90, no spills), so that three blocks, 24 warps, share an SM:
// 24 x 32 lanes x 80 bytes on their way are 61 kB, over twice the 26 kB that 4.3 TB/s over 132 SMs want at 800 ns.
// More blocks (64 registers) would spill.
#include "common/launch.h"
#include "weight_projection_rows.h"

namespace clk {
namespace ftp {
namespace {

constexpr int kEntries = 312;      // ViT-L has 294 tensors; a table stays below the 32764 bytes that arguments may have
constexpr int kRescaleBlocks = 4;  // blocks of the step that one of the rescaling visits: most have nothing to do

struct Table {
    Settings settings;
    RowSums* slots;
    Verdict* verdicts;
    uint32_t blocks;
    int count;
    Entry entries[kEntries];
};
static_assert(sizeof(Table) <= 32764, "kernel arguments have a limit");

__device__ RowSums warp_total(RowSums s) {
    return {warp_sum(s.dot), warp_sum(s.before), warp_sum(s.after), warp_sum(s.moved)};
}

template <Form kForm>
__device__ __noinline__ void find_numbers(const Settings& settings, const Entry& entry, Numbers& numbers) {
    numbers = numbers_of<kForm>(settings, entry);
}

template <typename W, typename S, Form kForm>
__global__ void __launch_bounds__(kThreads, 3) cl_ftp_step(const __grid_constant__ Table table) {
    __shared__ Numbers numbers;
    __shared__ RowSums shares[kWarps];
    const int64_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const Entry& e = table.entries[entry_of(table.entries, table.count, blockIdx.x)];
    if (thread == 0) find_numbers<kForm>(table.settings, e, numbers);
    __syncthreads();
    if (numbers.skip) return;
    const Split split = split_of(e.rows, e.columns);
    const int64_t block = blockIdx.x - e.first_block;
    if (split.by_warp) {
        for (int64_t turn = 0; turn < split.rows_each; ++turn) {
            const Place at = place_of(e, split, block, warp, turn);
            if (at.length == 0) return;
            RowSums sums{};
            step_span<W, S, kForm>(e, numbers, at.begin, at.length, lane, 32, sums);
            sums = warp_total(sums);
            if (lane == 0) table.slots[at.slot] = sums;
        }
        return;
    }
    const Place at = place_of(e, split, block, 0, 0);
    RowSums sums{};
    step_span<W, S, kForm>(e, numbers, at.begin, at.length, thread, kThreads, sums);
    sums = warp_total(sums);
    if (lane == 0) shares[warp] = sums;
    __syncthreads();
    if (thread == 0) table.slots[at.slot] = narrow(gather(shares, kWarps, 0, 1));
}

// Every thread gets `op` over all threads, always in the same order; `shared` holds a value of each warp.
template <typename T, typename Op>
__device__ T block_total(T x, T* shared, const Op& op) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads();  // whoever read `shared` before is done
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    T total = shared[0];
    for (int i = 1; i < kPolicyThreads / 32; ++i) total = op(total, shared[i]);
    return total;
}

struct Sum {
    __device__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__global__ void __launch_bounds__(kPolicyThreads) cl_ftp_policy(const __grid_constant__ Table table) {
    __shared__ double doubles[kPolicyThreads / 32];
    __shared__ float floats[kPolicyThreads / 32];
    __shared__ Decision decision;
    const Settings& s = table.settings;
    const Entry& e = table.entries[blockIdx.x];
    const int64_t thread = threadIdx.x;
    if (skips(s)) {
        if (thread == 0) table.verdicts[blockIdx.x] = {0.0f, Action::none};
        return;
    }
    const Split split = split_of(e.rows, e.columns);
    if (split.blocks > 0) {
        if (split.parts > kSerialParts) {
            for (int64_t row = 0; row < e.rows; ++row) {
                RowSums* const parts = table.slots + row_slot(e, split, row);
                WideSums sums = gather(parts, split.parts, thread, kPolicyThreads);
                sums = {block_total(sums.dot, doubles, Sum()), block_total(sums.before, doubles, Sum()),
                        block_total(sums.after, doubles, Sum()), block_total(sums.moved, doubles, Sum())};
                if (thread == 0) *parts = narrow(sums);
            }
        } else if (split.parts > 1) {
            gather_rows(e, split, table.slots, thread, kPolicyThreads);
        }
        __syncthreads();
        Heard heard = hear_rows(s, e, split, table.slots, thread, kPolicyThreads);
        heard.slope = block_total(heard.slope, doubles, Sum());
        heard.largest = block_total(heard.largest, floats, Max());
        heard.sound = __syncthreads_or(heard.sound);
        heard.moved = __syncthreads_or(heard.moved);
        if (thread == 0) {
            decision = decide(s, e, heard);
            table.verdicts[blockIdx.x] = decision.verdict;
        }
        __syncthreads();
        if (decision.verdict.action != Action::none) {
            const float gamma = decision.verdict.gamma;
            double hits = count_outside(s, e, split, table.slots, gamma, thread, kPolicyThreads);
            hits = block_total(hits, doubles, Sum());
            if (thread == 0) record(e, decision, heard, hits);
        }
    }
    if (thread == 0 && !(e.flags & kHostStep)) *e.step += 1.0f;
}

template <typename W>
__global__ void __launch_bounds__(kThreads) cl_ftp_rescale(const __grid_constant__ Table table) {
    const int64_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const uint32_t begin = blockIdx.x * kRescaleBlocks;
    int index = entry_of(table.entries, table.count, begin);
    for (uint32_t at_block = begin; at_block < begin + kRescaleBlocks && at_block < table.blocks; ++at_block) {
        while (index + 1 < table.count && table.entries[index + 1].first_block <= at_block) ++index;
        const Verdict verdict = table.verdicts[index];
        if (verdict.action == Action::none) continue;
        const Entry& e = table.entries[index];
        const Split split = split_of(e.rows, e.columns);
        const int64_t turns = split.by_warp ? split.rows_each : 1;
        for (int64_t turn = 0; turn < turns; ++turn) {
            const Place at = place_of(e, split, at_block - e.first_block, warp, turn);
            if (at.length == 0) break;
            const float n = norm_of(table.slots[row_slot(e, split, at.row)].after, table.settings.rule.norm);
            rescale_span<W>(e, verdict, n, at.begin, at.length, split.by_warp ? lane : thread,
                            split.by_warp ? 32 : kThreads);
        }
    }
}

// Calls f(W{}, S{}) with the types of the weights and of the moments.
template <typename F>
void with_types(const AnchoredParameter& p, const F& f) {
    const DType weight = p.weight_type, moment = p.moment_type;
    if (weight == DType::f32 && moment == DType::f32) return f(float{}, float{});
    if (weight == DType::f16 && moment == DType::f32) return f(__half{}, float{});
    if (weight == DType::f16 && moment == DType::f16) return f(__half{}, __half{});
    if (weight == DType::bf16 && moment == DType::f32) return f(__nv_bfloat16{}, float{});
    if (weight == DType::bf16 && moment == DType::bf16) return f(__nv_bfloat16{}, __nv_bfloat16{});
    throw std::invalid_argument("ftp_step_cuda: no kernel for these types of weights and moments");
}

template <typename W, typename S>
void launch(const Table& table, Form form, cudaStream_t stream) {
    if (table.blocks > 0) {
        const auto step = form == Form::sgd    ? cl_ftp_step<W, S, Form::sgd>
                          : form == Form::adam ? cl_ftp_step<W, S, Form::adam>
                                               : cl_ftp_step<W, S, Form::amsgrad>;
        step<<<table.blocks, kThreads, 0, stream>>>(table);
        launch_check("cl_ftp_step");
    }
    cl_ftp_policy<<<static_cast<unsigned>(table.count), kPolicyThreads, 0, stream>>>(table);
    launch_check("cl_ftp_policy");
    if (table.blocks > 0) {
        const auto blocks = static_cast<unsigned>(divide_up(table.blocks, kRescaleBlocks));
        cl_ftp_rescale<W><<<blocks, kThreads, 0, stream>>>(table);
        launch_check("cl_ftp_rescale");
    }
}

}  // namespace
}  // namespace ftp

void ftp_step_cuda(const std::vector<AnchoredParameter>& parameters, const BaseSettings& base, const RadiusRule& rule,
                   const FtpTensors& tensors, void* workspace, std::intptr_t stream) {
    using namespace ftp;
    pending_error_check("ftp_step_cuda");
    if (parameters.empty()) return;
    const int64_t total = static_cast<int64_t>(parameters.size());
    int64_t slots = 0, slot = 0;
    for (const AnchoredParameter& p : parameters) slots += slots_of(p);
    with_types(parameters.front(), [&](auto w, auto s) {
        Table table;
        table.settings = {base, rule, tensors};
        table.slots = static_cast<RowSums*>(workspace);
        for (int64_t begin = 0; begin < total; begin += table.count) {
            table.verdicts = reinterpret_cast<Verdict*>(table.slots + slots) + begin;
            table.count = fill_table(parameters, begin, kEntries, table.entries, slot, table.blocks);
            launch<decltype(w), decltype(s)>(table, form_of(base, parameters.front()), stream_of(stream));
        }
    });
}

}  // namespace clk
