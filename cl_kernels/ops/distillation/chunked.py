"""KL between the softmaxes of two linear heads, a chunk of rows at a time: the logits are never whole.

Logits of a chunk, their KL and its gradient, and the products that bring the gradient to the features, the weight and
the bias, all in the forward pass; what is kept for the backward has the sizes of these three.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._registry import define, register_autograd
from cl_kernels.ops.distillation import arguments

__all__ = ["linear_kl_loss"]

_ELEMENTS: Final = 1 << 22  # logits of a chunk: 16 MB in float32, beside products that are long enough to be fast


def linear_kl_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    classes: slice | None = None,
    reduction: str = "batchmean",
    rows_at_once: int | None = None,
) -> Tensor:
    """`kl_loss(student @ student_weight^T + bias, teacher @ teacher_weight^T + bias)` without ever holding the logits.

    student [N, D] and student_weight [C, D], teacher [N, E] and teacher_weight [C, E], biases [C]; each side in one
    float dtype of its own. For heads so wide that N x C logits of both models do not fit: the distillation of every
    token, 1e8 logits and more. `rows_at_once` (None: 4 million logits) sets the memory; weight gradients are summed in
    float32 at least, in the order of the rows. `reduction`: "batchmean" or "sum"; the rest as for `kl_loss`.

    Differentiable once in student, student_weight and student_bias; `create_graph` raises `NotImplementedError`.
    Raises `ValueError` for sizes that do not fit and for a teacher's tensor that requires a gradient. Cost: 2 N C (2 D
    + E) operations more than `kl_loss` in the forward pass, nothing in the backward. Source: Liger-Kernel's
    chunked losses, for the idea.
    """
    rows = _side("student", student, "student_weight", student_weight, "student_bias", student_bias)
    others = _side("teacher", teacher, "teacher_weight", teacher_weight, "teacher_bias", teacher_bias)
    if rows != others:
        raise ValueError(f"teacher: expected {rows} rows as student, got {others}")
    columns = student_weight.shape[0]
    if teacher_weight.shape[0] != columns:
        raise ValueError(
            f"teacher_weight: expected as many classes as student_weight {tuple(student_weight.shape)}, "
            f"got {tuple(teacher_weight.shape)}"
        )
    _checks.same_device("student", student, "teacher", teacher)
    for name, value in (("teacher", teacher), ("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
        if value is not None:
            arguments.constant(name, value)
    first, last = arguments.slice_of(classes, columns)
    heat, code = arguments.positive("temperature", temperature), arguments.reduction_code(reduction)
    if code == arguments.NONE:
        raise ValueError('reduction: expected one of sum, batchmean, got "none"')
    if rows_at_once is not None and (not isinstance(rows_at_once, int) or rows_at_once < 1):
        raise ValueError(f"rows_at_once: expected None or a whole number >= 1, got {rows_at_once!r}")
    part = slice(first, None if last < 0 else last)
    heads = [None if x is None else x[part] for x in (student_weight, student_bias, teacher_weight, teacher_bias)]
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, *heads[:2])]
    given = (student, heads[0], heads[1], teacher, heads[2], heads[3])
    loss: Tensor = _linear_kl(*given, heat, code, rows_at_once or 0, *wanted)[0]
    return loss


def _side(name: str, x: Any, weight_name: str, weight: Any, bias_name: str, bias: Any) -> int:
    """The rows of one model's features, if they fit its head."""
    _checks.floating(name, x, torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if x.ndim != 2:
        raise ValueError(f"{name}: expected shape [N, D], got {tuple(x.shape)}")
    _checks.floating(weight_name, weight, x.dtype)
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{weight_name}: expected shape [C, {x.shape[1]}], got {tuple(weight.shape)}")
    _checks.same_device(name, x, weight_name, weight)
    if bias is not None:
        _checks.floating(bias_name, bias, x.dtype)
        _checks.vector(bias_name, bias, weight.shape[0])
        _checks.same_device(name, x, bias_name, bias)
    return int(x.shape[0])


def _forward(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    temperature: float,
    reduction: int,
    rows_at_once: int,
    for_student: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = len(student), len(weight)
    work = arguments.work_dtype(student, teacher)
    wide = torch.promote_types(student.dtype, torch.float32)
    loss = student.new_zeros((), dtype=torch.float64)
    d_student = torch.empty_like(student, memory_format=torch.contiguous_format) if for_student else _nothing(student)
    d_weight = weight.new_zeros(weight.shape, dtype=wide) if for_weight else _nothing(student)
    d_bias = weight.new_zeros(columns, dtype=wide) if for_bias else _nothing(student)
    some = for_student or for_weight or for_bias
    scale = arguments.row_scale(rows, reduction)
    with torch.autocast(student.device.type, enabled=False):
        for x, y, begin in _chunks(student, teacher, rows_at_once or max(1, _ELEMENTS // columns)):
            logits = torch.nn.functional.linear(x, weight, bias)
            wanted = torch.nn.functional.linear(y, teacher_weight, teacher_bias)
            part, g = torch.ops.cl_kernels.kl_loss(logits, wanted, 0, -1, temperature, arguments.SUM, some)
            loss += part
            if for_student:
                d_student[begin : begin + len(x)] = (g @ weight) * scale
            if for_weight:
                d_weight += g.mT @ x
            if for_bias:
                d_bias += g.sum(0, dtype=wide)
    d_weight, d_bias = (d.mul_(scale).to(student.dtype) for d in (d_weight, d_bias))
    return loss.mul_(scale).to(work), d_student, d_weight, d_bias


def _chunks(student: Tensor, teacher: Tensor, rows: int) -> Any:
    pairs = zip(student.split(rows), teacher.split(rows), strict=True) if len(student) else ()
    return ((x, y, i * rows) for i, (x, y) in enumerate(pairs))


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [
        like.new_empty(like.shape) if wanted and like is not None else _nothing(student)
        for like, wanted in zip((student, weight, bias), rest[-3:], strict=True)
    ]
    return student.new_empty((), dtype=arguments.work_dtype(student, teacher)), made[0], made[1], made[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, above: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if above is not None and torch.is_grad_enabled():
        raise NotImplementedError("linear_kl_loss has no second derivative; use kl_loss on the logits")
    needed = ctx.needs_input_grad[:3]
    made = [
        (g * above).to(g.dtype) if n and above is not None else None
        for g, n in zip(ctx.saved_tensors, needed, strict=True)
    ]
    return (*made, *[None] * 9)


_linear_kl = define(
    "linear_kl_loss",
    "(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, Tensor teacher_weight, Tensor? teacher_bias,"
    " float temperature, int reduction, int rows_at_once, bool for_student, bool for_weight, bool for_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
)
register_autograd("linear_kl_loss", _backward, _setup)
