// Row by row: the maxima of student and teacher; one pass for both exponentials, their sums, and the sum of
// exp(v) (v - u); one pass that turns the exponentials into the gradient where they lie.
//
//     KL = sum exp(v) (v - u) / zt - (log zt - log zs),  u = (s - max s) / T,  v = (t - max t) / T
//
// keeps its digits where student and teacher are close, which a difference of two log-softmaxes does not, and is
// exactly 0 where they are equal. The exponential is a Taylor polynomial after the usual reduction by powers of two,
// right to about 1 ulp; below e^-87 (e^-708 in double) it is 0. Sums lie in lanes, in chains of at most 64.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "distillation.h"

namespace clk {
namespace {

constexpr int64_t kChain = 64;       // vectors summed in one go: 2000 in one chain lose two digits more
constexpr int64_t kWorth = 1 << 14;  // elements that are worth waking a thread
constexpr int64_t kPadding = 64;     // elements between the rows of a thread's scratch memory

template <typename S>
struct Exp;

template <>
struct Exp<float> {
    using Int = int32_t;
    static constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    static constexpr float kLeast = -87.0f;
    static constexpr int32_t kOne = 0x3f800000;
    static constexpr int kBits = 23, kDegree = 7;  // what is cut off is 5e-9 of the value
};

template <>
struct Exp<double> {
    using Int = int64_t;
    static constexpr double kLog2E = 1.44269504088896340736, kLn2High = 6.93147180369123816490e-01;
    static constexpr double kLn2Low = 1.90821492927058770002e-10, kMagic = 6755399441055744.0, kLeast = -708.0;
    static constexpr int64_t kOne = 0x3ff0000000000000;
    static constexpr int kBits = 52, kDegree = 13;
};

constexpr double kTaylor[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

template <typename S, int bytes>
struct Lanes {
    static constexpr int count = bytes / sizeof(S);
    typedef S V __attribute__((vector_size(bytes)));
    typedef typename Exp<S>::Int I __attribute__((vector_size(bytes)));

    CLK_INLINE static V read(const S* from) {
        V value;
        std::memcpy(&value, from, bytes);
        return value;
    }

    // The lanes in front of element i, where the last vector of a row of n reaches back to be a whole one.
    CLK_INLINE static I before(int64_t i, int64_t n) {
        I lane;
        for (int k = 0; k < count; ++k) lane[k] = k;
        return lane < static_cast<typename Exp<S>::Int>(count - (n - i));
    }

    // Elements [i, i + count) of a row of n. Where the row ends in between, the vector ends there too, and what lies in
    // front of i is -inf: no maximum, and without an exponential.
    CLK_INLINE static V load(const S* row, int64_t i, int64_t n) {
        const V none = V{} - std::numeric_limits<S>::infinity();
        if (n - i >= count) return read(row + i);
        if (n >= count) return before(i, n) ? none : read(row + n - count);
        V value = none;
        std::memcpy(&value, row + i, static_cast<std::size_t>(n - i) * sizeof(S));
        return value;
    }

    // What `load` left out stays as it is.
    CLK_INLINE static void store(S* row, int64_t i, int64_t n, V value) {
        if (n - i >= count) {
            std::memcpy(row + i, &value, bytes);
        } else if (n >= count) {
            value = before(i, n) ? read(row + n - count) : value;
            std::memcpy(row + n - count, &value, bytes);
        } else {
            std::memcpy(row + i, &value, static_cast<std::size_t>(n - i) * sizeof(S));
        }
    }

    // e^x for x <= 0, -inf included; NaN stays.
    CLK_INLINE static V exp(V x) {
        using E = Exp<S>;
        const V rounded = x * E::kLog2E + E::kMagic, power = rounded - E::kMagic;
        const V r = (x - power * E::kLn2High) - power * E::kLn2Low;
        V p = V{} + static_cast<S>(kTaylor[E::kDegree]);
#pragma GCC unroll 16
        for (int k = E::kDegree - 1; k >= 0; --k) p = p * r + static_cast<S>(kTaylor[k]);
        I whole;
        std::memcpy(&whole, &rounded, bytes);
        const I exponent = (whole << E::kBits) + E::kOne;  // the magic number's own bits are shifted out
        V scale;
        std::memcpy(&scale, &exponent, bytes);
        return x < E::kLeast ? V{} : p * scale;
    }

    CLK_INLINE static double sum(V value) {
        double lane[count];
        for (int k = 0; k < count; ++k) lane[k] = static_cast<double>(value[k]);
#pragma GCC unroll 8
        for (int half = count / 2; half; half /= 2) {
            for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
        }
        return lane[0];
    }

    CLK_INLINE static S largest(const S* row, int64_t n) {
        const S none = -std::numeric_limits<S>::infinity();
        V most = V{} + none;
        for (int64_t i = 0; i < n; i += count) {
            const V value = load(row, i, n);
            most = value > most ? value : most;
        }
        S lane[count];
        std::memcpy(lane, &most, bytes);
#pragma GCC unroll 8
        for (int half = count / 2; half; half /= 2) {
            for (int k = 0; k < half; ++k) lane[k] = lane[k + half] > lane[k] ? lane[k + half] : lane[k];
        }
        return lane[0];
    }

    // e <- exp(x - top); the sum of it.
    CLK_INLINE static double exponentials(const S* x, int64_t n, S top, S* e) {
        V total{}, part{};
        for (int64_t i = 0, chain = 0; i < n; i += count) {
            const V value = exp(load(x, i, n) - top);
            store(e, i, n, value);
            part += value;
            if (++chain % kChain == 0) total += part, part = V{};
        }
        return sum(total + part);
    }

    struct Sums {
        double student, teacher, product;
    };

    // The same of u = (s - top_s) / T and v = (t - top_t) / T, and the sum of exp(v) (v - u). Where the maxima are
    // close, v - u is taken from differences of logits, which are exact for close ones; elsewhere those would lose
    // digits.
    CLK_INLINE static Sums exponentials(const S* s, const S* t, int64_t n, S top_s, S top_t, S cold, S* e_s, S* e_t) {
        V total_s{}, total_t{}, total_p{}, part_s{}, part_t{}, part_p{};
        const S apart = top_t - top_s;
        const bool close = std::abs(apart) <= S(2);
        for (int64_t i = 0, chain = 0; i < n; i += count) {
            const V x = load(s, i, n), y = load(t, i, n);
            const V u = (x - top_s) * cold, v = (y - top_t) * cold, a = exp(u), b = exp(v);
            const V p = b * (close ? ((y - x) - apart) * cold : v - u);
            store(e_s, i, n, a);
            store(e_t, i, n, b);
            part_s += a;
            part_t += b;
            part_p += b == S(0) ? V{} : p;  // both may be -inf there
            if (++chain % kChain == 0) {
                total_s += part_s, total_t += part_t, total_p += part_p;
                part_s = part_t = part_p = V{};
            }
        }
        return {sum(total_s + part_s), sum(total_t + part_t), sum(total_p + part_p)};
    }

    // out <- a e
    CLK_INLINE static void scale(const S* e, int64_t n, S a, S* out) {
        for (int64_t i = 0; i < n; i += count) store(out, i, n, load(e, i, n) * a);
    }

    // out <- a e - b f
    CLK_INLINE static void difference(const S* e, const S* f, int64_t n, S a, S b, S* out) {
        for (int64_t i = 0; i < n; i += count) store(out, i, n, load(e, i, n) * a - load(f, i, n) * b);
    }
};

template <typename S, typename In>
CLK_INLINE void widen(const In* from, int64_t stride, int64_t n, S* out) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(to_float(from[i]));
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(to_float(from[i * stride]));
    }
}

// The columns of the slice as S: where they lie, or converted into `scratch`.
template <typename S>
CLK_INLINE const S* row_of(const Logits& x, int64_t row, int64_t first, int64_t n, S* scratch, bool copied) {
    const int64_t at = row * x.row_stride + first * x.column_stride;
    constexpr DType mine = sizeof(S) == 8 ? DType::f64 : DType::f32;
    if (x.dtype == mine && x.column_stride == 1 && !copied) return static_cast<const S*>(x.data) + at;
    switch (x.dtype) {
        case DType::f32:
            widen(static_cast<const float*>(x.data) + at, x.column_stride, n, scratch);
            break;
        case DType::f64:
            widen(static_cast<const double*>(x.data) + at, x.column_stride, n, scratch);
            break;
        case DType::f16:
            widen(static_cast<const Half*>(x.data) + at, x.column_stride, n, scratch);
            break;
        case DType::bf16:
            widen(static_cast<const BFloat16*>(x.data) + at, x.column_stride, n, scratch);
            break;
    }
    return scratch;
}

template <typename Out, typename S>
CLK_INLINE void narrow(const S* from, int64_t n, void* out) {
    for (int64_t i = 0; i < n; ++i) static_cast<Out*>(out)[i] = from_float<Out>(static_cast<float>(from[i]));
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// One row of a gradient: zeros around the slice, and a place for the slice itself.
template <typename S>
struct GradientRow {
    CLK_INLINE GradientRow(const DistillationBatch& batch, const Logits& like, void* gradient, int64_t row, S* scratch)
        : dtype(like.dtype), size(size_of(like.dtype)), n(batch.last - batch.first) {
        if (!gradient) {
            values = scratch;
            return;
        }
        char* whole = static_cast<char*>(gradient) + row * batch.columns * size;
        const int64_t behind = batch.columns - batch.last;
        if (batch.first) std::memset(whole, 0, static_cast<std::size_t>(batch.first * size));
        if (behind) std::memset(whole + batch.last * size, 0, static_cast<std::size_t>(behind * size));
        slice = whole + batch.first * size;
        const bool direct = size == sizeof(S) && (dtype == DType::f32 || dtype == DType::f64);
        values = direct ? reinterpret_cast<S*>(slice) : scratch;
    }
    CLK_INLINE void fill(S value) const {
        if (!slice) return;
        for (int64_t i = 0; i < n; ++i) values[i] = value;
        finish();
    }
    CLK_INLINE void finish() const {
        if (!slice || static_cast<void*>(values) == slice) return;
        switch (dtype) {
            case DType::f32:
                narrow<float>(values, n, slice);
                break;
            case DType::f16:
                narrow<Half>(values, n, slice);
                break;
            case DType::bf16:
                narrow<BFloat16>(values, n, slice);
                break;
            case DType::f64:
                break;  // then S is double too
        }
    }
    DType dtype;
    int64_t size, n;
    S* values;
    char* slice = nullptr;
};

inline double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

// probability * value, where the value may be infinite if the probability is 0
inline double times(double probability, double value) { return probability == 0.0 ? 0.0 : probability * value; }

// One row's losses and gradients, `factor` being what the row counts. `scratch`: five rows.
template <typename L, typename S>
CLK_INLINE double one_row(const DistillationBatch& p, int64_t row, double factor, S* scratch, int64_t stride) {
    const int64_t n = p.last - p.first;
    const S nan = std::numeric_limits<S>::quiet_NaN();
    const int64_t y = p.target ? p.target[row * p.target_stride] - p.first : -1;
    const bool fits = y >= 0 && y < n;
    double loss = 0.0;
    if (p.hard.data) {
        const GradientRow<S> g(p, p.hard, p.hard_grad, row, scratch + stride);
        if (factor == 0.0 || p.hard_weight == 0.0) {
            g.fill(0);
        } else if (!fits) {
            loss = nan;
            g.fill(nan);
        } else {
            const S* z = row_of<S>(p.hard, row, p.first, n, scratch, false);
            const S top = L::largest(z, n);
            const double sum = L::exponentials(z, n, top, g.values);
            const double scale = p.hard_weight * factor;
            loss += scale * (std::log(sum) - (static_cast<double>(z[y]) - static_cast<double>(top)));
            if (p.hard_grad) {
                const S at_target = static_cast<S>(scale * (g.values[y] / sum - 1.0));
                L::scale(g.values, n, static_cast<S>(scale / sum), g.values);
                g.values[y] = at_target;
                g.finish();
            }
        }
    }
    const GradientRow<S> g(p, p.student, p.student_grad, row, scratch + 3 * stride);
    if (factor == 0.0 || (p.soft_weight == 0.0 && p.two_way_weight == 0.0)) {
        g.fill(0);
        return loss;
    }
    if (p.decoupled && !fits) {
        g.fill(nan);
        return nan;
    }
    const S* s = row_of<S>(p.student, row, p.first, n, scratch, p.decoupled);
    const S* t = row_of<S>(p.teacher, row, p.first, n, scratch + 2 * stride, p.decoupled);
    S s_target{}, t_target{};
    if (p.decoupled) {  // both rows are copies now
        s_target = s[y], t_target = t[y];
        scratch[y] = scratch[2 * stride + y] = -std::numeric_limits<S>::infinity();
    }
    const S cold = static_cast<S>(1.0 / p.temperature), top_s = L::largest(s, n), top_t = L::largest(t, n);
    S* const e_t = scratch + 4 * stride;
    const auto sums = L::exponentials(s, t, n, top_s, top_t, cold, g.values, e_t);
    const double log_s = std::log(sums.student), log_t = std::log(sums.teacher), warm = p.temperature * factor;
    loss += p.soft_weight * p.temperature * warm * (sums.product / sums.teacher - (log_t - log_s));
    double for_s = p.soft_weight, odds_gap = 0.0;
    if (p.decoupled) {
        const double odds_s = (static_cast<double>(s_target) - top_s) / p.temperature - log_s;
        const double odds_t = (static_cast<double>(t_target) - top_t) / p.temperature - log_t;
        const double p_t = std::exp(log_sigmoid(odds_t)), rest_t = std::exp(log_sigmoid(-odds_t));
        loss += p.two_way_weight * p.temperature * warm *
                (times(p_t, log_sigmoid(odds_t) - log_sigmoid(odds_s)) +
                 times(rest_t, log_sigmoid(-odds_t) - log_sigmoid(-odds_s)));
        odds_gap = p.two_way_weight * (std::exp(log_sigmoid(odds_s)) - p_t);
        for_s -= odds_gap;
    }
    if (p.student_grad) {
        L::difference(g.values, e_t, n, static_cast<S>(warm * for_s / sums.student),
                      static_cast<S>(warm * p.soft_weight / sums.teacher), g.values);
        if (p.decoupled) g.values[y] = static_cast<S>(warm * odds_gap);
        g.finish();
    }
    return loss;
}

template <typename L, typename S>
CLK_INLINE void some_rows(const DistillationBatch& p, int64_t begin, int64_t end, void* memory, double* losses) {
    S* const scratch = static_cast<S*>(memory);
    const int64_t stride = p.last - p.first + kPadding;
    for (int64_t row = begin; row < end; ++row) {
        losses[row] = one_row<L, S>(p, row, p.weight ? p.weight[row] : p.scale, scratch, stride);
    }
}

using Run = void (*)(const DistillationBatch&, int64_t begin, int64_t end, void* memory, double* losses);

#define CLK_ENGINE(name, target, S, bytes)                                                                   \
    target void name(const DistillationBatch& p, int64_t begin, int64_t end, void* memory, double* losses) { \
        some_rows<Lanes<S, bytes>, S>(p, begin, end, memory, losses);                                        \
    }

CLK_ENGINE(base_f32, , float, 16)
CLK_ENGINE(base_f64, , double, 16)
#if CLK_X86
CLK_ENGINE(avx2_f32, CLK_TARGET_AVX2, float, 32)
CLK_ENGINE(avx2_f64, CLK_TARGET_AVX2, double, 32)
CLK_ENGINE(avx512_f32, CLK_TARGET_AVX512, float, 64)
CLK_ENGINE(avx512_f64, CLK_TARGET_AVX512, double, 64)
#endif

Run engine_for(bool wide) {
#if CLK_X86
    if (isa() == Isa::avx512) return wide ? avx512_f64 : avx512_f32;
    if (isa() == Isa::avx2) return wide ? avx2_f64 : avx2_f32;
#endif
    return wide ? base_f64 : base_f32;
}

template <typename T>
void write_losses(const DistillationBatch& p, const std::vector<double>& losses) {
    T* const out = static_cast<T*>(p.loss);
    if (p.each_row) {
        std::transform(losses.begin(), losses.end(), out, [](double x) { return static_cast<T>(x); });
    } else {
        double total = 0.0;
        for (const double loss : losses) total += loss;
        *out = static_cast<T>(total);
    }
}

}  // namespace

void distillation_cpu(const DistillationBatch& p, int most) {
    const int64_t n = p.last - p.first;
    const int threads = static_cast<int>(
        std::clamp<int64_t>(p.rows * n / kWorth, 1, std::min<int64_t>(most, std::max<int64_t>(p.rows, 1))));
    const int64_t bytes = 5 * (n + kPadding) * static_cast<int64_t>(p.loss_is_double ? sizeof(double) : sizeof(float));
    std::vector<double> losses(static_cast<std::size_t>(p.rows));
    std::vector<char> memory(static_cast<std::size_t>(threads * bytes));
    const Run run = engine_for(p.loss_is_double);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int i = 0; i < threads; ++i) {
        run(p, p.rows * i / threads, p.rows * (i + 1) / threads, memory.data() + i * bytes, losses.data());
    }
    if (p.loss_is_double) {
        write_losses<double>(p, losses);
    } else {
        write_losses<float>(p, losses);
    }
}

}  // namespace clk
