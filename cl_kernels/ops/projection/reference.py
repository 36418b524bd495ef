"""The formulas of the room in plain torch: short, slow on purpose, right in float64.

    U <- P_left U P_right,   P = identity I - span V V^T   or a dense P
                             P = (identity - span) I + span (I - V V^T)^2   where V is 16-bit
    u  = -lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)   [ - lr wd p when decay is decoupled ]
    p <- p + P_left u P_right                           (method-null-space 6; moments see the raw gradient)

No value is read on the host, so the reference may be captured and compiled like the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.projection.arguments import Step, distinct

__all__ = [
    "BASIS",
    "DENSE",
    "NONE",
    "TWICE",
    "apply_left",
    "apply_right",
    "matrix_shape",
    "passes",
    "project",
    "projected_adam_step_",
]

NONE, BASIS, DENSE = 0, 1, 2  # how one side of a parameter is given
TWICE = 3  # how the kernels are told of a basis that is applied twice

Scale = float | Tensor


def matrix_shape(shape: Sequence[int], left: int | None, right: int | None) -> tuple[int, int, int] | None:
    """(batch, m, d): how a parameter is seen by projectors of sizes `left` and `right`; None if they do not fit.

    The last two dimensions are the matrix; a vector is one row; a weight [out, c, kh, kw] whose projectors do not fit
    its last two dimensions is [out, c kh kw].
    """
    if len(shape) == 2:
        return (1, shape[0], shape[1]) if left in (None, shape[0]) and right in (None, shape[1]) else None
    if len(shape) == 0:
        return None
    rows, columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    if left in (None, rows) and right in (None, columns):
        batch = 1
        for size in shape[:-2]:
            batch *= size
        return batch, rows, columns
    flat = 1
    for size in shape[1:]:
        flat *= size
    if len(shape) > 2 and left in (None, shape[0]) and right in (None, flat):
        return 1, shape[0], flat
    return None


def passes(basis: Tensor) -> int:
    """How often a basis is applied: twice where it is orthonormal, or multiplied, to three digits only.

    That is V in 16 bits, and products in TF32. What one pass leaves in the span of V, the second removes: energy 11 to
    124 times the exact one after one pass in bfloat16, 0.9996 to 1.004 after two (performance.md 5).
    """
    if basis.dtype in (torch.float16, torch.bfloat16):
        return 2
    coarse = basis.is_cuda and basis.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return 2 if coarse else 1


def apply_right(x: Tensor, matrix: Tensor, identity: Scale, span: Scale, form: int) -> Tensor:
    """`x P` in x's dtype; costs 4 m d r operations a pass with a basis, 2 m d^2 with a dense P."""
    v = matrix.to(x.dtype)
    if form == DENSE:
        return x @ v
    if not v.shape[-1]:
        return over(identity) * x
    if passes(matrix) == 1:
        return over(identity) * x - over(span) * ((x @ v) @ v.mT)
    rest = x - (x @ v) @ v.mT
    rest = rest - (rest @ v) @ v.mT
    return (over(identity) - over(span)) * x + over(span) * rest


def apply_left(x: Tensor, matrix: Tensor, identity: Scale, span: Scale, form: int) -> Tensor:
    """`P x`."""
    return apply_right(x.mT, matrix.mT if form == DENSE else matrix, identity, span, form).mT


def over(scale: Scale) -> Scale:
    """A batch of scales, ready to multiply matrices."""
    return scale[..., None, None] if isinstance(scale, Tensor) and scale.ndim else scale


def project(
    update: Tensor,
    left: Tensor | None,
    left_identity: Tensor | None,
    left_span: Tensor | None,
    left_form: int,
    right: Tensor | None,
    right_identity: Tensor | None,
    right_span: Tensor | None,
    right_form: int,
) -> Tensor:
    """The functional operation; 16-bit updates are computed in float32."""
    work = torch.promote_types(update.dtype, torch.float32)
    x = update.to(work)
    if right is not None:
        x = apply_right(x, right, cast(right_identity, work), cast(right_span, work), right_form)
    if left is not None:
        x = apply_left(x, left, cast(left_identity, work), cast(left_span, work), left_form)
    x = x.to(update.dtype)
    # The dispatcher's schema says: a fresh tensor; the fake kernel says: a contiguous one.
    return x.clone(memory_format=torch.contiguous_format) if x is update else x.contiguous()


def cast(scale: Tensor | None, dtype: torch.dtype) -> Scale:
    """A missing scale (dense form) is never used."""
    return 1.0 if scale is None else scale.to(dtype)


def projected_adam_step_(*arguments: Any) -> None:
    """The whole step in the moments' dtype, at least float32; all new values are made before the first is written."""
    s = Step(*arguments)
    distinct(s)
    made: list[tuple[Tensor, Tensor]] = []
    rate: Scale = s.lr if s.lr_tensor is None else s.lr_tensor.double()
    for i, param in enumerate(s.params):
        work = torch.promote_types(s.exp_avgs[i].dtype, torch.float32)
        weight, grad = param.to(work), s.grads[i].to(work)
        if s.grad_scale is not None:
            grad = grad / s.grad_scale.to(work)
        if s.maximize:
            grad = -grad
        if s.weight_decay and not s.decoupled_weight_decay:
            grad = grad + s.weight_decay * weight
        step = s.steps[i] + 1
        exp_avg = s.beta1 * s.exp_avgs[i].to(work) + (1 - s.beta1) * grad
        exp_avg_sq = s.beta2 * s.exp_avg_sqs[i].to(work) + (1 - s.beta2) * grad * grad
        most = s.max_exp_avg_sqs[i : i + 1]  # empty without amsgrad
        largest = torch.maximum(most[0].to(work), exp_avg_sq) if most else exp_avg_sq
        update = -_corrected(exp_avg, largest, step.double(), rate, s.beta1, s.beta2, s.eps)
        if s.weight_decay and s.decoupled_weight_decay:
            decay = rate * s.weight_decay * weight
            update, weight = (update - decay, weight) if s.project_decay else (update, weight - decay)
        update = _projected(update, i, s)
        new = [torch.where(update == 0, weight, weight + update)]  # -0.0 + 0.0 would lose the sign
        new += [exp_avg, exp_avg_sq, step, largest]
        for target, value in zip((param, s.exp_avgs[i], s.exp_avg_sqs[i], s.steps[i], *most), new, strict=False):
            skip = s.found_inf
            kept = value if skip is None else torch.where(skip.to(value.device).reshape(()) != 0, target, value)
            made.append((target, kept))
    for target, value in made:
        target.copy_(value)


def _corrected(m: Tensor, v: Tensor, step: Tensor, lr: Scale, beta1: float, beta2: float, eps: float) -> Tensor:
    """lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), and 0 where m is 0 (so that eps = 0 is usable)."""
    rate = lr / (1 - beta1**step)
    direction = m / (v.sqrt() / (1 - beta2**step).sqrt().to(v.dtype) + eps)
    return rate.to(m.dtype) * torch.where(m == 0, m, direction)


def _projected(update: Tensor, i: int, step: Step) -> Tensor:
    left, right, forms = step.left[i], step.right[i], step.forms[2 * i : 2 * i + 2]
    shape = matrix_shape(update.shape, *(None if s is None else s.shape[-2] for s in (left, right)))
    if shape is None:
        raise ValueError(f"params[{i}]: its projectors do not fit shape {tuple(update.shape)}")
    batch, rows, columns = shape
    flat = batch == 1 and update.ndim > 2 and (rows, columns) != tuple(update.shape[-2:])
    x = update.reshape(rows, columns) if flat or update.ndim < 2 else update
    a: list[Scale] = list(step.scales[4 * i : 4 * i + 4])
    if step.device_scales is not None:
        a = list(step.device_scales[i].to(update.dtype).unbind())
    if right is not None:
        x = apply_right(x, right, a[2], a[3], forms[1])
    if left is not None:
        x = apply_left(x, left, a[0], a[1], forms[0])
    return x.reshape(update.shape)
