// Projected Adam step on the CPU: blocks of rows stay in cache from the gradient to the new weight.
//
// A block's update u goes through two thin products of projection_products.h. A basis is stored one way only, and few
// rows take it as it is: in strips of columns, so that it is read from memory once for both products. From kPackRows
// rows on it is copied into contiguous rows and contiguous columns, both products take the faster outer form, and a
// block has many rows, so that the copies are read seldom. Own products because the library's are slower at these
// shapes: on one Zen 5 core 110 to 120 GFLOP/s of a sgemm against 150 to 220 here (benchmarks/results/cpu).
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "common/kept_memory.h"
#include "projection.h"
#include "projection_math.h"
#include "projection_products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clk {
namespace {

constexpr int64_t kPackRows = 24;             // measured: the copy costs about what 20 rows save
constexpr int64_t kBlockElements = 16384;     // a block of u and its product in 128 KB of float
constexpr int64_t kDenseElements = 1 << 20;   // of u where P is dense: the more rows, the less often P is read
constexpr int64_t kPanel = 64, kDepth = 256;  // columns and rows of a dense P at a time, copied beside each other
constexpr int64_t kStripElements = 65536;     // of a basis at a time, for few rows: 256 KB of a 1 MB cache
constexpr int64_t kWaveBytes = 16 << 20;      // of copied bases at a time

template <typename T, typename W>
CLK_INLINE T get(const W* p) {
    return static_cast<T>(to_float(*p));
}
template <typename T>
CLK_INLINE void put(T* p, T x) {
    *p = x;
}
CLK_INLINE void put(Half* p, float x) { *p = from_float<Half>(x); }
CLK_INLINE void put(BFloat16* p, float x) { *p = from_float<BFloat16>(x); }

template <typename T>
struct Scratch {
    T *u, *product, *rest, *inner;
};

struct Block {
    int64_t job, batch, row, rows;
};

template <typename T>
using ElementKernel = void (*)(const ProjectedParameter&, const AdamNumbers<T>&, int64_t begin, int64_t count, T* u);

// The products and row operations of one instruction set, each compiled once: inlined at every call they took minutes.
template <typename T>
struct Operations {
    void (*outer)(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m, int64_t n,
                  int64_t k);
    void (*outer_add)(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                      int64_t n, int64_t k);
    void (*inner)(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m, int64_t n, int64_t k);
    void (*inner_add)(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m, int64_t n,
                      int64_t k);
    void (*combine)(T* u, const T* product, T identity, T span, int64_t count);  // u <- identity u - span product
    void (*subtract)(T* out, const T* a, const T* b, int64_t count);             // out <- a - b

    // `outer` in pieces of `depth` of the inner dimension, so that a piece of B is read once for all rows of A.
    void outer_pieces(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,
                      int64_t n, int64_t k, int64_t depth) const {
        outer(a, as, ak, b, bs, c, cs, m, n, std::min(k, depth));
        for (int64_t q = depth; q < k; q += depth) {
            outer_add(a + q * ak, as, ak, b + q * bs, bs, c, cs, m, n, std::min(k - q, depth));
        }
    }
};

template <typename T>
CLK_INLINE void combine_body(T* __restrict u, const T* __restrict product, T identity, T span, int64_t count) {
    for (int64_t i = 0; i < count; ++i) u[i] = identity * u[i] - span * product[i];
}
template <typename T>
CLK_INLINE void subtract_body(T* __restrict out, const T* a, const T* b, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] - b[i];
}

#define CLK_OPERATIONS(NAME, TARGET, BYTES)                                                                        \
    template <typename T>                                                                                          \
    struct NAME {                                                                                                  \
        TARGET static void outer(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs,     \
                                 int64_t m, int64_t n, int64_t k) {                                                \
            clk::outer<T, BYTES, false>(a, as, ak, b, bs, c, cs, m, n, k);                                         \
        }                                                                                                          \
        TARGET static void outer_add(const T* a, int64_t as, int64_t ak, const T* b, int64_t bs, T* c, int64_t cs, \
                                     int64_t m, int64_t n, int64_t k) {                                            \
            clk::outer<T, BYTES, true>(a, as, ak, b, bs, c, cs, m, n, k);                                          \
        }                                                                                                          \
        TARGET static void inner(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,      \
                                 int64_t n, int64_t k) {                                                           \
            clk::inner<T, BYTES, false>(a, as, b, bs, c, cs, m, n, k);                                             \
        }                                                                                                          \
        TARGET static void inner_add(const T* a, int64_t as, const T* b, int64_t bs, T* c, int64_t cs, int64_t m,  \
                                     int64_t n, int64_t k) {                                                       \
            clk::inner<T, BYTES, true>(a, as, b, bs, c, cs, m, n, k);                                              \
        }                                                                                                          \
        TARGET static void combine(T* u, const T* product, T identity, T span, int64_t count) {                    \
            combine_body(u, product, identity, span, count);                                                       \
        }                                                                                                          \
        TARGET static void subtract(T* out, const T* a, const T* b, int64_t count) {                               \
            subtract_body(out, a, b, count);                                                                       \
        }                                                                                                          \
        static constexpr Operations<T> table{outer, outer_add, inner, inner_add, combine, subtract};               \
    };
CLK_OPERATIONS(BaseOperations, , 16)
CLK_OPERATIONS(Avx2Operations, CLK_TARGET_AVX2, 32)
CLK_OPERATIONS(Avx512Operations, CLK_TARGET_AVX512, 64)
#undef CLK_OPERATIONS

template <typename T>
const Operations<T>& operations() {
    switch (isa()) {
        case Isa::avx512:
            return Avx512Operations<T>::table;
        case Isa::avx2:
            return Avx2Operations<T>::table;
        default:
            return BaseOperations<T>::table;
    }
}

// A parameter with what the step worked out for it. Matrices are of the compute type here: given so, or packed.
template <typename T>
struct Job {
    const ProjectedParameter* parameter;
    AdamNumbers<T> numbers;
    ElementKernel<T> adam, apply;
    const T* left = nullptr;
    int64_t left_row = 0, left_column = 0;  // its strides
    const T* by_rows = nullptr;     // right basis with contiguous rows [columns, rank], given or packed; or null
    const T* by_columns = nullptr;  // right basis with contiguous columns, stored as [rank, columns]; or null
    int64_t rows_stride = 0, columns_stride = 0;
    int64_t width = 0;  // columns of by_rows: the rank, or a packed basis' rank filled up with zeros to whole vectors
    bool many = false;
};

// u <- the complete update; moments are written.
template <typename T, typename W, typename S, bool kAmsgrad>
CLK_INLINE void adam_body(const ProjectedParameter& p, const AdamNumbers<T>& numbers, int64_t begin, int64_t count,
                          T* u) {
    const AdamNumbers<T> n = numbers;
    const W* __restrict weight = static_cast<const W*>(p.weight) + begin;
    const W* __restrict grad = static_cast<const W*>(p.grad) + begin;
    S* __restrict first = static_cast<S*>(p.exp_avg) + begin;
    S* __restrict second = static_cast<S*>(p.exp_avg_sq) + begin;
    S* __restrict top = kAmsgrad ? static_cast<S*>(p.largest) + begin : nullptr;
    T* __restrict out = u;
    for (int64_t i = 0; i < count; ++i) {
        T m = get<T>(first + i), v = get<T>(second + i), largest = kAmsgrad ? get<T>(top + i) : T(0);
        out[i] = adam_update<T, kAmsgrad>(get<T>(weight + i), get<T>(grad + i), m, v, &largest, n);
        put(first + i, m);
        put(second + i, v);
        if constexpr (kAmsgrad) put(top + i, largest);
    }
}

// p <- keep p + u.
template <typename T, typename W>
CLK_INLINE void apply_body(const ProjectedParameter& p, const AdamNumbers<T>& numbers, int64_t begin, int64_t count,
                           T* u) {
    const T keep = numbers.keep;
    W* __restrict weight = static_cast<W*>(p.weight) + begin;
    const T* __restrict change = u;
    for (int64_t i = 0; i < count; ++i) put(weight + i, add_update(get<T>(weight + i), change[i], keep));
}

// out = V V^T x, or out += V V^T x, through `inner`.
template <typename T>
void left_span(const Operations<T>& o, const Job<T>& job, const T* x, T* out, T* inner, bool add) {
    const ProjectedParameter& p = *job.parameter;
    const ProjectionSide& side = p.left;
    const int64_t rows = p.rows, columns = p.columns;
    o.outer_pieces(job.left, job.left_column, job.left_row, x, columns, inner, columns, side.rank, columns, rows,
                   kDepth);
    (add ? o.outer_add : o.outer)(job.left, job.left_row, job.left_column, inner, columns, out, columns, rows, columns,
                                  side.rank);
}

template <typename T>
void left_side(const Operations<T>& o, const Job<T>& job, const Scratch<T>& s) {
    const ProjectedParameter& p = *job.parameter;
    const ProjectionSide& side = p.left;
    const int64_t rows = p.rows, columns = p.columns, count = rows * columns;
    if (side.form == SideForm::dense) {
        o.outer_pieces(job.left, job.left_row, job.left_column, s.u, columns, s.product, columns, rows, columns, rows,
                       kDepth);
        std::memcpy(s.u, s.product, sizeof(T) * count);
        return;
    }
    left_span(o, job, s.u, s.product, s.inner, false);
    if (side.form == SideForm::twice) {
        o.subtract(s.rest, s.u, s.product, count);
        left_span(o, job, s.rest, s.product, s.inner, true);
    }
    o.combine(s.u, s.product, static_cast<T>(side.identity), static_cast<T>(side.span), count);
}

// Columns of a basis that few rows take at a time.
int64_t strip_of(int64_t size) { return std::clamp<int64_t>(kStripElements / size / 4 * 4, 16, 256); }

// out = x V V^T, or out += x V V^T, through `inner`.
template <typename T>
void right_span(const Operations<T>& o, const Job<T>& job, int64_t rows, const T* x, T* out, T* inner, bool add) {
    const int64_t columns = job.parameter->columns, rank = job.parameter->right.rank, width = job.width;
    if (job.many) {
        o.outer_pieces(x, columns, 1, job.by_rows, job.rows_stride, inner, width, rows, width, columns, kDepth);
        (add ? o.outer_add : o.outer)(inner, width, 1, job.by_columns, job.columns_stride, out, columns, rows, columns,
                                      rank);
    } else if (job.by_columns) {
        const int64_t strip = strip_of(columns);
        for (int64_t j = 0; j < std::max<int64_t>(rank, 1); j += strip) {  // a rank of 0 writes zeros
            const T* part = job.by_columns + j * job.columns_stride;
            const int64_t wide = std::min(strip, rank - j);
            o.inner(x, columns, part, job.columns_stride, inner, strip, rows, wide, columns);
            (add || j > 0 ? o.outer_add : o.outer)(inner, strip, 1, part, job.columns_stride, out, columns, rows,
                                                   columns, wide);
        }
    } else {
        o.outer(x, columns, 1, job.by_rows, job.rows_stride, inner, width, rows, width, columns);
        (add ? o.inner_add : o.inner)(inner, width, job.by_rows, job.rows_stride, out, columns, rows, columns, rank);
    }
}

// out = x P for a dense P and many rows. Panels of P are copied first: its rows lie pages apart, and read in place the
// product of 768 x 3072 by 3072 x 3072 ran at half the library's speed.
template <typename T>
void dense_many(const Operations<T>& o, const Job<T>& job, int64_t rows, const T* x, T* out, T* panel) {
    const int64_t columns = job.parameter->columns;
    for (int64_t q = 0; q < columns; q += kDepth) {
        const int64_t depth = std::min(kDepth, columns - q);
        for (int64_t j = 0; j < columns; j += kPanel) {
            const int64_t wide = std::min(kPanel, columns - j);
            for (int64_t i = 0; i < depth; ++i) {
                std::copy_n(job.by_rows + (q + i) * job.rows_stride + j, wide, panel + i * kPanel);
            }
            (q > 0 ? o.outer_add : o.outer)(x + q, columns, 1, panel, kPanel, out + j, columns, rows, wide, depth);
        }
    }
}

// u <- u P; s.u may change places with s.product.
template <typename T>
void right_side(const Operations<T>& o, const Job<T>& job, int64_t rows, Scratch<T>& s) {
    const ProjectionSide& side = job.parameter->right;
    const int64_t columns = job.parameter->columns, count = rows * columns;
    if (side.form == SideForm::dense) {
        if (rows >= kPackRows) {
            dense_many(o, job, rows, s.u, s.product, s.inner);
        } else {
            o.outer(s.u, columns, 1, job.by_rows, job.rows_stride, s.product, columns, rows, columns, columns);
        }
        std::swap(s.u, s.product);
        return;
    }
    right_span(o, job, rows, s.u, s.product, s.inner, false);
    if (side.form == SideForm::twice) {
        o.subtract(s.rest, s.u, s.product, count);
        right_span(o, job, rows, s.rest, s.product, s.inner, true);
    }
    o.combine(s.u, s.product, static_cast<T>(side.identity), static_cast<T>(side.span), count);
}

template <typename T>
void block_body(const Operations<T>& o, const Job<T>& job, const Block& block, const Scratch<T>& scratch) {
    const ProjectedParameter& p = *job.parameter;
    Scratch<T> s = scratch;
    const int64_t begin = (block.batch * p.rows + block.row) * p.columns, count = block.rows * p.columns;
    job.adam(p, job.numbers, begin, count, s.u);
    if (p.left.form != SideForm::none) left_side(o, job, s);
    if (p.right.form != SideForm::none) right_side(o, job, block.rows, s);
    job.apply(p, job.numbers, begin, count, s.u);
}

// The elementwise parts for the three instruction sets, and the choice among them.
template <typename T, typename W, typename S, bool kAmsgrad>
struct Elements {
    using P = ProjectedParameter;
    using N = AdamNumbers<T>;
    static void base(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        adam_body<T, W, S, kAmsgrad>(p, n, begin, count, u);
    }
    CLK_TARGET_AVX2 static void avx2(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        adam_body<T, W, S, kAmsgrad>(p, n, begin, count, u);
    }
    CLK_TARGET_AVX512 static void avx512(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        adam_body<T, W, S, kAmsgrad>(p, n, begin, count, u);
    }
};

template <typename T, typename W>
struct Applied {
    using P = ProjectedParameter;
    using N = AdamNumbers<T>;
    static void base(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        apply_body<T, W>(p, n, begin, count, u);
    }
    CLK_TARGET_AVX2 static void avx2(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        apply_body<T, W>(p, n, begin, count, u);
    }
    CLK_TARGET_AVX512 static void avx512(const P& p, const N& n, int64_t begin, int64_t count, T* u) {
        apply_body<T, W>(p, n, begin, count, u);
    }
};

template <typename Variants>
auto variant() {
    switch (isa()) {
        case Isa::avx512:
            return &Variants::avx512;
        case Isa::avx2:
            return &Variants::avx2;
        default:
            return &Variants::base;
    }
}

template <typename T, typename W, typename S>
void use_types(Job<T>& job) {
    job.adam = job.parameter->largest ? variant<Elements<T, W, S, true>>() : variant<Elements<T, W, S, false>>();
    job.apply = variant<Applied<T, W>>();
}

template <typename T>
void choose_elements(Job<T>& job) {
    const DType weight = job.parameter->weight_type, moment = job.parameter->moment_type;
    if constexpr (sizeof(T) == 8) {
        if (weight == DType::f64 && moment == DType::f64) return use_types<T, double, double>(job);
    } else {
        if (weight == DType::f32 && moment == DType::f32) return use_types<T, float, float>(job);
        if (weight == DType::f16 && moment == DType::f32) return use_types<T, Half, float>(job);
        if (weight == DType::f16 && moment == DType::f16) return use_types<T, Half, Half>(job);
        if (weight == DType::bf16 && moment == DType::f32) return use_types<T, BFloat16, float>(job);
        if (weight == DType::bf16 && moment == DType::bf16) return use_types<T, BFloat16, BFloat16>(job);
    }
    throw std::invalid_argument("projected_adam_cpu: no kernel for these types of weights and moments");
}

// A matrix of a job that is to be copied: contiguous rows of `width` values or contiguous columns, in the compute type.
template <typename T>
struct Packing {
    int64_t job;
    bool left, columns;
    int64_t width, offset;
};

struct Wave {
    int64_t packings, blocks;  // ends
};

template <typename T>
struct Plan {
    std::vector<Job<T>> jobs;
    std::vector<Block> blocks;
    std::vector<Packing<T>> packings;
    std::vector<Wave> waves;
    int64_t wanted = 0, packed = 0;                   // values copied in the present wave, in the largest
    int64_t u = 0, product = 0, rest = 0, inner = 0;  // the largest block's values
};

template <typename T>
constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;

template <typename T>
void request(Plan<T>& plan, int64_t job, bool left, bool columns, int64_t width) {
    const ProjectedParameter& p = *plan.jobs[job].parameter;
    const int64_t size = left ? p.rows : p.columns, rank = left ? p.left.rank : p.right.rank;
    plan.packings.push_back({job, left, columns, width, plan.wanted});
    plan.wanted += columns ? size * rank : size * width;
}

template <typename T>
void plan_sides(Plan<T>& plan, int64_t index) {
    Job<T>& job = plan.jobs[index];
    const ProjectedParameter& p = *job.parameter;
    const ProjectionSide &left = p.left, &right = p.right;
    if (left.form != SideForm::none) {
        job.left = static_cast<const T*>(left.matrix);
        job.left_row = left.row_stride;
        job.left_column = left.column_stride;
        if (left.dtype != kCompute<T>) request(plan, index, true, left.row_stride == 1, left.rank);
    }
    if (right.form == SideForm::none) return;
    const T* matrix = static_cast<const T*>(right.matrix);
    const bool rows_contiguous = right.column_stride == 1, converted = right.dtype != kCompute<T>;
    (rows_contiguous ? job.by_rows : job.by_columns) = matrix;
    (rows_contiguous ? job.rows_stride : job.columns_stride) = rows_contiguous ? right.row_stride : right.column_stride;
    job.width = right.rank;
    job.many = right.form != SideForm::dense && p.batch * p.rows >= kPackRows;
    constexpr int64_t kVector = 64 / sizeof(T);
    if (job.many) job.width = (right.rank + kVector - 1) / kVector * kVector;
    const bool by_rows = job.many || right.form == SideForm::dense || rows_contiguous;
    const bool by_columns = job.many || (right.form != SideForm::dense && !rows_contiguous);
    if (by_columns && (converted || rows_contiguous)) request(plan, index, false, true, right.rank);
    if (by_rows && (converted || !rows_contiguous || job.width != right.rank)) {
        request(plan, index, false, false, job.width);
    }
}

template <typename T>
void plan_blocks(Plan<T>& plan, int64_t index) {
    const Job<T>& job = plan.jobs[index];
    const ProjectedParameter& p = *job.parameter;
    const bool whole = p.left.form != SideForm::none;
    const bool dense = p.right.form == SideForm::dense;
    const int64_t fitting = dense ? std::clamp<int64_t>(kDenseElements / p.columns / 4 * 4, 16, 512)
                                  : std::clamp<int64_t>(kBlockElements / p.columns / 4 * 4, 8, 64);
    const int64_t height = whole ? p.rows : std::min(p.rows, fitting), size = height * p.columns;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t row = 0; row < p.rows; row += height) {
            plan.blocks.push_back({index, b, row, std::min(height, p.rows - row)});
        }
    }
    plan.u = std::max(plan.u, size);
    if (whole || p.right.form != SideForm::none) plan.product = std::max(plan.product, size);
    if (p.left.form == SideForm::twice || p.right.form == SideForm::twice) plan.rest = std::max(plan.rest, size);
    plan.inner = std::max({plan.inner, height * std::max(dense ? 0 : job.width, strip_of(p.columns)),
                           p.left.rank * p.columns, dense ? kDepth * kPanel : 0});
}

template <typename T>
Plan<T> make_plan(const std::vector<ProjectedParameter>& parameters, const AdamSettings& a) {
    Plan<T> plan;
    plan.jobs.reserve(parameters.size());
    const auto end_wave = [&] {
        plan.packed = std::max(plan.packed, plan.wanted);
        plan.wanted = 0;
        plan.waves.push_back({static_cast<int64_t>(plan.packings.size()), static_cast<int64_t>(plan.blocks.size())});
    };
    for (const ProjectedParameter& p : parameters) {
        if ((p.moment_type == DType::f64) != (sizeof(T) == 8)) continue;
        const double step = static_cast<double>(p.step ? *p.step : p.steps) + 1.0;
        const int64_t index = static_cast<int64_t>(plan.jobs.size());
        plan.jobs.push_back({});
        plan.jobs.back().parameter = &p;
        plan.jobs.back().numbers = adam_numbers<T>(step, a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.decoupled,
                                                   a.project_decay, a.grad_factor);
        choose_elements(plan.jobs.back());
        if (p.batch * p.rows * p.columns == 0) continue;
        plan_sides(plan, index);
        plan_blocks(plan, index);
        if (plan.wanted * static_cast<int64_t>(sizeof(T)) > kWaveBytes) end_wave();
    }
    end_wave();
    return plan;
}

// out[j, i] = in[i, j], in pieces that stay in L1.
template <typename T, typename M>
void transpose(const M* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
    constexpr int64_t kPiece = 16;
    for (int64_t i0 = 0; i0 < rows; i0 += kPiece) {
        for (int64_t j0 = 0; j0 < columns; j0 += kPiece) {
            for (int64_t j = j0; j < std::min(columns, j0 + kPiece); ++j) {
                for (int64_t i = i0; i < std::min(rows, i0 + kPiece); ++i) {
                    out[j * out_stride + i] = get<T>(in + i * in_stride + j);
                }
            }
        }
    }
}

// The [size, rank] matrix of a side in the layout asked for.
template <typename T, typename M>
void copy_matrix(const ProjectionSide& side, int64_t size, const Packing<T>& packing, T* target) {
    const M* matrix = static_cast<const M*>(side.matrix);
    const bool by_rows = side.column_stride == 1;  // as it is given
    const int64_t given = by_rows ? side.row_stride : side.column_stride;
    const int64_t wanted = packing.columns ? size : packing.width;
    if (by_rows == packing.columns) {
        const int64_t lines = by_rows ? size : side.rank;
        transpose(matrix, given, target, wanted, lines, by_rows ? side.rank : size);
    } else {
        const int64_t lines = by_rows ? size : side.rank, each = by_rows ? side.rank : size;
        for (int64_t i = 0; i < lines; ++i) {
            for (int64_t j = 0; j < each; ++j) target[i * wanted + j] = get<T>(matrix + i * given + j);
        }
    }
    for (int64_t i = 0; !packing.columns && packing.width > side.rank && i < size; ++i) {
        std::fill(target + i * packing.width + side.rank, target + (i + 1) * packing.width, T(0));
    }
}

// Fills one layout; the job refers to it when all are filled, because another thread may be reading the job now.
template <typename T>
void pack(const Plan<T>& plan, const Packing<T>& packing, T* packed) {
    const ProjectedParameter& p = *plan.jobs[packing.job].parameter;
    const ProjectionSide& side = packing.left ? p.left : p.right;
    const int64_t size = packing.left ? p.rows : p.columns;
    T* const target = packed + packing.offset;
    switch (side.dtype) {
        case DType::f16:
            return copy_matrix<T, Half>(side, size, packing, target);
        case DType::bf16:
            return copy_matrix<T, BFloat16>(side, size, packing, target);
        default:
            return copy_matrix<T, T>(side, size, packing, target);
    }
}

template <typename T>
void refer(Plan<T>& plan, const Packing<T>& packing, const T* packed) {
    Job<T>& job = plan.jobs[packing.job];
    const T* const target = packed + packing.offset;
    if (packing.left) {
        job.left = target;
        job.left_row = packing.columns ? 1 : packing.width;
        job.left_column = packing.columns ? job.parameter->rows : 1;
    } else {
        (packing.columns ? job.by_columns : job.by_rows) = target;
        (packing.columns ? job.columns_stride : job.rows_stride) =
            packing.columns ? job.parameter->columns : packing.width;
    }
}

template <typename T>
void run(Plan<T>& plan, T* memory, int64_t each, int threads) {
    T* const packed = memory + each * threads;
    const Operations<T>& o = operations<T>();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        T* const own = memory + each * omp_get_thread_num();
#else
        T* const own = memory;
#endif
        T* const product = own + plan.u;
        T* const rest = product + plan.product;
        const Scratch<T> s{own, product, rest, rest + plan.rest};
        int64_t packing = 0, block = 0;
        for (const Wave& wave : plan.waves) {
#pragma omp for schedule(dynamic)
            for (int64_t i = packing; i < wave.packings; ++i) pack(plan, plan.packings[i], packed);
#pragma omp single
            for (int64_t i = packing; i < wave.packings; ++i) refer(plan, plan.packings[i], packed);
#pragma omp for schedule(dynamic)
            for (int64_t i = block; i < wave.blocks; ++i)
                block_body(o, plan.jobs[plan.blocks[i].job], plan.blocks[i], s);
            packing = wave.packings;
            block = wave.blocks;
        }
    }
}

KeptMemory& memory_of_this_thread() {
    thread_local KeptMemory memory;
    return memory;
}

template <typename T>
int64_t values_each(const Plan<T>& plan) {
    return plan.u + plan.product + plan.rest + plan.inner + 64;  // the gap keeps threads off each other's cache lines
}

template <typename T>
size_t bytes_of(const Plan<T>& plan, int threads) {
    return plan.blocks.empty() ? 0 : sizeof(T) * static_cast<size_t>(values_each(plan) * threads + plan.packed);
}

}  // namespace

void projected_adam_cpu(const std::vector<ProjectedParameter>& parameters, const AdamSettings& settings, int threads) {
    Plan<float> singles = make_plan<float>(parameters, settings);
    Plan<double> doubles = make_plan<double>(parameters, settings);
    const int64_t work = std::max(singles.blocks.size(), doubles.blocks.size());
    threads = static_cast<int>(std::clamp<int64_t>(work, 1, std::max(threads, 1)));
    KeptMemory& memory = memory_of_this_thread();
    const size_t bytes = std::max(bytes_of(singles, threads), bytes_of(doubles, threads));
    void* const space = memory.take(bytes);
    if (!singles.blocks.empty()) run(singles, static_cast<float*>(space), values_each(singles), threads);
    if (!doubles.blocks.empty()) run(doubles, static_cast<double*>(space), values_each(doubles), threads);
    for (const ProjectedParameter& p : parameters) {
        if (p.step) *p.step += 1.0f;
    }
    memory.release();
}

}  // namespace clk
