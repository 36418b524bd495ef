// Plays csrc/weight_projection.cu on the host: the same tables and phases, a block after the other and thread by
// thread. A phase ends where the kernel has a barrier; sums over a warp are the butterfly of common/math.cuh. Threads
// run in reverse order too, when asked: a phase whose threads depended on each other would give another result.
#include <algorithm>
#include <vector>

#include "weight_projection_rows.h"

namespace {

using namespace clk;
using namespace clk::ftp;

constexpr int kTable = 5;  // entries: several tables even for a short list
constexpr int kRescaleBlocks = 4;
bool reversed = false;

template <typename Phase>
void for_threads(int64_t count, const Phase& phase) {
    for (int64_t i = 0; i < count; ++i) phase(reversed ? count - 1 - i : i);
}

template <typename T, typename Op>
T butterfly(std::vector<T> x, const Op& op) {
    for (size_t offset = x.size() / 2; offset > 0; offset /= 2) {
        std::vector<T> y = x;
        for (size_t lane = 0; lane < x.size(); ++lane) y[lane] = op(x[lane], x[lane ^ offset]);
        x = y;
    }
    return x[0];
}

RowSums plus(const RowSums& a, const RowSums& b) {
    return {a.dot + b.dot, a.before + b.before, a.after + b.after, a.moved + b.moved};
}

template <typename W, typename S, Form kForm>
void step_block(const Entry& e, const Settings& settings, int64_t block, RowSums* slots) {
    const Numbers numbers = numbers_of<kForm>(settings, e);
    if (numbers.skip) return;
    const Split split = split_of(e.rows, e.columns);
    if (split.by_warp) {
        for_threads(kWarps, [&](int64_t warp) {
            for (int64_t turn = 0; turn < split.rows_each; ++turn) {
                const Place at = place_of(e, split, block, warp, turn);
                if (at.length == 0) return;
                std::vector<RowSums> lanes(32, RowSums{});
                for_threads(32, [&](int64_t lane) {
                    step_span<W, S, kForm>(e, numbers, at.begin, at.length, lane, 32, lanes[lane]);
                });
                slots[at.slot] = butterfly(lanes, plus);
            }
        });
        return;
    }
    const Place at = place_of(e, split, block, 0, 0);
    std::vector<RowSums> threads(kThreads, RowSums{});
    for_threads(kThreads, [&](int64_t thread) {
        step_span<W, S, kForm>(e, numbers, at.begin, at.length, thread, kThreads, threads[thread]);
    });
    std::vector<RowSums> shares;
    for (int warp = 0; warp < kWarps; ++warp) {
        shares.push_back(butterfly(std::vector(threads.begin() + 32 * warp, threads.begin() + 32 * (warp + 1)), plus));
    }
    slots[at.slot] = narrow(gather(shares.data(), kWarps, 0, 1));
}

void policy(const Entry& e, const Settings& s, RowSums* slots, Verdict& verdict) {
    verdict = {0.0f, Action::none};
    if (skips(s)) return;
    const Split split = split_of(e.rows, e.columns);
    if (split.blocks > 0) {
        if (split.parts > kSerialParts) {
            for (int64_t row = 0; row < e.rows; ++row) {
                RowSums* const parts = slots + row_slot(e, split, row);
                WideSums sums{0, 0, 0, 0};
                for_threads(kPolicyThreads, [&](int64_t thread) {
                    const WideSums more = gather(parts, split.parts, thread, kPolicyThreads);
                    sums = {sums.dot + more.dot, sums.before + more.before, sums.after + more.after,
                            sums.moved + more.moved};
                });
                *parts = narrow(sums);
            }
        } else if (split.parts > 1) {
            for_threads(kPolicyThreads, [&](int64_t thread) { gather_rows(e, split, slots, thread, kPolicyThreads); });
        }
        Heard heard{0.0, -1.0f, false, false};
        for_threads(kPolicyThreads, [&](int64_t thread) {
            const Heard more = hear_rows(s, e, split, slots, thread, kPolicyThreads);
            heard = {heard.slope + more.slope, std::max(heard.largest, more.largest), heard.sound || more.sound,
                     heard.moved || more.moved};
        });
        const Decision decision = decide(s, e, heard);
        verdict = decision.verdict;
        if (verdict.action != Action::none) {
            double hits = 0.0;
            for_threads(kPolicyThreads, [&](int64_t thread) {
                hits += count_outside(s, e, split, slots, verdict.gamma, thread, kPolicyThreads);
            });
            record(e, decision, heard, hits);
        }
    }
    if (!(e.flags & kHostStep)) *e.step += 1.0f;
}

template <typename W>
void rescale(const Entry* entries, int count, uint32_t blocks, const Settings& s, const RowSums* slots,
             const Verdict* verdicts) {
    for (uint32_t begin = 0; begin < blocks; begin += kRescaleBlocks) {
        int index = entry_of(entries, count, begin);
        for (uint32_t at_block = begin; at_block < begin + kRescaleBlocks && at_block < blocks; ++at_block) {
            while (index + 1 < count && entries[index + 1].first_block <= at_block) ++index;
            const Entry& e = entries[index];
            if (verdicts[index].action == Action::none) continue;
            const Split split = split_of(e.rows, e.columns);
            const int64_t turns = split.by_warp ? split.rows_each : 1;
            for_threads(kThreads, [&](int64_t thread) {
                for (int64_t turn = 0; turn < turns; ++turn) {
                    const Place at = place_of(e, split, at_block - e.first_block, thread / 32, turn);
                    if (at.length == 0) break;
                    const float n = norm_of(slots[row_slot(e, split, at.row)].after, s.rule.norm);
                    rescale_span<W>(e, verdicts[index], n, at.begin, at.length, split.by_warp ? thread % 32 : thread,
                                    split.by_warp ? 32 : kThreads);
                }
            });
        }
    }
}

template <typename W, typename S>
void play_all(const std::vector<AnchoredParameter>& parameters, const Settings& settings, void* workspace) {
    int64_t slot = 0, slots = 0;
    for (const AnchoredParameter& p : parameters) slots += slots_of(p);
    auto* const sums = static_cast<RowSums*>(workspace);
    int count = 0;
    for (int64_t begin = 0; begin < static_cast<int64_t>(parameters.size()); begin += count) {
        Entry entries[kTable];
        uint32_t blocks = 0;
        Verdict* const verdicts = reinterpret_cast<Verdict*>(sums + slots) + begin;
        count = fill_table(parameters, begin, kTable, entries, slot, blocks);
        for (uint32_t block = 0; block < blocks; ++block) {
            const Entry& e = entries[entry_of(entries, count, block)];
            const Form form = form_of(settings.base, parameters.front());
            const auto play = form == Form::sgd    ? step_block<W, S, Form::sgd>
                              : form == Form::adam ? step_block<W, S, Form::adam>
                                                   : step_block<W, S, Form::amsgrad>;
            play(e, settings, block - e.first_block, sums);
        }
        for (int i = 0; i < count; ++i) policy(entries[i], settings, sums, verdicts[i]);
        rescale<W>(entries, count, blocks, settings, sums, verdicts);
    }
}

}  // namespace

// Arguments as those of the module's ftp_step_cuda: integers, numbers, addresses, in the order of bindings.cpp.
extern "C" void play(const int64_t* pointers, const int64_t* sizes, const double* numbers, int64_t count, bool adam,
                     const double* base, bool flag, double kappa, double floor, bool masked, int norm,
                     const int64_t* tensors, void* workspace, bool reverse) {
    reversed = reverse;
    const std::vector<AnchoredParameter> parameters =
        anchored_parameters({pointers, pointers + count * kAnchoredPointers}, {sizes, sizes + count * kAnchoredSizes},
                            {numbers, numbers + count * kAnchoredNumbers});
    const Settings settings{
        {adam ? BaseKind::adam : BaseKind::sgd, base[0], base[1], base[2], base[3], base[4], flag, base[5]},
        {kappa, floor, masked, static_cast<RowNorm>(norm)},
        {reinterpret_cast<const void*>(tensors[0]), tensors[1] != 0, reinterpret_cast<const float*>(tensors[2]),
         reinterpret_cast<const float*>(tensors[3])}};
    const DType weight = parameters.front().weight_type, moment = parameters.front().moment_type;
    const auto all = weight == DType::f16 && moment == DType::f32    ? play_all<Half, float>
                     : weight == DType::f16                          ? play_all<Half, Half>
                     : weight == DType::bf16 && moment == DType::f32 ? play_all<BFloat16, float>
                     : weight == DType::bf16                         ? play_all<BFloat16, BFloat16>
                                                                     : play_all<float, float>;
    all(parameters, settings, workspace);
}
