"""Distillation losses over a slice of the classes, and their gradients in closed form from the same pass."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._registry import define, register_autograd
from cl_kernels.ops.distillation import arguments, autograd, cuda, native, reference
from cl_kernels.ops.distillation.chunked import linear_kl_loss

__all__ = ["distillation_loss", "dkd_loss", "jsd_loss", "kl_loss", "linear_kl_loss"]


def _fake_loss(reduction: int, *logits: Tensor) -> Tensor:
    shape = logits[0].shape[:1] if reduction == arguments.NONE else ()
    return logits[0].new_empty(shape, dtype=arguments.work_dtype(*logits))


def _fake_gradient(logits: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if wanted else logits.new_empty(0)


def _fake_distillation(
    class_logits: Tensor, kd_logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None,
    first: int, last: int, alpha: float, temperature: float, reduction: int, class_grad: bool, kd_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = _fake_loss(reduction, class_logits, kd_logits, teacher_logits)
    return loss, _fake_gradient(class_logits, class_grad), _fake_gradient(kd_logits, kd_grad)


def _fake_one(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(rest[-2], student, teacher), _fake_gradient(student, rest[-1])


_distillation = define(
    "distillation_loss",
    "(Tensor class_logits, Tensor kd_logits, Tensor teacher_logits, Tensor target, Tensor? weight, int first, int last,"
    " float alpha, float temperature, int reduction, bool class_grad, bool kd_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.distillation_loss,
    fake=_fake_distillation,
    native_cpu=native.distillation_loss,
    triton=cuda.distillation_loss,
)
register_autograd("distillation_loss", autograd.DISTILLATION.backward, autograd.DISTILLATION.setup_context)

_kl = define(
    "kl_loss",
    "(Tensor student, Tensor teacher, int first, int last, float temperature, int reduction, bool grad)"
    " -> (Tensor, Tensor)",
    reference=reference.kl_loss,
    fake=_fake_one,
    native_cpu=native.kl_loss,
    triton=cuda.kl_loss,
)
register_autograd("kl_loss", autograd.KL.backward, autograd.KL.setup_context)

_dkd = define(
    "dkd_loss",
    "(Tensor student, Tensor teacher, Tensor target, Tensor? weight, int first, int last, float alpha, float beta,"
    " float temperature, int reduction, bool grad) -> (Tensor, Tensor)",
    reference=reference.dkd_loss,
    fake=_fake_one,
    native_cpu=native.dkd_loss,
    triton=cuda.dkd_loss,
)
register_autograd("dkd_loss", autograd.DKD.backward, autograd.DKD.setup_context)

_jsd = define(
    "jsd_loss",
    "(Tensor student, Tensor teacher, int first, int last, float beta, float temperature, int reduction, bool grad)"
    " -> (Tensor, Tensor)",
    reference=reference.jsd_loss,
    fake=_fake_one,
)
register_autograd("jsd_loss", autograd.JSD.backward, autograd.JSD.setup_context)

_IN_EAGER: Final = {
    _distillation: autograd.DISTILLATION.eager(),
    _kl: autograd.KL.eager(),
    _dkd: autograd.DKD.eager(),
    _jsd: autograd.JSD.eager(),
}


def distillation_loss(
    class_logits: Tensor,
    kd_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    classes: slice | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
) -> Tensor:
    """Hard loss of one head and distillation of another: (1 - alpha) CE(z_c, y) + alpha T^2 KL(p_T || p_S).

    p_T and p_S are the softmax of teacher_logits / T and kd_logits / T, CE has no temperature, and all of them see only
    the columns of `classes`; `target` [B] holds class indices of the whole head that lie in it. Nothing else is hidden
    in it: alpha = 0 is the plain cross-entropy (the KL is not computed), alpha = 1 is `kl_loss`. Pass the same tensor
    twice to distil the head that also learns the labels.

    Logits [B, C] in float32, float64, bfloat16 or float16, each its own dtype and strides (views are not copied); the
    loss is float64 where any of them is, else float32. `reduction`: "batchmean", the sum over B rows divided by B;
    "sum"; "none", one number a row. Rows whose target is `ignore_index` count in neither term nor in the mean. An
    empty batch has loss 0. -inf masks a class: it has probability 0 and gradient 0, and the loss is infinite where the
    teacher holds possible what the student masks.

    Differentiable in class_logits and kd_logits, twice; gradients outside of `classes` are exactly 0. Raises
    `ValueError` for sizes that differ, an empty slice, a temperature that is not within (0, inf), alpha not within
    [0, 1] or a teacher that requires a gradient; on the CPU also `ValueError` for a target outside of `classes` and
    `NonFiniteError` for NaN, +inf or a row without a finite class. On CUDA these make the loss NaN: to look at values
    would wait for the device.

    Cost: one pass, 3 exponentials an element; keeps the logits and both gradients until the backward. Source: Hinton
    et al. (2015); KDP (arXiv 2407.13911), official code.
    """
    arguments.logits_pair("kd_logits", kd_logits, "teacher_logits", teacher_logits)
    arguments.logits_pair("kd_logits", kd_logits, "class_logits", class_logits)
    arguments.constant("teacher_logits", teacher_logits)
    index = arguments.targets(target, kd_logits.shape[0], "kd_logits", kd_logits)
    first, last = arguments.slice_of(classes, kd_logits.shape[1])
    _checks.number("alpha", alpha, 0.0, 1.0)
    heat, code = arguments.positive("temperature", temperature), arguments.reduction_code(reduction)
    weight = arguments.kept_rows(
        index, ignore_index, code, arguments.work_dtype(class_logits, kd_logits, teacher_logits)
    )
    wanted = (_wants(class_logits), _wants(kd_logits))
    given = (class_logits, kd_logits, teacher_logits, index, weight, first, last, float(alpha), heat, code)
    return _loss(_distillation, any(wanted), *given, *wanted)


def kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    classes: slice | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the columns of `classes`, from logits [B, C].

    `torch.nn.functional.kl_div(log_softmax(student / T, -1), log_softmax(teacher / T, -1), log_target=True,
    reduction="batchmean") * T**2`, in one pass. Shapes, dtypes, masks, reductions, gradients (of the student, twice)
    and errors as for `distillation_loss`. Source: Hinton et al. (2015).
    """
    arguments.logits_pair("student", student, "teacher", teacher)
    arguments.constant("teacher", teacher)
    first, last = arguments.slice_of(classes, student.shape[1])
    heat, code = arguments.positive("temperature", temperature), arguments.reduction_code(reduction)
    wanted = _wants(student)
    return _loss(_kl, wanted, student, teacher, first, last, heat, code, wanted)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    classes: slice | None = None,
    alpha: float = 1.0,
    beta: float = 4.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
) -> Tensor:
    """Decoupled distillation, T^2 (alpha KL of (target, rest) + beta KL within the rest), over `classes`.

    The first divergence is between the two-way distributions (p_y, 1 - p_y), the second between the softmaxes of all
    classes but the target, both of logits / T and in log space: a target that holds all probability loses nothing. With
    the defaults, times its own weight a, it is the a [TCKD + 4 NCKD] of the KDP code; alpha = 1, beta = 8 is the
    original. At least two classes, at least one of them finite beside the target. No hard loss in it. The rest as for
    `distillation_loss`. Source: Zhao et al. (2022).
    """
    arguments.logits_pair("student", student, "teacher", teacher)
    arguments.constant("teacher", teacher)
    index = arguments.targets(target, student.shape[0], "student", student)
    first, last = arguments.slice_of(classes, student.shape[1], least=2)
    parts = [
        _checks.number(name, value, 0.0, math.inf, closed=False) for name, value in (("alpha", alpha), ("beta", beta))
    ]
    heat, code = arguments.positive("temperature", temperature), arguments.reduction_code(reduction)
    weight = arguments.kept_rows(index, ignore_index, code, arguments.work_dtype(student, teacher))
    wanted = _wants(student)
    return _loss(_dkd, wanted, student, teacher, index, weight, first, last, *parts, heat, code, wanted)


def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    classes: slice | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Generalised Jensen-Shannon divergence, T^2 (beta KL(p_T || m) + (1 - beta) KL(p_S || m)).

    m = beta p_T + (1 - beta) p_S. beta = 0 is KL(p_T || p_S), that is `kl_loss`, and beta = 1 the reverse
    KL(p_S || p_T); between them it is finite whatever is masked. T^2 is explicit, as everywhere here. The rest as for
    `kl_loss`. Source: Agarwal et al. (2024), generalised knowledge distillation.
    """
    arguments.logits_pair("student", student, "teacher", teacher)
    arguments.constant("teacher", teacher)
    first, last = arguments.slice_of(classes, student.shape[1])
    part = _checks.number("beta", beta, 0.0, 1.0)
    heat, code = arguments.positive("temperature", temperature), arguments.reduction_code(reduction)
    wanted = _wants(student)
    return _loss(_jsd, wanted, student, teacher, first, last, part, heat, code, wanted)


def _loss(op: Any, differentiable: bool, *inputs: Any) -> Tensor:
    """The first output of the operation; compilers trace it, eager calls take the shorter way to the same gradient."""
    short = differentiable and not torch.compiler.is_compiling()
    loss: Tensor = (_IN_EAGER[op].apply if short else op)(*inputs)[0]
    return loss


def _wants(logits: Tensor) -> bool:
    """Whether the gradient is worth writing."""
    return torch.is_grad_enabled() and logits.requires_grad
