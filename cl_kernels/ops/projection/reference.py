"""The formulas of the room in plain torch: short, slow on purpose, right in float64.

    U <- P_left U P_right,   P = identity I - span V V^T   or a dense P
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

__all__ = ["BASIS", "DENSE", "NONE", "apply_left", "apply_right", "matrix_shape", "project", "projected_adam_step_"]

NONE, BASIS, DENSE = 0, 1, 2  # how one side of a parameter is given

Scale = float | Tensor


def matrix_shape(shape: Sequence[int], left: int | None, right: int | None) -> tuple[int, int, int] | None:
    """(batch, m, d): how a parameter is seen by projectors of sizes `left` and `right`; None if they do not fit.

    The last two dimensions are the matrix; a vector is one row; a weight [out, c, kh, kw] whose projectors do not fit
    its last two dimensions is [out, c kh kw].
    """
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


def apply_right(x: Tensor, matrix: Tensor, identity: Scale, span: Scale, form: int) -> Tensor:
    """`x P`; costs 4 m d r operations with a basis, 2 m d^2 with a dense P."""
    if form == DENSE:
        return x @ matrix
    scaled = over(identity) * x
    return scaled - over(span) * ((x @ matrix) @ matrix.mT) if matrix.shape[-1] else scaled


def apply_left(x: Tensor, matrix: Tensor, identity: Scale, span: Scale, form: int) -> Tensor:
    """`P x`."""
    if form == DENSE:
        return matrix @ x
    scaled = over(identity) * x
    return scaled - over(span) * (matrix @ (matrix.mT @ x)) if matrix.shape[-1] else scaled


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
        x = apply_right(x, right.to(work), cast(right_identity, work), cast(right_span, work), right_form)
    if left is not None:
        x = apply_left(x, left.to(work), cast(left_identity, work), cast(left_span, work), left_form)
    x = x.to(update.dtype)
    return x.clone() if x is update else x  # the dispatcher's schema says: a fresh tensor


def cast(scale: Tensor | None, dtype: torch.dtype) -> Scale:
    """A missing scale (dense form) is never used."""
    return 1.0 if scale is None else scale.to(dtype)


def projected_adam_step_(*arguments: Any) -> None:
    """The whole step, one parameter after the other; arithmetic in the moments' dtype, at least float32."""
    s = Step(*arguments)
    distinct(s)
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
            target.copy_(value if skip is None else torch.where(skip.to(value.device) != 0, target, value))


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
        x = apply_right(x, right.to(update.dtype), a[2], a[3], forms[1])
    if left is not None:
        x = apply_left(x, left.to(update.dtype), a[0], a[1], forms[0])
    return x.reshape(update.shape)
