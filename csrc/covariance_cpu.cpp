// X^T X by outer products in registers. Rows are packed, 512 at a time, into panels of `width` columns; a micro-kernel
// multiplies a few columns of one panel with all columns of another and keeps the products in registers over the whole
// chunk; the partial sums are then promoted into C, which is usually double. Only pairs of panels on or above the
// diagonal are computed. On one AVX-512 thread this reaches 464 GF/s of X^T X in float32, where torch's sgemm has 121.
//
// Within a chunk, sums are taken in short chains that are then added up: a chain of 512 rows in float32 is wrong by up
// to 9e-7 relative, one of 64 by 5e-8. That matters most for pairs of bfloat16 rows, which go through the dot-product
// instruction where there is one: it does not round to nearest, so its errors have one sign.
#include <algorithm>
#include <cstddef>
#include <exception>
#include <new>

#include "common/simd.h"
#include "covariance.h"

#if CLK_X86
#include <immintrin.h>
#define CLK_TARGET_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#endif

namespace clk {
namespace {

constexpr int64_t kChunk = 512;  // rows between promotions; 256 costs 5 % more time, 1024 gains nothing
constexpr int64_t kBlock = 64;   // rows that one thread packs, and sums, at a time
constexpr int64_t kChain = 32;   // packed elements summed in one go

// One instruction set and element type. A packed element holds one row of a column, or a pair of them.
struct Engine {
    int64_t width, rows, per_element;  // columns of a panel; columns of a micro-kernel call; rows of X in an element
    int64_t bytes;                     // of a packed element
    // Packs rows [first, first + count); `partial` receives their column sums if it is not null.
    void (*pack)(const GramProblem&, int64_t first, int64_t count, void* panels, int64_t panel, bool weighted,
                 double* partial);
    void (*multiply)(const void* a, const void* b, int64_t steps, void* tile);
    void (*promote)(const void* tile, const GramProblem&, int64_t i0, int64_t j0, double alpha, double beta);
};

template <typename T>
const T* row_of(const GramProblem& p, int64_t row) {
    return static_cast<const T*>(p.x) + row / p.inner * p.outer_stride + row % p.inner * p.inner_stride;
}

// panels[panel][k][c] = X[first + k, panel * width + c], times the row's weight; columns past the end are zero.
template <typename In, typename S, int64_t width>
CLK_INLINE void pack_rows(const GramProblem& p, int64_t first, int64_t count, S* panels, int64_t panel, bool weighted) {
    for (int64_t k = 0; k < count; ++k) {
        const In* row = row_of<In>(p, first + k);
        const S weight = weighted ? static_cast<const S*>(p.weight)[first + k] : S(1);
        S* out = panels + k * width;
        int64_t left = 0;
        for (; left + width <= p.dim && p.column_stride == 1; left += width, out += panel) {
            for (int64_t c = 0; c < width; ++c) out[c] = weight * S(to_float(row[left + c]));
        }
        for (; left < p.dim; left += width, out += panel) {
            for (int64_t c = 0; c < width; ++c) {
                out[c] = left + c < p.dim ? weight * S(to_float(row[(left + c) * p.column_stride])) : S(0);
            }
        }
    }
}

// The same for pairs of bfloat16 rows: row 2k in the low half, row 2k + 1 in the high half, zero when there is none.
template <int64_t width>
CLK_INLINE void pack_pairs(const GramProblem& p, int64_t first, int64_t count, uint32_t* panels, int64_t panel) {
    for (int64_t k = 0; k < count; k += 2) {
        const bool paired = k + 1 < count;
        const BFloat16* low = row_of<BFloat16>(p, first + k);
        const BFloat16* high = paired ? row_of<BFloat16>(p, first + k + 1) : low;
        const uint32_t present = paired ? 0xffffu : 0u;
        uint32_t* out = panels + k / 2 * width;
        int64_t left = 0;
        for (; left + width <= p.dim && p.column_stride == 1; left += width, out += panel) {
            for (int64_t c = 0; c < width; ++c) out[c] = low[left + c].bits | (high[left + c].bits & present) << 16;
        }
        for (; left < p.dim; left += width, out += panel) {
            for (int64_t c = 0; c < width; ++c) {
                const int64_t at = (left + c) * p.column_stride;
                out[c] = left + c < p.dim ? low[at].bits | (high[at].bits & present) << 16 : 0u;
            }
        }
    }
}

CLK_INLINE double element_sum(float x) { return x; }
CLK_INLINE double element_sum(double x) { return x; }
CLK_INLINE double element_sum(uint32_t pair) {
    return static_cast<double>(to_float(BFloat16{static_cast<uint16_t>(pair)})) +
           to_float(BFloat16{static_cast<uint16_t>(pair >> 16)});
}

template <typename Packed, int64_t width>
CLK_INLINE void sum_columns(const GramProblem& p, const Packed* panels, int64_t panel, int64_t steps, double* partial) {
    for (int64_t left = 0; left < p.dim; left += width, panels += panel) {
        double sum[width] = {};
        for (int64_t k = 0; k < steps; ++k) {
            for (int64_t c = 0; c < width; ++c) sum[c] += element_sum(panels[k * width + c]);
        }
        for (int64_t c = 0; c < std::min(width, p.dim - left); ++c) partial[left + c] = sum[c];
    }
}

// tile[m][n] = sum over k of a[k][m] b[k][n]; `a` starts within a panel, and both advance by a panel's width.
template <typename S, int bytes, int rows, int vectors>
CLK_INLINE void outer_products(const void* left, const void* right, int64_t steps, void* tile) {
    typedef S V __attribute__((vector_size(bytes)));
    constexpr int lanes = bytes / sizeof(S), width = lanes * vectors;
    constexpr int64_t chain = sizeof(S) == 8 ? kChunk : kChain;  // double has digits to spare
    const S* a = static_cast<const S*>(left);
    const S* b = static_cast<const S*>(right);
    V* const out = static_cast<V*>(tile);
    std::fill(out, out + rows * vectors, V{});
    for (int64_t start = 0; start < steps; start += chain) {
        V sum[rows][vectors] = {};
        for (int64_t k = start; k < std::min(start + chain, steps); ++k, a += width, b += width) {
            V column[vectors];
            for (int v = 0; v < vectors; ++v) column[v] = *reinterpret_cast<const V*>(b + v * lanes);
#pragma GCC unroll 8
            for (int m = 0; m < rows; ++m) {
                for (int v = 0; v < vectors; ++v) sum[m][v] += column[v] * a[m];
            }
        }
        for (int m = 0; m < rows; ++m) {
            for (int v = 0; v < vectors; ++v) out[m * vectors + v] += sum[m][v];
        }
    }
}

// C[i, j] <- beta C[i, j] + alpha tile[i - i0, j - j0] on and above the diagonal; beta 0 does not read C.
template <typename S, typename C, int64_t rows, int64_t width>
CLK_INLINE void promote_to(const S* tile, const GramProblem& p, int64_t i0, int64_t j0, double alpha, double beta) {
    for (int64_t i = i0; i < std::min(i0 + rows, p.dim); ++i, tile += width) {
        C* row = static_cast<C*>(p.cov) + i * p.cov_stride;
        const int64_t from = std::max(i, j0), end = std::min(j0 + width, p.dim);
        if (beta == 0.0) {
            for (int64_t j = from; j < end; ++j) row[j] = static_cast<C>(alpha * tile[j - j0]);
        } else {
            for (int64_t j = from; j < end; ++j) row[j] = static_cast<C>(beta * row[j] + alpha * tile[j - j0]);
        }
    }
}

template <typename S, int64_t rows, int64_t width>
CLK_INLINE void promote_tile(const void* tile, const GramProblem& p, int64_t i0, int64_t j0, double alpha,
                             double beta) {
    const S* values = static_cast<const S*>(tile);
    if (p.cov_dtype == DType::f64) {
        promote_to<S, double, rows, width>(values, p, i0, j0, alpha, beta);
    } else {
        promote_to<S, float, rows, width>(values, p, i0, j0, alpha, beta);
    }
}

// The functions of one engine, compiled for one target: `rows` x `vectors` registers of `vector_bytes` hold a tile.
#define CLK_ENGINE(name, target, In, S, vector_bytes, mr, vectors)                                               \
    struct name {                                                                                                \
        static constexpr int64_t width = vector_bytes / sizeof(S) * vectors;                                     \
        target static void pack(const GramProblem& p, int64_t first, int64_t count, void* panels, int64_t panel, \
                                bool weighted, double* partial) {                                                \
            S* out = static_cast<S*>(panels);                                                                    \
            pack_rows<In, S, width>(p, first, count, out, panel, weighted);                                      \
            if (partial) sum_columns<S, width>(p, out, panel, count, partial);                                   \
        }                                                                                                        \
        target static void multiply(const void* a, const void* b, int64_t steps, void* tile) {                   \
            outer_products<S, vector_bytes, mr, vectors>(a, b, steps, tile);                                     \
        }                                                                                                        \
        target static void promote(const void* tile, const GramProblem& p, int64_t i0, int64_t j0, double alpha, \
                                   double beta) {                                                                \
            promote_tile<S, mr, width>(tile, p, i0, j0, alpha, beta);                                            \
        }                                                                                                        \
        static constexpr Engine engine{width, mr, 1, sizeof(S), pack, multiply, promote};                        \
    };

CLK_ENGINE(base_f32, , float, float, 16, 4, 2)
CLK_ENGINE(base_f64, , double, double, 16, 4, 2)
CLK_ENGINE(base_f16, , Half, float, 16, 4, 2)
CLK_ENGINE(base_bf16, , BFloat16, float, 16, 4, 2)
#if CLK_X86
CLK_ENGINE(avx2_f32, CLK_TARGET_AVX2, float, float, 32, 4, 3)
CLK_ENGINE(avx2_f64, CLK_TARGET_AVX2, double, double, 32, 4, 3)
CLK_ENGINE(avx2_f16, CLK_TARGET_AVX2, Half, float, 32, 4, 3)
CLK_ENGINE(avx2_bf16, CLK_TARGET_AVX2, BFloat16, float, 32, 4, 3)
CLK_ENGINE(avx512_f32, CLK_TARGET_AVX512, float, float, 64, 8, 2)
CLK_ENGINE(avx512_f64, CLK_TARGET_AVX512, double, double, 64, 8, 2)
CLK_ENGINE(avx512_f16, CLK_TARGET_AVX512, Half, float, 64, 8, 2)
CLK_ENGINE(avx512_bf16, CLK_TARGET_AVX512, BFloat16, float, 64, 8, 2)

namespace dot_bf16 {
constexpr int64_t width = 32;
constexpr int rows = 8;

CLK_TARGET_BF16 void pack(const GramProblem& p, int64_t first, int64_t count, void* panels, int64_t panel, bool,
                          double* partial) {
    uint32_t* out = static_cast<uint32_t*>(panels);
    pack_pairs<width>(p, first, count, out, panel);
    if (partial) sum_columns<uint32_t, width>(p, out, panel, (count + 1) / 2, partial);
}

CLK_TARGET_BF16 void multiply(const void* left, const void* right, int64_t steps, void* tile) {
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    float* out = static_cast<float*>(tile);
    std::fill(out, out + rows * width, 0.0f);
    for (int64_t start = 0; start < steps; start += kChain) {
        __m512 sum[rows][2];
        for (int m = 0; m < rows; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
        for (int64_t k = start; k < std::min(start + kChain, steps); ++k, a += width, b += width) {
            const __m512bh column0 = (__m512bh)_mm512_load_si512(b);
            const __m512bh column1 = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 8
            for (int m = 0; m < rows; ++m) {
                const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[m]));
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], value, column0);
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], value, column1);
            }
        }
        for (int m = 0; m < rows; ++m) {
            float* row = out + m * width;
            _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), sum[m][0]));
            _mm512_store_ps(row + 16, _mm512_add_ps(_mm512_load_ps(row + 16), sum[m][1]));
        }
    }
}

CLK_TARGET_BF16 void promote(const void* tile, const GramProblem& p, int64_t i0, int64_t j0, double alpha,
                             double beta) {
    promote_tile<float, rows, width>(tile, p, i0, j0, alpha, beta);
}

constexpr Engine engine{width, rows, 2, sizeof(uint32_t), pack, multiply, promote};
}  // namespace dot_bf16
#endif

const Engine& engine_for(const GramProblem& p) {
    static constexpr const Engine* kBase[] = {&base_f32::engine, &base_f64::engine, &base_f16::engine,
                                              &base_bf16::engine};
    const int dtype = static_cast<int>(p.x_dtype);
#if CLK_X86
    static constexpr const Engine* kAvx2[] = {&avx2_f32::engine, &avx2_f64::engine, &avx2_f16::engine,
                                              &avx2_bf16::engine};
    static constexpr const Engine* kAvx512[] = {&avx512_f32::engine, &avx512_f64::engine, &avx512_f16::engine,
                                                &avx512_bf16::engine};
    static const bool has_dot = __builtin_cpu_supports("avx512bf16");
    const Isa level = isa();
    // Weighted rows would have to be rounded to bfloat16 first.
    if (level == Isa::avx512 && p.x_dtype == DType::bf16 && has_dot && !p.weight) return dot_bf16::engine;
    if (level == Isa::avx512) return *kAvx512[dtype];
    if (level == Isa::avx2) return *kAvx2[dtype];
#endif
    return *kBase[dtype];
}

struct Aligned {
    explicit Aligned(int64_t bytes)
        : data(static_cast<char*>(
              ::operator new(static_cast<std::size_t>(std::max<int64_t>(bytes, 64)), std::align_val_t{64}))) {}
    ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    char* data;
};

template <typename C>
void mirror_block(const GramProblem& p, int64_t i0, int64_t j0, int64_t size) {
    C* c = static_cast<C*>(p.cov);
    for (int64_t j = j0; j < std::min(j0 + size, p.dim); ++j) {
        for (int64_t i = i0; i < std::min(i0 + size, j); ++i) c[j * p.cov_stride + i] = c[i * p.cov_stride + j];
    }
}

struct Pair {
    int64_t i, j;
};

// Pair number `t` of panels on or above the diagonal, column by column: (0,0) (0,1) (1,1) (0,2) ...
Pair pair_of(int64_t t) {
    int64_t j = 0;
    while ((j + 1) * (j + 2) / 2 <= t) ++j;
    return {t - j * (j + 1) / 2, j};
}

// Threads that are worth waking: one for every 4 million products.
int useful(int64_t products, int threads) { return static_cast<int>(std::min<int64_t>(threads, 1 + (products >> 22))); }

void update_gram(const GramProblem& p, double alpha, double beta, int most) {
    const Engine& e = engine_for(p);
    const int threads = useful(p.outer * p.inner * p.dim * p.dim, most);
    const int64_t n = p.outer * p.inner, panels = (p.dim + e.width - 1) / e.width, pairs = panels * (panels + 1) / 2;
    const int64_t chunk = std::min(kChunk, (n + kBlock - 1) / kBlock * kBlock);
    const int64_t panel = chunk / e.per_element * e.width;  // packed elements of one panel
    const Aligned plain(panels * panel * e.bytes);
    const Aligned scaled(p.weight ? panels * panel * e.bytes : 0);
    const Aligned partial(p.sums ? kChunk / kBlock * p.dim * static_cast<int64_t>(sizeof(double)) : 0);
    double* const sums = p.sums ? reinterpret_cast<double*>(partial.data) : nullptr;
    const char* const left = p.weight ? scaled.data : plain.data;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        alignas(64) char tile[8 * 32 * sizeof(float)];  // every engine's rows * width fits, doubles being half as wide
        for (int64_t first = 0; first == 0 || first < n; first += kChunk) {
            const int64_t rows = std::min(kChunk, n - first), steps = (rows + e.per_element - 1) / e.per_element;
            const double keep = first == 0 ? beta : 1.0;
#pragma omp for schedule(static)
            for (int64_t k = 0; k < rows; k += kBlock) {
                const int64_t count = std::min(kBlock, rows - k), at = k / e.per_element * e.width * e.bytes;
                double* const part = sums ? sums + k / kBlock * p.dim : nullptr;
                e.pack(p, first + k, count, plain.data + at, panel, false, p.weight ? nullptr : part);
                if (p.weight) e.pack(p, first + k, count, scaled.data + at, panel, true, part);
            }
#pragma omp single nowait
            if (sums) {  // in the order of the rows, whatever thread packed them
                for (int64_t k = 0; k < rows; k += kBlock) {
                    for (int64_t c = 0; c < p.dim; ++c) p.sums[c] += sums[k / kBlock * p.dim + c];
                }
            }
#pragma omp for schedule(static, 1)
            for (int64_t t = 0; t < pairs; ++t) {
                const Pair at = pair_of(t);
                const char* const right = plain.data + at.j * panel * e.bytes;
                for (int64_t m = 0; m < e.width && at.i * e.width + m < p.dim; m += e.rows) {
                    e.multiply(left + (at.i * panel + m) * e.bytes, right, steps, tile);
                    e.promote(tile, p, at.i * e.width + m, at.j * e.width, alpha, keep);
                }
            }
        }
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < pairs; ++t) {
            const Pair at = pair_of(t);
            if (p.cov_dtype == DType::f64) {
                mirror_block<double>(p, at.i * e.width, at.j * e.width, e.width);
            } else {
                mirror_block<float>(p, at.i * e.width, at.j * e.width, e.width);
            }
        }
    }
}

}  // namespace

void update_grams(const std::vector<GramProblem>& problems, double alpha, double beta, int threads) {
    const int64_t count = static_cast<int64_t>(problems.size());
    if (threads <= 1 || count < threads) {
        for (const GramProblem& problem : problems) update_gram(problem, alpha, beta, threads);
        return;
    }
    int64_t products = 0;
    for (const GramProblem& p : problems) products += p.outer * p.inner * p.dim * p.dim;
    std::exception_ptr failure;
#pragma omp parallel for num_threads(useful(products, threads)) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
        try {
            update_gram(problems[static_cast<std::size_t>(i)], alpha, beta, 1);
        } catch (...) {  // no exception may leave the region
#pragma omp critical(clk_gram_failure)
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace clk
