// Batched QR on the CPU: a thread for a matrix, all four products of a pass in register tiles of doubles.
//
// Rows of the input are turned into doubles a chunk at a time, in rows of whole vectors; the Gram matrix and Q = A R^-1
// read the chunk from the near cache. A Gram matrix in double costs half the operations of Householder reflections and
// is all matrix product, which is why it wins although doubles are half as fast as floats: 1.5 to 3.5 times as fast as
// torch's loop over LAPACK, 1.2 to 2 times where the condition asks for a second pass. The exceptions are four columns
// with a condition of 1e7 (0.8) or without full rank (0.5), forward alone: LAPACK's 3 us a matrix are what two passes
// cost, and it has neither status nor gradient to prepare; with the backward we lead again.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "common/simd.h"
#include "orthogonal_qr.h"
#include "orthogonal_qr_passes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clk {
namespace {

constexpr int64_t kPanel = 8;            // rows of a step of the elimination, and what all widths are rounded up to
constexpr int64_t kChunkDoubles = 4096;  // 32 KB: a chunk stays in the nearest cache

enum class Mode { set, add, subtract };

// C[MR, NV vectors] (=, +=, -=) A[MR, k] B[k, NV vectors]; A by any strides, B and C by rows.
template <typename E, int Bytes, int MR, int NV, Mode mode>
CLK_INLINE void tile(const E* a, int64_t as, int64_t ak, const E* b, int64_t bs, E* c, int64_t cs, int64_t k) {
    typedef E V __attribute__((vector_size(Bytes), aligned(sizeof(E))));
    constexpr int L = Bytes / static_cast<int>(sizeof(E));
    V acc[MR][NV] = {};
    for (int64_t q = 0; q < k; ++q) {
        V row[NV];
        for (int j = 0; j < NV; ++j) row[j] = *reinterpret_cast<const V*>(b + q * bs + j * L);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const E x = a[i * as + q * ak];
            for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < MR; ++i) {
        for (int j = 0; j < NV; ++j) {
            V* const out = reinterpret_cast<V*>(c + i * cs + j * L);
            *out = mode == Mode::set ? acc[i][j] : mode == Mode::add ? *out + acc[i][j] : *out - acc[i][j];
        }
    }
}

template <int Bytes>
constexpr int kTileRows = Bytes == 64 ? 8 : 4;  // with three vectors: 24 of 32 registers, 12 of 16

// kTileRows rows of C, `width` columns, a multiple of kPanel.
template <typename E, int Bytes, Mode mode>
CLK_INLINE void tiles(const E* a, int64_t as, int64_t ak, const E* b, int64_t bs, E* c, int64_t cs, int64_t width,
                      int64_t k) {
    constexpr int L = Bytes / static_cast<int>(sizeof(E)), MR = kTileRows<Bytes>;
    int64_t j = 0;
    for (; j + 3 * L <= width; j += 3 * L) tile<E, Bytes, MR, 3, mode>(a, as, ak, b + j, bs, c + j, cs, k);
    if (j + 2 * L <= width) {
        tile<E, Bytes, MR, 2, mode>(a, as, ak, b + j, bs, c + j, cs, k);
        j += 2 * L;
    }
    if (j + L <= width) {
        tile<E, Bytes, MR, 1, mode>(a, as, ak, b + j, bs, c + j, cs, k);
        j += L;
    }
    if constexpr (L > kPanel) {  // sixteen floats
        if (j < width) tile<E, Bytes / 2, MR, 1, mode>(a, as, ak, b + j, bs, c + j, cs, k);
    }
}

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
int64_t chunk_rows(int64_t ld) { return std::clamp<int64_t>(kChunkDoubles / ld / kPanel * kPanel, 48, 256); }
int64_t scratch_doubles(int64_t m, int64_t ld) {
    return qr_space_doubles(ld) + 2 * chunk_rows(ld) * ld + 2 * kPanel * ld + padded(m);
}

// Rows [first, first + count) in the element type of the arithmetic, scaled; zero columns and rows up to whole tiles.
template <typename E, typename T>
CLK_INLINE void pack(const QrView<T>& v, const double* scale, int64_t first, int64_t count, int64_t n, int64_t ld,
                     E* out) {
    const T* from = v.data + first * v.row_stride;
    if (v.column_stride == 1 && v.row_stride == n && n == ld && !scale) {
        for (int64_t i = 0; i < count * n; ++i) out[i] = static_cast<E>(from[i]);
    } else if (v.column_stride == 1) {
        for (int64_t i = 0; i < count; ++i, from += v.row_stride) {
            E* const row = out + i * ld;
            if (scale) {
                for (int64_t j = 0; j < n; ++j) row[j] = static_cast<E>(from[j]) * static_cast<E>(scale[j]);
            } else {
                for (int64_t j = 0; j < n; ++j) row[j] = static_cast<E>(from[j]);
            }
        }
    } else {
        for (int64_t j = 0; j < n; ++j) {
            const E factor = static_cast<E>(scale ? scale[j] : 1.0);
            for (int64_t i = 0; i < count; ++i) {
                out[i * ld + j] = static_cast<E>(from[i * v.row_stride + j * v.column_stride]) * factor;
            }
        }
    }
    for (int64_t i = 0; i < count && n < ld; ++i) std::fill(out + i * ld + n, out + (i + 1) * ld, E{0});
    std::fill(out + count * ld, out + padded(count) * ld, E{0});
}

// A chunk that needs no packing: the view itself.
template <typename T>
struct Chunk {
    const T* data;
    int64_t row;
};

template <typename T>
CLK_INLINE Chunk<T> chunk_of(const QrView<T>& v, int64_t first, int64_t count, int64_t n, int64_t ld, T* memory) {
    if (v.column_stride == 1 && n == ld && count % kPanel == 0) return {v.data + first * v.row_stride, v.row_stride};
    pack(v, nullptr, first, count, n, ld, memory);
    return {memory, ld};
}

template <typename T, int Bytes>
struct CpuEngine {
    static constexpr bool kBlock = false;
    static constexpr int64_t MR = kTileRows<Bytes>;
    int64_t m, n, ld;
    QrSpace space;
    double *chunk, *chunk2, *rows, *columns;  // two chunks, twice kPanel rows of results, a column of m

    CLK_INLINE CpuEngine(double* memory, int64_t m_, int64_t n_) : m(m_), n(n_), ld(padded(n_)) {
        space = qr_space(memory, ld);
        chunk = memory + qr_space_doubles(ld);
        chunk2 = chunk + chunk_rows(ld) * ld;
        rows = chunk2 + chunk_rows(ld) * ld;
        columns = rows + 2 * kPanel * ld;
    }

    template <typename F>
    CLK_INLINE void each(int64_t count, const F& f) const {
        for (int64_t i = 0; i < count; ++i) f(i);
    }
    template <typename F>
    CLK_INLINE void each2(int64_t count, int64_t width, const F& f) const {
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < width; ++j) f(i, j);
        }
    }
    template <typename F>
    CLK_INLINE void sums(int64_t count, int64_t terms, double* out, const F& f) const {
        for (int64_t j = 0; j < count; ++j) out[j] = 0.0;
        for (int64_t i = 0; i < terms; ++i) {
            for (int64_t j = 0; j < count; ++j) out[j] += f(i, j);
        }
    }

    CLK_INLINE void clear(double* array, int64_t row) const {
        for (int64_t i = 0; i < ld; ++i) std::fill(array + i * row, array + i * row + row, 0.0);
    }

    // One, two or four columns leave most of a vector empty. Rows that lie one behind the other are then taken
    // kPanel / n at a time, as one row of kPanel columns, and the blocks of the result are put together.
    CLK_INLINE int64_t folds(const QrView<T>& v) const {
        const bool whole = v.column_stride == 1 && v.row_stride == n && (n == 1 || n == 2 || n == 4);
        return whole && m % (kPanel / n) == 0 ? kPanel / n : 1;
    }
    CLK_INLINE QrView<T> folded(const QrView<T>& v) const { return {v.data, kPanel, 1}; }

    CLK_INLINE void gram(const QrView<T>& v, const double* scale) const {
        clear(space.work, 2 * ld);
        const int64_t fold = folds(v);
        if (fold > 1) {
            for (int64_t j = 0; j < kPanel && scale; ++j) columns[j] = scale[j % n];
            std::fill(rows, rows + kPanel * kPanel, 0.0);
            add_gram(folded(v), scale ? columns : nullptr, m / fold, kPanel, rows, kPanel);
            for (int64_t i = 0; i < kPanel; ++i) {
                for (int64_t j = i / n * n; j < (i / n + 1) * n; ++j)
                    space.work[i % n * 2 * ld + j % n] += rows[i * kPanel + j];
            }
        } else {
            add_gram(v, scale, m, n, space.work, 2 * ld);
        }
        for (int64_t i = 0; i < n; ++i) space.work[i * 2 * ld + ld + i] = 1.0;
    }

    CLK_INLINE void add_gram(const QrView<T>& v, const double* scale, int64_t height, int64_t width, double* out,
                             int64_t row) const {
        const int64_t step = chunk_rows(ld);
        for (int64_t first = 0; first < height; first += step) {
            const int64_t count = std::min(step, height - first);
            pack(v, scale, first, count, width, ld, chunk);
            for (int64_t i = 0; i < ld; i += MR) {
                const int64_t from = i / kPanel * kPanel;
                tiles<double, Bytes, Mode::add>(chunk + i, 1, ld, chunk + from, ld, out + i * row + from, row,
                                                ld - from, count);
            }
        }
    }

    // Left-looking: a panel of rows first takes all rows above it, in tiles, and is then eliminated on its own.
    CLK_INLINE bool eliminate(bool drop) const {
        const int64_t row = 2 * ld;
        bool regular = true;
        for (int64_t k0 = 0; k0 < n; k0 += kPanel) {
            double* const panel = space.work + k0 * row;
            for (int64_t g = 0; g < kPanel && k0 > 0; g += MR) {
                const double* const above = space.work + k0 + g;  // its transpose: column k0 + g of R
                tiles<double, Bytes, Mode::subtract>(above, 1, row, space.work + k0, row, panel + g * row + k0, row,
                                                     ld - k0, k0);
                tiles<double, Bytes, Mode::subtract>(above, 1, row, space.work + ld, row, panel + g * row + ld, row, k0,
                                                     k0);
            }
            const int64_t end = std::min(k0 + kPanel, n);
            for (int64_t k = k0; k < end; ++k) {
                double* const line = space.work + k * row;
                const double pivot = line[k];
                if (!(pivot > space.limit[k])) {
                    regular = false;
                    if (!drop) return false;
                    std::fill(line, line + row, 0.0);
                    continue;
                }
                const double factor = 1.0 / std::sqrt(pivot);
                std::fill(line, line + k, 0.0);
                for (int64_t j = k; j < ld; ++j) line[j] *= factor;
                for (int64_t j = ld; j <= ld + k; ++j) line[j] *= factor;
                for (int64_t i = k + 1; i < end; ++i) {
                    double* const target = space.work + i * row;
                    const double x = line[i];
                    for (int64_t j = k0; j < ld; ++j) target[j] -= x * line[j];
                    for (int64_t j = ld; j <= ld + k; ++j) target[j] -= x * line[j];
                }
            }
        }
        return regular;
    }

    template <typename E>
    CLK_INLINE void write(const E* from, int64_t count, int64_t width, T* out) const {
        if (width == ld) {
            for (int64_t i = 0; i < count * width; ++i) out[i] = static_cast<T>(from[i]);
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < width; ++j) out[i * width + j] = static_cast<T>(from[i * ld + j]);
        }
    }

    CLK_INLINE void apply(const QrView<T>& v, const double* scale, T* q) const {
        double* const w = space.other;  // S R^-1 by rows
        const int64_t fold = folds(v), width = fold > 1 ? kPanel : n;
        for (int64_t i = 0; i < ld; ++i) {
            for (int64_t j = 0; j < ld; ++j) w[j * ld + i] = 0.0;
        }
        for (int64_t f = 0; f < width; f += n) {
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j <= i; ++j) {
                    w[(f + j) * ld + f + i] = space.work[i * 2 * ld + ld + j] * (scale ? scale[j] : 1.0);
                }
            }
        }
        apply_rows(fold > 1 ? folded(v) : v, m / fold, width, q);
    }

    CLK_INLINE void apply_rows(const QrView<T>& v, int64_t height, int64_t width, T* q) const {
        constexpr int64_t block = 3 * (Bytes / 8);
        const double* const w = space.other;
        const int64_t step = chunk_rows(ld);
        for (int64_t first = 0; first < height; first += step) {
            const int64_t count = std::min(step, height - first);
            pack(v, nullptr, first, count, width, ld, chunk);
            for (int64_t i = 0; i < count; i += MR) {
                for (int64_t j = 0; j < ld; j += block) {
                    const int64_t here = std::min<int64_t>(block, ld - j);
                    tiles<double, Bytes, Mode::set>(chunk + i * ld, ld, 1, w + j, ld, rows + j, ld, here,
                                                    std::min(width, j + here));
                }
                write(rows, std::min<int64_t>(MR, count - i), width, q + (first + i) * width);
            }
        }
    }

    CLK_INLINE void product(const double* a, int64_t lda, const double* b, int64_t ldb, double* out,
                            int64_t ldo) const {
        for (int64_t i = 0; i < ld; i += MR) {
            tiles<double, Bytes, Mode::set>(a + i * lda, lda, 1, b, ldb, out + i * ldo, ldo, ld, n);
        }
    }

    // The backward computes in the type of its input, as torch does.
    CLK_INLINE void cross(const QrView<T>& x, const QrView<T>& y) const {
        const int64_t fold = std::min(folds(x), folds(y)), width = fold > 1 ? kPanel : n;
        T* const sum = reinterpret_cast<T*>(space.total);
        clear(space.total, ld);
        clear(space.work, 2 * ld);
        add_cross(fold > 1 ? folded(x) : x, fold > 1 ? folded(y) : y, m / fold, width, sum);
        for (int64_t i = 0; i < width; ++i) {
            for (int64_t j = 0; j < width; ++j) {
                if (i / n == j / n) space.work[i % n * 2 * ld + j % n] += static_cast<double>(sum[i * ld + j]);
            }
        }
    }

    CLK_INLINE void add_cross(const QrView<T>& x, const QrView<T>& y, int64_t height, int64_t width, T* out) const {
        const int64_t step = chunk_rows(ld);
        for (int64_t first = 0; first < height; first += step) {
            const int64_t count = std::min(step, height - first);
            const Chunk<T> a = chunk_of(x, first, count, width, ld, reinterpret_cast<T*>(chunk));
            const Chunk<T> b = chunk_of(y, first, count, width, ld, reinterpret_cast<T*>(chunk2));
            for (int64_t i = 0; i < ld; i += MR) {
                // Only what is on and below the diagonal is used.
                const int64_t below = std::min(ld, i / kPanel * kPanel + kPanel);
                tiles<T, Bytes, Mode::add>(a.data + i, 1, a.row, b.data, b.row, out + i * ld, ld, below, count);
            }
        }
    }

    CLK_INLINE void combine(const QrView<T>& x, const QrView<T>& y, const double* c, const double* s, T* out) const {
        const int64_t fold = x.data ? std::min(folds(x), folds(y)) : folds(y), width = fold > 1 ? kPanel : n;
        T* const c_here = reinterpret_cast<T*>(space.total);  // `total` and `work` are free
        T* const s_here = reinterpret_cast<T*>(space.work);
        for (int64_t i = 0; i < ld; ++i) {
            for (int64_t j = 0; j < ld; ++j) {
                const bool there = i < width && j < width && i / n == j / n;
                c_here[i * ld + j] = there ? static_cast<T>(c[i % n * ld + j % n]) : T{0};
                s_here[i * ld + j] = there ? static_cast<T>(s[i % n * ld + j % n]) : T{0};
            }
        }
        combine_rows(fold > 1 && x.data ? folded(x) : x, fold > 1 ? folded(y) : y, m / fold, width, c_here, s_here,
                     out);
    }

    CLK_INLINE void combine_rows(const QrView<T>& x, const QrView<T>& y, int64_t height, int64_t width, const T* c,
                                 const T* s, T* out) const {
        T* const middle = reinterpret_cast<T*>(rows);
        T* const last = middle + kPanel * ld;
        const int64_t step = chunk_rows(ld);
        for (int64_t first = 0; first < height; first += step) {
            const int64_t count = std::min(step, height - first);
            Chunk<T> a{nullptr, 0};
            if (x.data) a = chunk_of(x, first, count, width, ld, reinterpret_cast<T*>(chunk));
            const Chunk<T> b = chunk_of(y, first, count, width, ld, reinterpret_cast<T*>(chunk2));
            for (int64_t i = 0; i < count; i += MR) {
                T* const to = out + (first + i) * width;
                tiles<T, Bytes, Mode::set>(b.data + i * b.row, b.row, 1, c, ld, middle, ld, ld, width);
                for (int64_t k = 0; k < MR && a.data; ++k) {
                    for (int64_t j = 0; j < ld; ++j) middle[k * ld + j] += a.data[(i + k) * a.row + j];
                }
                if (width == ld && count - i >= MR) {
                    tiles<T, Bytes, Mode::set>(middle, ld, 1, s, ld, to, ld, ld, width);
                } else {
                    tiles<T, Bytes, Mode::set>(middle, ld, 1, s, ld, last, ld, ld, width);
                    write(last, std::min<int64_t>(MR, count - i), width, to);
                }
            }
        }
    }

    // The sum of q[j] x[j] in eight lanes: the compiler may not reorder a sum by itself.
    CLK_INLINE double dot(const T* q, const double* x) const {
        double lanes[8] = {};
        int64_t j = 0;
        for (; j + 8 <= n; j += 8) {
            for (int l = 0; l < 8; ++l) lanes[l] += static_cast<double>(q[j + l]) * x[j + l];
        }
        for (; j < n; ++j) lanes[0] += static_cast<double>(q[j]) * x[j];
        return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }

    // In place of a dropped column a unit vector of which the others hold less than half, less its part in them, twice.
    CLK_INLINE void fill(T* q) const {
        double *const v = columns, *const part = space.line;
        for (int64_t k = 0; k < n; ++k) {
            if (space.total[k * ld + k] != 0.0) continue;
            double least = 2.0;
            int64_t unit = 0;
            for (int64_t i = 0; i < m && least > 0.5; ++i) {
                for (int64_t j = 0; j < n; ++j) part[j] = static_cast<double>(q[i * n + j]);
                const double held = dot(q + i * n, part);
                if (held < least) unit = i;
                least = std::min(least, held);
            }
            for (int64_t j = 0; j < n; ++j) part[j] = static_cast<double>(q[unit * n + j]);
            for (int turn = 0; turn < 2; ++turn) {
                if (turn) {
                    sums(n, m, part, [&](int64_t i, int64_t j) { return static_cast<double>(q[i * n + j]) * v[i]; });
                }
                for (int64_t i = 0; i < m; ++i) v[i] = (turn ? v[i] : i == unit ? 1.0 : 0.0) - dot(q + i * n, part);
            }
            double length2 = 0.0;
            for (int64_t i = 0; i < m; ++i) length2 += v[i] * v[i];
            const double factor = 1.0 / std::sqrt(length2);
            for (int64_t i = 0; i < m; ++i) q[i * n + k] = static_cast<T>(v[i] * factor);
        }
    }
};

// -- one matrix at each level of instructions -------------------------------------------------------------------------
template <typename T>
struct Forward {
    using Batch = QrBatch;
    template <int Bytes>
    static CLK_INLINE void body(const QrBatch& b, int64_t i, double* memory) {
        CpuEngine<T, Bytes> engine(memory, b.m, b.n);
        qr_matrix(engine, qr_matrix_of<T>(b, i));
    }
};

template <typename T>
struct Backward {
    using Batch = QrGradients;
    template <int Bytes>
    static CLK_INLINE void body(const QrGradients& b, int64_t i, double* memory) {
        CpuEngine<T, Bytes> engine(memory, b.m, b.n);
        qr_backward_matrix(engine, qr_gradient_of<T>(b, i));
    }
};

template <typename Work>
void work_base(const typename Work::Batch& b, int64_t i, double* memory) {
    Work::template body<16>(b, i, memory);
}
template <typename Work>
CLK_TARGET_AVX2 void work_avx2(const typename Work::Batch& b, int64_t i, double* memory) {
    Work::template body<32>(b, i, memory);
}
template <typename Work>
CLK_TARGET_AVX512 void work_avx512(const typename Work::Batch& b, int64_t i, double* memory) {
    Work::template body<64>(b, i, memory);
}

template <typename Work>
void run(const typename Work::Batch& b, int threads) {
    if (b.batch == 0 || b.n == 0) return;
    threads = static_cast<int>(std::clamp<int64_t>(b.batch, 1, std::max(threads, 1)));
    const int64_t each = (scratch_doubles(b.m, padded(b.n)) + 15) / 16 * 16;
    const std::unique_ptr<double[]> memory(new double[each * threads + 8]());
    double* const start = pointer<double>((reinterpret_cast<std::intptr_t>(memory.get()) + 63) & ~std::intptr_t{63});
    const Isa level = isa();
    const auto work = level == Isa::avx512 ? work_avx512<Work> : level == Isa::avx2 ? work_avx2<Work> : work_base<Work>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < b.batch; ++i) {
#ifdef _OPENMP
        work(b, i, start + each * omp_get_thread_num());
#else
        work(b, i, start);
#endif
    }
}

template <template <typename> class Work, typename Batch>
void with_type(const Batch& batch, DType dtype, int threads) {
    switch (dtype) {
        case DType::f32:
            return run<Work<float>>(batch, threads);
        case DType::f64:
            return run<Work<double>>(batch, threads);
        default:
            throw std::invalid_argument("orthogonal_qr: float32 and float64 only");
    }
}

}  // namespace

void qr_cpu(const QrBatch& batch, DType dtype, int threads) { with_type<Forward>(batch, dtype, threads); }

void qr_backward_cpu(const QrGradients& batch, DType dtype, int threads) { with_type<Backward>(batch, dtype, threads); }

}  // namespace clk
