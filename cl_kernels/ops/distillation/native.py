"""The compiled CPU form of the losses (csrc/distillation_cpu.cpp): one pass over the rows, shared by the threads."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops.distillation import arguments

__all__ = ["distillation_loss", "dkd_loss", "kl_loss"]

_NO_LOGITS = (0, 0, 0, 0)


def distillation_loss(
    class_logits: Tensor,
    kd_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    temperature: float,
    reduction: int,
    class_grad: bool,
    kd_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms and both gradients."""
    for_class, for_kd = _gradient(class_logits, class_grad), _gradient(kd_logits, kd_grad)
    loss = _run(
        class_logits, kd_logits, teacher_logits, target, weight, first, last, reduction, for_class, for_kd,
        False, (1 - alpha, alpha, 0.0, temperature),
    )  # fmt: skip
    named = {"class_logits": class_logits if alpha < 1 else None, "kd_logits": kd_logits if alpha > 0 else None}
    named["teacher_logits"] = teacher_logits if alpha > 0 else None
    arguments.complain(loss, named, target if alpha < 1 else None, weight, first, last)
    return loss, for_class, for_kd


def kl_loss(
    student: Tensor, teacher: Tensor, first: int, last: int, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, Tensor]:
    for_student = _gradient(student, grad)
    loss = _run(
        None, student, teacher, None, None, first, last, reduction, None, for_student, False,
        (0.0, 1.0, 0.0, temperature),
    )  # fmt: skip
    arguments.complain(loss, {"student": student, "teacher": teacher}, None, None, first, last)
    return loss, for_student


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    for_student = _gradient(student, grad)
    loss = _run(
        None, student, teacher, target, weight, first, last, reduction, None, for_student, True,
        (0.0, beta, alpha, temperature),
    )  # fmt: skip
    arguments.complain(loss, {"student": student, "teacher": teacher}, target, weight, first, last, rest=True)
    return loss, for_student


def _gradient(logits: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if wanted else logits.new_empty(0)


def _run(
    hard: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    first: int,
    last: int,
    reduction: int,
    hard_grad: Tensor | None,
    student_grad: Tensor,
    decoupled: bool,
    numbers: tuple[float, float, float, float],
) -> Tensor:
    rows, columns = student.shape
    work = arguments.work_dtype(student, teacher) if hard is None else arguments.work_dtype(hard, student, teacher)
    loss = student.new_empty((rows,) if reduction == arguments.NONE else (), dtype=work)
    factors = None if weight is None else weight.double().contiguous()
    fields = [
        *(_NO_LOGITS if hard is None else _view(hard)),
        *_view(student),
        *_view(teacher),
        rows,
        columns,
        first,
        columns if last < 0 else last,
        0 if target is None else target.data_ptr(),
        0 if target is None else target.stride(0),
        0 if factors is None else factors.data_ptr(),
        0 if hard_grad is None or not hard_grad.numel() else hard_grad.data_ptr(),
        student_grad.data_ptr() if student_grad.numel() else 0,
        loss.data_ptr(),
        work == torch.float64,
        reduction == arguments.NONE,
        decoupled,
    ]
    numbers_and_scale = (*numbers, arguments.row_scale(rows, reduction))
    _native.load().distillation_cpu(fields, numbers_and_scale, torch.get_num_threads())
    return loss


def _view(logits: Tensor) -> tuple[int, ...]:
    return logits.data_ptr(), _native.DTYPE[logits.dtype], *logits.stride()
