// The Engine that is a block of CUDA threads, or the host that plays one.
#pragma once

#include "orthogonal_qr_passes.h"

namespace clk {

// -- the products of a block of threads -------------------------------------------------------------------------------
constexpr int64_t kQrStage = 4096;  // doubles for rows on their way through a product, or for partial sums
constexpr int64_t kQrTile = 4;      // a thread computes 4 x 4 results at a time
constexpr int64_t kQrItems = 256;   // of these at once: kQrItems kQrTile^2 = kQrStage

// The Engine made of a team: ld = n, so an array of n x n is whole.
template <typename T, typename Team>
struct QrBlockEngine : Team {
    static constexpr bool kBlock = true;
    int64_t m, n, ld;
    QrSpace space;
    double* stage;

    CLK_TEAM QrBlockEngine(const Team& team, int64_t m_, int64_t n_, double* memory, double* stage_)
        : Team(team), m(m_), n(n_), ld(n_), space(qr_space(memory, n_)), stage(stage_) {}

    // The triangle of X^T Y in tiles, rows in slices whose sums are added up in order: above the diagonal, or below it.
    CLK_TEAM void triangle(const QrView<T>& x, const QrView<T>& y, const double* scale, bool above) const {
        const int64_t tiles = (n + kQrTile - 1) / kQrTile, pairs = tiles * (tiles + 1) / 2, height = m, width = n;
        const int64_t slices = pairs < kQrItems ? kQrItems / pairs : 1;
        double* const partial = stage;
        double* const work = space.work;
        const auto place = [&](int64_t pair, int64_t& i0, int64_t& j0) {
            int64_t low = 0;
            while (pair >= tiles - low) pair -= tiles - low++;
            i0 = kQrTile * (above ? low : low + pair);
            j0 = kQrTile * (above ? low + pair : low);
        };
        const auto put = [&](int64_t i, int64_t j, double value) {
            if (i < width && j < width && (above ? j >= i : j <= i)) work[i * 2 * width + j] = value;
        };
        this->each2(n, n, [&](int64_t i, int64_t j) {
            work[i * 2 * width + j] = 0.0;
            work[i * 2 * width + width + j] = i == j ? 1.0 : 0.0;
        });
        this->each(pairs * slices, [&](int64_t item) {
            int64_t i0, j0;
            place(item % pairs, i0, j0);
            double sum[kQrTile][kQrTile] = {};
            for (int64_t k = item / pairs; k < height; k += slices) {
                double a[kQrTile], b[kQrTile];
                for (int c = 0; c < kQrTile; ++c) {
                    const int64_t i = i0 + c, j = j0 + c;
                    a[c] = i < width ? x(k, i) * (scale ? scale[i] : 1.0) : 0.0;
                    b[c] = j < width ? y(k, j) * (scale ? scale[j] : 1.0) : 0.0;
                }
                for (int r = 0; r < kQrTile; ++r) {
                    for (int c = 0; c < kQrTile; ++c) sum[r][c] += a[r] * b[c];
                }
            }
            for (int r = 0; r < kQrTile; ++r) {
                for (int c = 0; c < kQrTile; ++c) {
                    if (slices > 1) {
                        partial[item * kQrTile * kQrTile + r * kQrTile + c] = sum[r][c];
                    } else {
                        put(i0 + r, j0 + c, sum[r][c]);
                    }
                }
            }
        });
        if (slices == 1) return;
        this->each(pairs * kQrTile * kQrTile, [&](int64_t t) {
            int64_t i0, j0;
            place(t / (kQrTile * kQrTile), i0, j0);
            double sum = 0.0;
            for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * pairs * kQrTile * kQrTile + t];
            put(i0 + t / kQrTile % kQrTile, j0 + t % kQrTile, sum);
        });
    }

    CLK_TEAM void gram(const QrView<T>& v, const double* scale) const { triangle(v, v, scale, true); }
    CLK_TEAM void cross(const QrView<T>& x, const QrView<T>& y) const { triangle(x, y, nullptr, false); }

    CLK_TEAM bool eliminate(bool drop) const {
        const int64_t width = n, row = 2 * n;
        double *const work = space.work, *const line = space.line;
        bool regular = true;
        for (int64_t k = 0; k < n; ++k) {
            const double pivot = work[k * row + k];
            const bool good = pivot > space.limit[k];
            if (!good && !drop) return false;
            regular = regular && good;
            const double factor = good ? 1.0 / sqrt(pivot) : 0.0;
            this->each(row, [&](int64_t c) {
                const bool there = good && (c < width ? c >= k : c <= width + k);
                line[c] = there ? work[k * row + c] * factor : 0.0;
            });
            this->each2(n - k, n + 1, [&](int64_t r, int64_t c) {  // columns k to n - 1 of R, 0 to k of its inverse
                const int64_t i = k + r, j = c < width - k ? k + c : width + c - (width - k);
                if (j < i && j < width) return;  // below the diagonal all is zero
                double& x = work[i * row + j];
                x = i == k ? line[j] : x - line[i] * line[j];
            });
        }
        return regular;
    }

    CLK_TEAM void product(const double* a, int64_t lda, const double* b, int64_t ldb, double* out, int64_t ldo) const {
        const int64_t depth = n;
        this->each2(n, n, [&](int64_t i, int64_t j) {
            double sum = 0.0;
            for (int64_t k = 0; k < depth; ++k) sum += a[i * lda + k] * b[k * ldb + j];
            out[i * ldo + j] = sum;
        });
    }

    // put(row, j, value) of `count` staged rows times a matrix of `factor(k, j)`, k < depth(j0): rows in strides, so
    // that neighbouring threads read neighbouring rows, whose odd length keeps them in different banks.
    template <typename Factor, typename Put>
    CLK_TEAM void staged_product(const double* rows, int64_t length, int64_t count, bool upper, const Factor& factor,
                                 const Put& put) const {
        const int64_t groups = (count + kQrTile - 1) / kQrTile, tiles = (n + kQrTile - 1) / kQrTile, width = n;
        this->each2(tiles, groups, [&](int64_t tile, int64_t group) {
            const int64_t j0 = tile * kQrTile, depth = upper && j0 + kQrTile < width ? j0 + kQrTile : width;
            double sum[kQrTile][kQrTile] = {};
            for (int64_t k = 0; k < depth; ++k) {
                double a[kQrTile], b[kQrTile];
                for (int c = 0; c < kQrTile; ++c) {
                    const int64_t i = group + c * groups;
                    a[c] = i < count ? rows[i * length + k] : 0.0;
                    b[c] = j0 + c < width ? factor(k, j0 + c) : 0.0;
                }
                for (int r = 0; r < kQrTile; ++r) {
                    for (int c = 0; c < kQrTile; ++c) sum[r][c] += a[r] * b[c];
                }
            }
            for (int r = 0; r < kQrTile; ++r) {
                for (int c = 0; c < kQrTile; ++c) {
                    if (group + r * groups < count && j0 + c < width) put(group + r * groups, j0 + c, sum[r][c]);
                }
            }
        });
    }

    CLK_TEAM void apply(const QrView<T>& v, const double* scale, T* q) const {
        const int64_t length = n | 1, width = n, step = kQrStage / length / kQrTile * kQrTile;
        double *const rows = stage, *const work = space.work;
        for (int64_t first = 0; first < m; first += step) {
            const int64_t count = m - first < step ? m - first : step;
            this->each2(count, n, [&](int64_t i, int64_t j) {
                rows[i * length + j] = v(first + i, j) * (scale ? scale[j] : 1.0);
            });
            staged_product(
                rows, length, count, true, [&](int64_t k, int64_t j) { return work[j * 2 * width + width + k]; },
                [&](int64_t i, int64_t j, double value) { q[(first + i) * width + j] = static_cast<T>(value); });
        }
    }

    CLK_TEAM void combine(const QrView<T>& x, const QrView<T>& y, const double* c, const double* s, T* out) const {
        const int64_t length = n | 1, width = n, step = kQrStage / (2 * length) / kQrTile * kQrTile;
        double *const rows = stage, *const sums = stage + step * length;
        for (int64_t first = 0; first < m; first += step) {
            const int64_t count = m - first < step ? m - first : step;
            this->each2(count, n, [&](int64_t i, int64_t j) {
                rows[i * length + j] = y(first + i, j);
                sums[i * length + j] = x.data ? x(first + i, j) : 0.0;
            });
            staged_product(
                rows, length, count, false, [&](int64_t k, int64_t j) { return c[k * width + j]; },
                [&](int64_t i, int64_t j, double value) { sums[i * length + j] += value; });
            staged_product(
                sums, length, count, false, [&](int64_t k, int64_t j) { return s[k * width + j]; },
                [&](int64_t i, int64_t j, double value) { out[(first + i) * width + j] = static_cast<T>(value); });
        }
    }
};

constexpr int64_t kQrMostColumns = 480;  // four staged rows, twice, must fit

}  // namespace clk
