// Batched QR on CUDA: one block of threads for each matrix, from input to factors in one launch.
//
// The algorithm and its products are those of orthogonal_qr_block.h. A block's own matrices lie in shared memory, or,
// with many columns, in a workspace that stays in the L2 cache; the input is read twice, and the second time it comes
// from the caches.
#include "common/launch.h"
#include "common/math.cuh"
#include "orthogonal_qr.h"
#include "orthogonal_qr_block.h"

namespace clk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A barrier stands before each phase too: the values between phases are read by every thread, the last ones late.
struct DeviceTeam {
    template <typename F>
    __device__ void each(int64_t count, const F& f) const {
        __syncthreads();
        for (int i = threadIdx.x; i < static_cast<int>(count); i += kThreads) f(i);
        __syncthreads();
    }
    template <typename F>
    __device__ void each2(int64_t rows, int64_t columns, const F& f) const {
        const unsigned width = static_cast<unsigned>(columns), count = static_cast<unsigned>(rows) * width;
        __syncthreads();
        for (unsigned t = threadIdx.x; t < count; t += kThreads) f(t / width, t % width);
        __syncthreads();
    }
    template <typename F>
    __device__ void sums(int64_t count, int64_t terms, double* out, const F& f) const {
        const int lane = threadIdx.x % 32;
        __syncthreads();
        for (int j = threadIdx.x / 32; j < static_cast<int>(count); j += kWarps) {
            double sum = 0.0;
            for (int i = lane; i < static_cast<int>(terms); i += 32) sum += f(i, j);
            sum = warp_sum(sum);
            if (lane == 0) out[j] = sum;
        }
        __syncthreads();
    }
};

__device__ double* matrices(double* shared, double* workspace, int64_t n) {
    return n <= kQrSharedColumns ? shared + kQrStage : workspace + blockIdx.x * qr_space_doubles(n);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) cl_qr_forward(const QrBatch batch, double* workspace) {
    extern __shared__ double shared[];
    QrBlockEngine<T, DeviceTeam> engine({}, batch.m, batch.n, matrices(shared, workspace, batch.n), shared);
    qr_matrix(engine, qr_matrix_of<T>(batch, blockIdx.x));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) cl_qr_backward(const QrGradients batch, double* workspace) {
    extern __shared__ double shared[];
    QrBlockEngine<T, DeviceTeam> engine({}, batch.m, batch.n, matrices(shared, workspace, batch.n), shared);
    qr_backward_matrix(engine, qr_gradient_of<T>(batch, blockIdx.x));
}

template <typename Batch>
void launch(void (*kernel)(Batch, double*), const char* name, const Batch& batch, double* workspace,
            std::intptr_t stream) {
    if (batch.n > kQrMostColumns) throw std::invalid_argument("orthogonal_qr on CUDA: at most 480 columns");
    if (batch.batch == 0) return;  // an empty grid is an error
    pending_error_check(name);
    const int64_t own = batch.n <= kQrSharedColumns ? qr_space_doubles(batch.n) : 0;
    const size_t bytes = (kQrStage + own) * sizeof(double);
    if (bytes > 48 * 1024) {
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                   name);
    }
    kernel<<<static_cast<unsigned>(batch.batch), kThreads, bytes, stream_of(stream)>>>(batch, workspace);
    launch_check(name);
}

void check_type(DType dtype) {
    if (dtype != DType::f32 && dtype != DType::f64) {
        throw std::invalid_argument("orthogonal_qr: float32 and float64 only");
    }
}

}  // namespace

void qr_cuda(const QrBatch& batch, DType dtype, double* workspace, std::intptr_t stream) {
    check_type(dtype);
    launch(dtype == DType::f32 ? cl_qr_forward<float> : cl_qr_forward<double>, "cl_qr_forward", batch, workspace,
           stream);
}

void qr_backward_cuda(const QrGradients& batch, DType dtype, double* workspace, std::intptr_t stream) {
    check_type(dtype);
    launch(dtype == DType::f32 ? cl_qr_backward<float> : cl_qr_backward<double>, "cl_qr_backward", batch, workspace,
           stream);
}

}  // namespace clk
