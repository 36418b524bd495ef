"""Gradient of `project`, written in differentiable operations so that it has a gradient in turn.

For Y = P_l U P_r with upstream G, one side P = a I - b V V^T acting on X from the right with upstream H gives
    dU = P_l^T G P_r^T     da = <H, X>     db = -<H V, X V>     dV = -b (X^T H V + H^T X V)     dP = X^T H  (dense)
where X = U, H = P_l^T G on the right, and X = (U P_r)^T, H = G^T, P^T in place of P on the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.projection.reference import BASIS, DENSE, apply_right, cast, over

__all__ = ["backward", "setup_context"]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    update, left, left_identity, left_span, left_form, right, right_identity, right_span, right_form = inputs
    ctx.save_for_backward(update, left, left_identity, left_span, right, right_identity, right_span)
    ctx.forms = (left_form, right_form)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    update, left, left_identity, left_span, right, right_identity, right_span = ctx.saved_tensors
    left_form, right_form = ctx.forms
    if left is not None and left_form == DENSE:
        left = left.mT
    work = torch.promote_types(update.dtype, torch.float32)
    x, g = update.to(work), grad.to(work)
    h = _apply(g.mT, left, left_identity, left_span, left_form, transpose=True).mT
    z = _apply(x, right, right_identity, right_span, right_form)
    d_update = _apply(h, right, right_identity, right_span, right_form, transpose=True)
    d_left, *d_left_scales = _side(z.mT, g.mT, left, left_identity, left_span, left_form)
    d_right = _side(x, h, right, right_identity, right_span, right_form)
    if d_left is not None and left_form == DENSE:
        d_left = d_left.mT
    d_update = d_update.sum_to_size(update.shape).to(update.dtype)
    return (d_update, d_left, *d_left_scales, None, *d_right, None)


def _apply(
    x: Tensor, matrix: Tensor | None, identity: Tensor | None, span: Tensor | None, form: int, transpose: bool = False
) -> Tensor:
    """`x P`, or `x P^T`; the basis form is symmetric."""
    if matrix is None:
        return x
    p = matrix.to(x.dtype)
    return apply_right(
        x, p.mT if transpose and form == DENSE else p, cast(identity, x.dtype), cast(span, x.dtype), form
    )


def _side(
    x: Tensor, h: Tensor, matrix: Tensor | None, identity: Tensor | None, span: Tensor | None, form: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of one side's matrix, identity and span."""
    if matrix is None:
        return None, None, None
    if form != BASIS or identity is None or span is None:
        return (x.mT @ h).sum_to_size(matrix.shape).to(matrix.dtype), None, None
    v = matrix.to(x.dtype)
    hv, xv = h @ v, x @ v
    d_matrix = -over(span.to(x.dtype)) * (x.mT @ hv + h.mT @ xv)
    d_identity = (h * x).sum(dim=(-2, -1)).sum_to_size(identity.shape).to(identity)
    d_span = -(hv * xv).sum(dim=(-2, -1)).sum_to_size(span.shape).to(span)
    return d_matrix.sum_to_size(matrix.shape).to(matrix.dtype), d_identity, d_span
