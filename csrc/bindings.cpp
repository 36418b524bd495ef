// The one Python module, cl_kernels._C: every entry point of every room, and what was built.
//
// Entry points take addresses (Tensor.data_ptr()) as integers, sizes and strides as int64 in elements, dtype codes of
// common/dtype.h, a thread count on the CPU and the current stream as an integer on CUDA. They release the GIL, return
// nothing, free nothing, never synchronise, and report failure by throwing. All checking is done in Python, before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "build_config.h"
#include "common/abi.h"
#include "common/simd.h"
#include "common/tensor_view.h"
#include "covariance.h"
#include "distillation.h"
#include "orthogonal_qr.h"
#include "projection.h"
#include "weight_projection.h"

namespace py = pybind11;

namespace {

const char* name_of(clk::Isa isa) {
    return isa == clk::Isa::avx512 ? "avx512" : isa == clk::Isa::avx2 ? "avx2" : "base";
}

py::dict build_info() {
    py::dict info;
    info["abi"] = clk::kAbi;
    info["compiler"] = CLK_CXX;
    info["flags"] = CLK_CXX_FLAGS;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = py::none();
#endif
#ifdef CLK_CUDA
    info["cuda"] = true;
    info["cuda_compiler"] = CLK_NVCC;
    info["cuda_flags"] = CLK_NVCC_FLAGS;
    info["cuda_archs"] = CLK_CUDA_ARCHS;
#else
    info["cuda"] = false;
#endif
    info["cpu_detected"] = name_of(clk::detected_isa());
    info["cpu_used"] = name_of(clk::isa());
    return info;
}

// -- covariance: each problem is the fields of GramProblem in their order ---------------------------------------------
void update_grams(const std::vector<std::array<int64_t, 13>>& fields, double alpha, double beta, int threads) {
    const py::gil_scoped_release release;
    std::vector<clk::GramProblem> problems;
    for (const auto& f : fields) {
        const auto dtype = [](int64_t code) { return static_cast<clk::DType>(code); };
        problems.push_back({clk::pointer<void>(f[0]), f[1], dtype(f[2]), f[3], clk::pointer<void>(f[4]), dtype(f[5]),
                            f[6], f[7], f[8], f[9], f[10], clk::pointer<void>(f[11]), clk::pointer<double>(f[12])});
    }
    clk::update_grams(problems, alpha, beta, threads);
}

// -- distillation: the fields and numbers of DistillationBatch in their order -----------------------------------------
void distillation_cpu(const std::array<int64_t, 25>& fields, const std::array<double, 5>& numbers, int threads) {
    const py::gil_scoped_release release;
    clk::distillation_cpu(clk::distillation_batch(fields, numbers), threads);
}

// -- projection: the flat lists of projection.h, then the settings of AdamSettings ------------------------------------
void projected_adam_cpu(const std::vector<std::intptr_t>& pointers, const std::vector<int64_t>& sizes,
                        const std::vector<double>& numbers, double lr, double beta1, double beta2, double eps,
                        double weight_decay, bool decoupled, bool project_decay, double grad_factor, int threads) {
    const py::gil_scoped_release release;
    const clk::AdamSettings settings{lr, beta1, beta2, eps, weight_decay, decoupled, project_decay, grad_factor};
    clk::projected_adam_cpu(clk::projected_parameters(pointers, sizes, numbers), settings, threads);
}

#ifdef CLK_CUDA
// part: 0 everything, for small parameters; 1 the update of large ones into the workspace; 2 the update onto the
// weights.
void projected_adam_cuda(int part, const std::vector<std::intptr_t>& pointers, const std::vector<int64_t>& sizes,
                         const std::vector<double>& numbers, double lr, double beta1, double beta2, double eps,
                         double weight_decay, bool decoupled, bool project_decay, double grad_factor,
                         std::intptr_t lr_tensor, bool lr_is_double, std::intptr_t grad_scale, std::intptr_t found_inf,
                         std::intptr_t scales, bool whole, std::intptr_t workspace, std::intptr_t stream) {
    const py::gil_scoped_release release;
    const clk::AdamSettings settings{lr, beta1, beta2, eps, weight_decay, decoupled, project_decay, grad_factor};
    const clk::StepTensors tensors{clk::pointer<const void>(lr_tensor),   lr_is_double,
                                   clk::pointer<const float>(grad_scale), clk::pointer<const float>(found_inf),
                                   clk::pointer<const double>(scales),    whole};
    const std::vector<clk::ProjectedParameter> parameters = clk::projected_parameters(pointers, sizes, numbers);
    const auto step = part == 0   ? clk::projected_adam_cuda
                      : part == 1 ? clk::projected_adam_elements_cuda
                                  : clk::projected_adam_apply_cuda;
    step(parameters, settings, tensors, clk::pointer<void>(workspace), stream);
}
#endif

// -- orthogonal_qr: the fields of QrBatch and QrGradients in their order ----------------------------------------------
void qr_cpu(const std::array<int64_t, 12>& fields, int dtype, int threads) {
    const py::gil_scoped_release release;
    clk::qr_cpu(clk::qr_batch(fields), static_cast<clk::DType>(dtype), threads);
}

void qr_backward_cpu(const std::array<int64_t, 15>& fields, int dtype, int threads) {
    const py::gil_scoped_release release;
    clk::qr_backward_cpu(clk::qr_gradients(fields), static_cast<clk::DType>(dtype), threads);
}

#ifdef CLK_CUDA
void qr_cuda(const std::array<int64_t, 12>& fields, int dtype, std::intptr_t workspace, std::intptr_t stream) {
    const py::gil_scoped_release release;
    clk::qr_cuda(clk::qr_batch(fields), static_cast<clk::DType>(dtype), clk::pointer<double>(workspace), stream);
}

void qr_backward_cuda(const std::array<int64_t, 15>& fields, int dtype, std::intptr_t workspace, std::intptr_t stream) {
    const py::gil_scoped_release release;
    clk::qr_backward_cuda(clk::qr_gradients(fields), static_cast<clk::DType>(dtype), clk::pointer<double>(workspace),
                          stream);
}
#endif

// -- weight_projection: the flat lists of weight_projection.h, then the fields of BaseSettings and RadiusRule ---------
void ftp_step_cpu(const std::vector<std::intptr_t>& pointers, const std::vector<int64_t>& sizes,
                  const std::vector<double>& numbers, int kind, double lr, double weight_decay, double beta1,
                  double beta2, double eps, bool flag, double grad_factor, double kappa, double floor, bool masked,
                  int norm, int threads) {
    const py::gil_scoped_release release;
    const clk::BaseSettings base{
        static_cast<clk::BaseKind>(kind), lr, weight_decay, beta1, beta2, eps, flag, grad_factor};
    const clk::RadiusRule rule{kappa, floor, masked, static_cast<clk::RowNorm>(norm)};
    clk::ftp_step_cpu(clk::anchored_parameters(pointers, sizes, numbers), base, rule, threads);
}

// Each tensor is the fields of AnchoredRows in their order.
void anchored_rows_cpu(const std::vector<std::array<int64_t, 9>>& fields, int task, int norm, int threads) {
    const py::gil_scoped_release release;
    std::vector<clk::AnchoredRows> tensors;
    for (const auto& f : fields) {
        tensors.push_back({static_cast<clk::DType>(f[0]), static_cast<clk::DType>(f[1]), clk::pointer<void>(f[2]),
                           clk::pointer<const void>(f[3]), clk::pointer<void>(f[4]), clk::pointer<double>(f[5]), f[6],
                           f[7], f[8]});
    }
    clk::anchored_rows_cpu(tensors, static_cast<clk::RowsTask>(task), static_cast<clk::RowNorm>(norm), threads);
}

#ifdef CLK_CUDA
void ftp_step_cuda(const std::vector<std::intptr_t>& pointers, const std::vector<int64_t>& sizes,
                   const std::vector<double>& numbers, int kind, double lr, double weight_decay, double beta1,
                   double beta2, double eps, bool flag, double grad_factor, double kappa, double floor, bool masked,
                   int norm, std::intptr_t lr_tensor, bool lr_is_double, std::intptr_t grad_scale,
                   std::intptr_t found_inf, std::intptr_t workspace, std::intptr_t stream) {
    const py::gil_scoped_release release;
    const clk::BaseSettings base{
        static_cast<clk::BaseKind>(kind), lr, weight_decay, beta1, beta2, eps, flag, grad_factor};
    const clk::RadiusRule rule{kappa, floor, masked, static_cast<clk::RowNorm>(norm)};
    const clk::FtpTensors tensors{clk::pointer<const void>(lr_tensor), lr_is_double,
                                  clk::pointer<const float>(grad_scale), clk::pointer<const float>(found_inf)};
    clk::ftp_step_cuda(clk::anchored_parameters(pointers, sizes, numbers), base, rule, tensors,
                       clk::pointer<void>(workspace), stream);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native half of cl_kernels; reached through cl_kernels.ops only.";
    m.def("abi_version", [] { return clk::kAbi; });
    m.def("build_info", &build_info);
    m.def(
        "limit_isa",
        [](int level) { clk::isa_limit().store(std::clamp(level, 0, static_cast<int>(clk::Isa::avx512))); },
        "Use at most this instruction set from now on: 0 base, 1 AVX2, 2 AVX-512.", py::arg("level"));

    // Rooms, in the order of architecture: one block each.

    m.def("update_grams", &update_grams);
    m.def("distillation_cpu", &distillation_cpu);
    m.def("projected_adam_cpu", &projected_adam_cpu);
    m.def("qr_cpu", &qr_cpu);
    m.def("qr_backward_cpu", &qr_backward_cpu);
    m.def("ftp_step_cpu", &ftp_step_cpu);
    m.def("anchored_rows_cpu", &anchored_rows_cpu);
#ifdef CLK_CUDA
    m.def("projected_adam_cuda", &projected_adam_cuda);
    m.def("qr_workspace", &clk::qr_workspace);
    m.def("qr_cuda", &qr_cuda);
    m.def("qr_backward_cuda", &qr_backward_cuda);
    m.def("ftp_step_cuda", &ftp_step_cuda);
#endif
}
