"""The CUDA form of the losses: one launch of the Triton kernel of `kernels.py` for loss and gradients, no waiting."""

from __future__ import annotations

import contextlib
import struct
from typing import Any, Final

import torch
from torch import Tensor

from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.distillation import arguments

__all__ = ["distillation_loss", "dkd_loss", "kl_loss"]

_OLDEST: Final = 80  # compute capability; older ones are compiled for by nobody here
_LARGEST: Final = 2**31 - 4097  # columns and rows are counted in 32 bits
_counters: dict[tuple[int | None, int], Tensor] = {}


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
    loss, for_class, for_kd = _launch(
        class_logits, kd_logits, teacher_logits, target, weight, first, last, reduction, class_grad, kd_grad, False,
        (1 - alpha, alpha, 0.0, temperature),
    )  # fmt: skip
    named = {"class_logits": class_logits if alpha < 1 else None, "kd_logits": kd_logits if alpha > 0 else None}
    named["teacher_logits"] = teacher_logits if alpha > 0 else None
    arguments.complain(loss, named, target if alpha < 1 else None, weight, first, last)
    return loss, for_class, for_kd


def kl_loss(
    student: Tensor, teacher: Tensor, first: int, last: int, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, Tensor]:
    numbers = (0.0, 1.0, 0.0, temperature)
    loss, _, for_student = _launch(
        None, student, teacher, None, None, first, last, reduction, False, grad, False, numbers
    )
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
    numbers = (0.0, beta, alpha, temperature)
    loss, _, for_student = _launch(
        None, student, teacher, target, weight, first, last, reduction, False, grad, True, numbers
    )
    arguments.complain(loss, {"student": student, "teacher": teacher}, target, weight, first, last, rest=True)
    return loss, for_student


def _launch(
    hard: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    first: int,
    last: int,
    reduction: int,
    hard_wanted: bool,
    student_wanted: bool,
    decoupled: bool,
    numbers: tuple[float, float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses in float64 and, but for "none", their sum by the last program; both gradients as far as wanted."""
    _refuse(student)
    rows, columns = student.shape
    z = student if hard is None else hard
    work = arguments.work_dtype(z, student, teacher)
    has_hard, has_soft = hard is not None and numbers[0] > 0, numbers[1] > 0 or numbers[2] > 0
    hard_grad, student_grad = _gradient(z, hard_wanted, has_hard), _gradient(student, student_wanted, has_soft)
    losses = student.new_empty(rows, dtype=torch.float64)
    total = student.new_empty((), dtype=work) if rows else student.new_zeros((), dtype=work)
    with _on(student.device):
        if rows:
            stop = columns if last < 0 else last
            config, kernel = _chosen((z, student, teacher), first, stop, columns, work)
            factors = student if weight is None else weight.double().contiguous()
            kernel[(rows,)](
                z, student, teacher, student if target is None else target, factors,
                hard_grad if hard_wanted else student, student_grad if student_wanted else student,
                losses, total, _counter(student.device), rows, columns, first, stop,
                *z.stride(), *student.stride(), *teacher.stride(), 0 if target is None else target.stride(0),
                int(has_hard), int(has_soft), int(target is not None), int(weight is not None), int(decoupled),
                int(hard_wanted), int(student_wanted), int(reduction != arguments.NONE),
                *(_bits(number) for number in (*numbers, arguments.row_scale(rows, reduction))),
                **dict(config.constants), **config.options(),
            )  # fmt: skip
    return losses.to(work) if reduction == arguments.NONE else total, hard_grad, student_grad


def _chosen(logits: tuple[Tensor, ...], first: int, stop: int, columns: int, work: torch.dtype) -> tuple[Any, Any]:
    """The compiled form for these strides and sizes."""
    from cl_kernels.ops import _triton
    from cl_kernels.ops.distillation import kernels

    student = logits[1]
    name = "fp64" if work == torch.float64 else _triton.dtype_name(student.dtype)
    size = "any"
    if name != "fp64" and all(x.stride(1) == 1 or columns == 1 for x in logits):
        if stop - first <= kernels.NARROW:
            size = "narrow"
        elif all(_is_aligned(x, first, columns) for x in logits):
            size = "wide"
    return kernels.ROWS.choose(_capability(student.device), name, size), kernels.ROWS.kernel


def _is_aligned(x: Tensor, first: int, columns: int) -> bool:
    """Whether every row of the slice starts at a multiple of 8 elements, which 16 bytes of any dtype here are."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and first % 8 == 0 and columns % 8 == 0


def _gradient(logits: Tensor, wanted: bool, computed: bool) -> Tensor:
    if not wanted:
        return logits.new_empty(0)
    make = torch.empty_like if computed else torch.zeros_like
    return make(logits, memory_format=torch.contiguous_format)


def _refuse(x: Tensor) -> None:
    if max(x.shape) > _LARGEST:
        raise Unsupported(f"rows and columns are counted in 32 bits, got {tuple(x.shape)}")
    if 0 < (capability := _capability(x.device)) < _OLDEST:
        raise Unsupported(f"compute capability {capability / 10} is older than {_OLDEST / 10}")


def _capability(device: torch.device) -> int:
    from cl_kernels.ops import _triton

    return _triton.capability(device)


def _counter(device: torch.device) -> Tensor:
    """How many rows are done, 0 between launches: one for each stream, on which launches follow each other.

    While a CUDA graph is captured it is made anew, inside the graph: a replay may run beside other streams.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _counters[key]


def _bits(value: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
