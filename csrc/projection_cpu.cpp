// Projected Adam step on the CPU: blocks of rows stay in cache from the gradient to the new weight.
//
// A block's update u goes through two thin products. Both are C = A B with the rows of B contiguous ("outer" form,
// which broadcasts A), or C = A B^T with the rows of A and B contiguous ("inner" form, which needs a sum across the
// vector). A basis is stored one way only; from kPackRows rows on, the other way is copied out once and both products
// take the outer form. Fewer rows, prompts above all, would spend more on the copy than on the products.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/simd.h"
#include "projection.h"
#include "projection_math.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clk {
namespace {

constexpr int64_t kPackRows = 24;          // measured: the copy costs about what 20 rows save
constexpr int64_t kBlockElements = 16384;  // a block of u and its product in 128 KB of float: half of a small L2

template <typename T, int Bytes>
struct Vec {
    typedef T type __attribute__((vector_size(Bytes)));
    static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
};

// Vectors go by reference: by value their calling convention would depend on the target.
template <typename V, typename T>
CLK_INLINE void load(V& v, const T* p) {
    std::memcpy(&v, p, sizeof(V));
}

template <typename V, typename T>
CLK_INLINE void store(T* p, const V& v) {
    std::memcpy(p, &v, sizeof(V));
}

// C[MR, NV vectors] = A[MR, k] B[k, NV vectors]; A by any strides, B and C by rows.
template <typename T, int Bytes, int MR, int NV>
CLK_INLINE void outer_tile(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t k) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    V acc[MR][NV] = {};
    for (int64_t q = 0; q < k; ++q) {
        V row[NV];
        for (int j = 0; j < NV; ++j) load(row[j], b + q * bs + j * L);
        for (int i = 0; i < MR; ++i) {
            const T x = a[i * as + q * ak];
            for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < MR; ++i) {
        for (int j = 0; j < NV; ++j) store(c + i * cs + j * L, acc[i][j]);
    }
}

// One panel of NV vectors of B for all rows: it stays in L1 from tile to tile.
template <typename T, int Bytes, int MR, int NV>
CLK_INLINE void outer_panel(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                            int64_t k) {
    int64_t i = 0;
    for (; i + MR <= m; i += MR) outer_tile<T, Bytes, MR, NV>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
    if (MR > 4 && i + 4 <= m) {
        outer_tile<T, Bytes, 4, NV>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        i += 4;
    }
    switch (m - i) {
        case 3:
            return outer_tile<T, Bytes, 3, NV>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        case 2:
            return outer_tile<T, Bytes, 2, NV>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        case 1:
            return outer_tile<T, Bytes, 1, NV>(a + i * as, as, ak, b, bs, c + i * cs, cs, k);
        default:
            return;
    }
}

// C[m, n] = A[m, k] B[k, n]. Tiles hold 16 accumulators where they can: two multiply-adds a cycle, four deep, need 8.
template <typename T, int Bytes>
CLK_INLINE void outer(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                      int64_t n, int64_t k) {
    constexpr int L = Vec<T, Bytes>::lanes;
    int64_t j = 0;
    for (; j + 4 * L <= n; j += 4 * L) outer_panel<T, Bytes, 4, 4>(a, as, ak, b + j, bs, c + j, cs, m, k);
    for (; j + 2 * L <= n; j += 2 * L) outer_panel<T, Bytes, 8, 2>(a, as, ak, b + j, bs, c + j, cs, m, k);
    for (; j + L <= n; j += L) outer_panel<T, Bytes, 8, 1>(a, as, ak, b + j, bs, c + j, cs, m, k);
    if (j == n) return;
    if (n >= L) {  // the last vector overlaps the one before: the same values are written twice
        outer_panel<T, Bytes, 8, 1>(a, as, ak, b + n - L, bs, c + n - L, cs, m, k);
        return;
    }
    if constexpr (Bytes > 16) {  // ranks below a vector are common: measured, 7 to 20 of 128 at 95 % of the energy
        outer<T, Bytes / 2>(a, as, ak, b, bs, c, cs, m, n, k);
    } else {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t jj = 0; jj < n; ++jj) {
                T sum = 0;
                for (int64_t q = 0; q < k; ++q) sum += a[i * as + q * ak] * b[q * bs + jj];
                c[i * cs + jj] = sum;
            }
        }
    }
}

// The sum over the lanes of one vector, halving it: the same order every time.
template <typename T, int Bytes>
CLK_INLINE T lane_sum(const typename Vec<T, Bytes>::type& v) {
    T x[Vec<T, Bytes>::lanes];
    std::memcpy(x, &v, sizeof(v));
    for (int half = Vec<T, Bytes>::lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
}

// Groups of `Width` lanes of a and b in turn, lower halves plus upper halves.
template <typename T, int Bytes, int Width>
CLK_INLINE void fold(typename Vec<T, Bytes>::type& out, const typename Vec<T, Bytes>::type& a,
                     const typename Vec<T, Bytes>::type& b) {
    using Index = typename Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    Index low, high;
    for (int i = 0; i < L; ++i) {
        const int group = i / Width, from = (group % 2) * L + (group / 2) * Width + i % Width;
        low[i] = from;
        high[i] = from + L / 2;
    }
    out = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The lane sums of four vectors: 13 operations in place of 32.
template <typename T, int Bytes>
CLK_INLINE void lane_sums(const typename Vec<T, Bytes>::type* v, T* out) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    if constexpr (L < 4) {
        for (int j = 0; j < 4; ++j) out[j] = lane_sum<T, Bytes>(v[j]);
    } else {
        V a, b, c;
        fold<T, Bytes, 1>(a, v[0], v[1]);
        fold<T, Bytes, 1>(b, v[2], v[3]);
        fold<T, Bytes, 2>(c, a, b);
        T x[L];
        std::memcpy(x, &c, sizeof(c));
        for (int j = 0; j < 4; ++j) {
            T sum = x[j];
            for (int i = 4; i < L; i += 4) sum += x[i + j];
            out[j] = sum;
        }
    }
}

template <typename T, int Bytes, int MR, int NR>
CLK_INLINE void inner_tile(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t k) {
    using V = typename Vec<T, Bytes>::type;
    constexpr int L = Vec<T, Bytes>::lanes;
    V acc[MR][NR] = {};
    int64_t q = 0;
    for (; q + L <= k; q += L) {
        V column[NR];
        for (int j = 0; j < NR; ++j) load(column[j], b + j * bs + q);
        for (int i = 0; i < MR; ++i) {
            V x;
            load(x, a + i * as + q);
            for (int j = 0; j < NR; ++j) acc[i][j] += x * column[j];
        }
    }
    for (int i = 0; i < MR; ++i) {
        T sums[NR];
        if constexpr (NR == 4) {
            lane_sums<T, Bytes>(acc[i], sums);
        } else {
            for (int j = 0; j < NR; ++j) sums[j] = lane_sum<T, Bytes>(acc[i][j]);
        }
        for (int j = 0; j < NR; ++j) {
            for (int64_t r = q; r < k; ++r) sums[j] += a[i * as + r] * b[j * bs + r];
            c[i * cs + j] = sums[j];
        }
    }
}

template <typename T, int Bytes, int MR>
CLK_INLINE void inner_rows(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t n, int64_t k) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) inner_tile<T, Bytes, MR, 4>(a, as, b + j * bs, bs, c + j, cs, k);
    for (; j < n; ++j) inner_tile<T, Bytes, MR, 1>(a, as, b + j * bs, bs, c + j, cs, k);
}

// C[m, n] = A[m, k] B[n, k]^T.
template <typename T, int Bytes>
CLK_INLINE void inner(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m, int64_t n,
                      int64_t k) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) inner_rows<T, Bytes, 4>(a + i * as, as, b, bs, c + i * cs, cs, n, k);
    for (; i < m; ++i) inner_rows<T, Bytes, 1>(a + i * as, as, b, bs, c + i * cs, cs, n, k);
}

// A parameter with what the step worked out for it.
template <typename T>
struct Job {
    const ProjectedParameter* parameter;
    AdamNumbers<T> numbers;
    const T* by_rows = nullptr;     // right basis with contiguous rows [columns, rank], given or packed; or null
    const T* by_columns = nullptr;  // right basis with contiguous columns, stored as [rank, columns]; or null
    int64_t rows_stride = 0, columns_stride = 0;
    int64_t width = 0;  // columns of by_rows: the rank, or a packed basis' rank filled up with zeros to whole vectors
};

struct Block {
    int64_t job, batch, row, rows;
};

template <typename T>
struct Scratch {
    T *u, *product, *inner;
};

template <typename T, bool kAmsgrad>
CLK_INLINE void adam_block(const Job<T>& job, int64_t begin, int64_t count, T* u) {
    const ProjectedParameter& p = *job.parameter;
    const AdamNumbers<T> n = job.numbers;
    const T* __restrict weight = static_cast<const T*>(p.weight) + begin;
    const T* __restrict grad = static_cast<const T*>(p.grad) + begin;
    T* __restrict m = static_cast<T*>(p.exp_avg) + begin;
    T* __restrict v = static_cast<T*>(p.exp_avg_sq) + begin;
    T* __restrict largest = kAmsgrad ? static_cast<T*>(p.largest) + begin : nullptr;
    T* __restrict out = u;
    for (int64_t i = 0; i < count; ++i) {
        out[i] = adam_update<T, kAmsgrad>(weight[i], grad[i], m[i], v[i], kAmsgrad ? largest + i : nullptr, n);
    }
}

// u <- identity u - span product.
template <typename T>
CLK_INLINE void combine(T* u, const T* product, double identity, double span, int64_t count) {
    const T a = static_cast<T>(identity), b = static_cast<T>(span);
    for (int64_t i = 0; i < count; ++i) u[i] = a * u[i] - b * product[i];
}

template <typename T, int Bytes>
CLK_INLINE void left_side(const ProjectedParameter& p, const Scratch<T>& s) {
    const ProjectionSide& side = p.left;
    const T* matrix = static_cast<const T*>(side.matrix);
    const int64_t rows = p.rows, columns = p.columns;
    if (side.form == SideForm::dense) {
        outer<T, Bytes>(matrix, side.row_stride, side.column_stride, s.u, columns, s.product, columns, rows, columns,
                        rows);
        std::memcpy(s.u, s.product, sizeof(T) * rows * columns);
        return;
    }
    outer<T, Bytes>(matrix, side.column_stride, side.row_stride, s.u, columns, s.inner, columns, side.rank, columns,
                    rows);
    outer<T, Bytes>(matrix, side.row_stride, side.column_stride, s.inner, columns, s.product, columns, rows, columns,
                    side.rank);
    combine(s.u, s.product, side.identity, side.span, rows * columns);
}

// s.product = u P for a dense P, (u V) V^T for a basis.
template <typename T, int Bytes>
CLK_INLINE void right_side(const Job<T>& job, int64_t rows, const Scratch<T>& s) {
    const ProjectedParameter& p = *job.parameter;
    const int64_t columns = p.columns, rank = p.right.rank, width = job.width;
    if (p.right.form == SideForm::dense) {
        outer<T, Bytes>(s.u, columns, 1, job.by_rows, job.rows_stride, s.product, columns, rows, columns, columns);
        return;
    }
    if (job.by_rows) {
        outer<T, Bytes>(s.u, columns, 1, job.by_rows, job.rows_stride, s.inner, width, rows, width, columns);
    } else {
        inner<T, Bytes>(s.u, columns, job.by_columns, job.columns_stride, s.inner, width, rows, rank, columns);
    }
    if (job.by_columns) {
        outer<T, Bytes>(s.inner, width, 1, job.by_columns, job.columns_stride, s.product, columns, rows, columns, rank);
    } else {
        inner<T, Bytes>(s.inner, width, job.by_rows, job.rows_stride, s.product, columns, rows, columns, rank);
    }
}

// p <- keep p + (identity u - span product), with what the right side makes of the update.
template <typename T>
CLK_INLINE void apply_block(const ProjectedParameter& p, T keep, int64_t begin, int64_t count, const Scratch<T>& s) {
    T* __restrict weight = static_cast<T*>(p.weight) + begin;
    const T* __restrict u = s.u;
    const T* __restrict product = s.product;
    if (p.right.form == SideForm::basis) {
        const T a = static_cast<T>(p.right.identity), b = static_cast<T>(p.right.span);
        for (int64_t i = 0; i < count; ++i) weight[i] = add_update(weight[i], a * u[i] - b * product[i], keep);
    } else {
        const T* __restrict change = p.right.form == SideForm::dense ? product : u;
        for (int64_t i = 0; i < count; ++i) weight[i] = add_update(weight[i], change[i], keep);
    }
}

template <typename T, int Bytes>
CLK_INLINE void block_body(const Job<T>& job, const Block& block, const Scratch<T>& s) {
    const ProjectedParameter& p = *job.parameter;
    const int64_t begin = (block.batch * p.rows + block.row) * p.columns, count = block.rows * p.columns;
    if (p.largest) {
        adam_block<T, true>(job, begin, count, s.u);
    } else {
        adam_block<T, false>(job, begin, count, s.u);
    }
    if (p.left.form != SideForm::none) left_side<T, Bytes>(p, s);
    if (p.right.form != SideForm::none) right_side<T, Bytes>(job, block.rows, s);
    apply_block(p, job.numbers.keep, begin, count, s);
}

template <typename T>
void block_base(const Job<T>& job, const Block& block, const Scratch<T>& s) {
    block_body<T, 16>(job, block, s);
}
template <typename T>
CLK_TARGET_AVX2 void block_avx2(const Job<T>& job, const Block& block, const Scratch<T>& s) {
    block_body<T, 32>(job, block, s);
}
template <typename T>
CLK_TARGET_AVX512 void block_avx512(const Job<T>& job, const Block& block, const Scratch<T>& s) {
    block_body<T, 64>(job, block, s);
}

template <typename T>
using BlockKernel = void (*)(const Job<T>&, const Block&, const Scratch<T>&);

template <typename T>
BlockKernel<T> block_kernel() {
    switch (isa()) {
        case Isa::avx512:
            return block_avx512<T>;
        case Isa::avx2:
            return block_avx2<T>;
        default:
            return block_base<T>;
    }
}

// out[j, i] = in[i, j], in pieces that stay in L1.
template <typename T>
void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
    constexpr int64_t kPiece = 16;
    for (int64_t i0 = 0; i0 < rows; i0 += kPiece) {
        for (int64_t j0 = 0; j0 < columns; j0 += kPiece) {
            for (int64_t j = j0; j < std::min(columns, j0 + kPiece); ++j) {
                for (int64_t i = i0; i < std::min(rows, i0 + kPiece); ++i) {
                    out[j * out_stride + i] = in[i * in_stride + j];
                }
            }
        }
    }
}

// A layout of a job's right side that is to be made: with contiguous columns, or with contiguous rows of job.width.
template <typename T>
struct Packing {
    int64_t job;
    bool columns;
    int64_t offset;
};

template <typename T>
struct Plan {
    std::vector<Job<T>> jobs;
    std::vector<Block> blocks;
    std::vector<Packing<T>> packings;
    std::vector<T> packed;     // zeros first: what fills up a row stays zero
    int64_t wanted = 0;        // its size
    int64_t u = 0, inner = 0;  // the largest block's elements
};

template <typename T>
void plan_right(Plan<T>& plan, int64_t index) {
    Job<T>& job = plan.jobs[index];
    const ProjectedParameter& p = *job.parameter;
    const ProjectionSide& side = p.right;
    if (side.form == SideForm::none) return;
    const T* matrix = static_cast<const T*>(side.matrix);
    const bool rows_contiguous = side.column_stride == 1;
    (rows_contiguous ? job.by_rows : job.by_columns) = matrix;
    (rows_contiguous ? job.rows_stride : job.columns_stride) = rows_contiguous ? side.row_stride : side.column_stride;
    job.width = side.rank;
    const bool many = side.form == SideForm::basis && p.batch * p.rows >= kPackRows;
    constexpr int64_t kVector = 64 / sizeof(T);
    if (many) job.width = (side.rank + kVector - 1) / kVector * kVector;
    if (many && rows_contiguous) plan.packings.push_back({index, true, plan.wanted});
    if (many && rows_contiguous) plan.wanted += p.columns * side.rank;
    if (job.width != side.rank || (!rows_contiguous && (many || side.form == SideForm::dense))) {
        plan.packings.push_back({index, false, plan.wanted});
        plan.wanted += p.columns * job.width;
    }
}

template <typename T>
Plan<T> make_plan(const std::vector<ProjectedParameter>& parameters, const AdamSettings& a) {
    Plan<T> plan;
    plan.jobs.reserve(parameters.size());
    for (const ProjectedParameter& p : parameters) {
        const double step = static_cast<double>(p.step ? *p.step : p.steps) + 1.0;
        plan.jobs.push_back({&p, adam_numbers<T>(step, a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.decoupled,
                                                 a.project_decay, a.grad_factor)});
        if (p.batch * p.rows * p.columns == 0) continue;
        const int64_t job = static_cast<int64_t>(plan.jobs.size()) - 1;
        plan_right(plan, job);
        const bool whole = p.left.form != SideForm::none;
        const int64_t fitting = std::clamp<int64_t>(kBlockElements / p.columns / 4 * 4, 8, 64);
        const int64_t height = whole ? p.rows : std::min(p.rows, fitting);
        for (int64_t b = 0; b < p.batch; ++b) {
            for (int64_t row = 0; row < p.rows; row += height) {
                plan.blocks.push_back({job, b, row, std::min(height, p.rows - row)});
            }
        }
        plan.u = std::max(plan.u, height * p.columns);
        plan.inner = std::max({plan.inner, height * plan.jobs.back().width, p.left.rank * p.columns});
    }
    plan.packed.resize(plan.wanted);
    return plan;
}

// Fills one layout; the job refers to it when all are filled, because another thread may be reading the job now.
template <typename T>
void pack(Plan<T>& plan, const Packing<T>& packing) {
    const Job<T>& job = plan.jobs[packing.job];
    const ProjectionSide& side = job.parameter->right;
    const int64_t columns = job.parameter->columns;
    const T* matrix = static_cast<const T*>(side.matrix);
    T* target = plan.packed.data() + packing.offset;
    if (packing.columns) {
        transpose(matrix, side.row_stride, target, columns, columns, side.rank);
    } else if (side.column_stride != 1) {
        transpose(matrix, side.column_stride, target, job.width, side.rank, columns);
    } else {
        for (int64_t i = 0; i < columns; ++i) {
            std::copy_n(matrix + i * side.row_stride, side.rank, target + i * job.width);
        }
    }
}

template <typename T>
void refer(Plan<T>& plan) {
    for (const Packing<T>& packing : plan.packings) {
        Job<T>& job = plan.jobs[packing.job];
        const T* target = plan.packed.data() + packing.offset;
        (packing.columns ? job.by_columns : job.by_rows) = target;
        (packing.columns ? job.columns_stride : job.rows_stride) = packing.columns ? job.parameter->columns : job.width;
    }
}

template <typename T>
void run(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings, int threads) {
    Plan<T> plan = make_plan<T>(parameters, settings);
    const int64_t blocks = static_cast<int64_t>(plan.blocks.size()), packings = plan.packings.size();
    threads = static_cast<int>(std::clamp<int64_t>(std::max(blocks, packings), 1, std::max(threads, 1)));
    const int64_t each = 2 * plan.u + plan.inner + 64;  // the gap keeps threads off each other's cache lines
    std::vector<T> scratch(each * threads);
    const BlockKernel<T> kernel = block_kernel<T>();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        T* const own = scratch.data() + each * omp_get_thread_num();
#else
        T* const own = scratch.data();
#endif
        const Scratch<T> s{own, own + plan.u, own + 2 * plan.u};
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < packings; ++i) pack(plan, plan.packings[i]);
#pragma omp single
        refer(plan);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; ++i) kernel(plan.jobs[plan.blocks[i].job], plan.blocks[i], s);
    }
    for (const ProjectedParameter& p : parameters) {
        if (p.step) *p.step += 1.0f;
    }
}

}  // namespace

void projected_adam_cpu(const std::vector<ProjectedParameter>& parameters, DType dtype, const AdamSettings& settings,
                        int threads) {
    switch (dtype) {
        case DType::f32:
            return run<float>(parameters, settings, threads);
        case DType::f64:
            return run<double>(parameters, settings, threads);
        default:
            throw std::invalid_argument("projected_adam_cpu: float32 and float64 only");
    }
}

}  // namespace clk
