// Plays csrc/orthogonal_qr.cu on the host: the same passes and products, thread after thread. A phase ends where the
// kernel has a barrier; a sum over a warp is the butterfly of common/math.cuh. Threads run in reverse order too, when
// asked: a phase whose threads depended on each other would give another result.
#include <algorithm>
#include <vector>

#include "orthogonal_qr.h"
#include "orthogonal_qr_block.h"

namespace {

using namespace clk;

bool reversed = false;

struct HostTeam {
    template <typename F>
    void each(int64_t count, const F& f) const {
        for (int64_t i = 0; i < count; ++i) f(reversed ? count - 1 - i : i);
    }
    template <typename F>
    void each2(int64_t rows, int64_t columns, const F& f) const {
        each(rows * columns, [&](int64_t t) { f(t / columns, t % columns); });
    }
    template <typename F>
    void sums(int64_t count, int64_t terms, double* out, const F& f) const {
        each(count, [&](int64_t j) {
            std::vector<double> x(32), y(32);
            for (int64_t i = 0; i < terms; ++i) x[i % 32] += f(i, j);
            for (int offset = 16; offset > 0; offset /= 2) {
                for (int lane = 0; lane < 32; ++lane) y[lane] = x[lane] + x[lane ^ offset];
                x = y;
            }
            out[j] = x[0];
        });
    }
};

struct Room {
    std::vector<double> memory, stage;
    explicit Room(int64_t n) : memory(qr_space_doubles(n), NAN), stage(kQrStage, NAN) {}
};

template <typename T>
void forward(const QrBatch& b) {
    for (int64_t i = 0; i < b.batch; ++i) {
        Room room(b.n);
        QrBlockEngine<T, HostTeam> engine({}, b.m, b.n, room.memory.data(), room.stage.data());
        qr_matrix(engine, qr_matrix_of<T>(b, i));
    }
}

template <typename T>
void backward(const QrGradients& b) {
    for (int64_t i = 0; i < b.batch; ++i) {
        Room room(b.n);
        QrBlockEngine<T, HostTeam> engine({}, b.m, b.n, room.memory.data(), room.stage.data());
        qr_backward_matrix(engine, qr_gradient_of<T>(b, i));
    }
}

}  // namespace

extern "C" void play_forward(const int64_t* fields, int dtype, bool reverse) {
    reversed = reverse;
    std::array<int64_t, 12> f;
    std::copy_n(fields, f.size(), f.begin());
    dtype ? forward<double>(qr_batch(f)) : forward<float>(qr_batch(f));
}

extern "C" void play_backward(const int64_t* fields, int dtype, bool reverse) {
    reversed = reverse;
    std::array<int64_t, 15> f;
    std::copy_n(fields, f.size(), f.begin());
    dtype ? backward<double>(qr_gradients(f)) : backward<float>(qr_gradients(f));
}
