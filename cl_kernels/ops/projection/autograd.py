"""Gradient of `project`, written in differentiable operations so that it has a gradient in turn.

For Y = P_l U P_r with upstream G, one side P = a I - b V V^T acting on X from the right with upstream H gives
    dU = P_l^T G P_r^T     da = <H, X>     db = -<H V, X V>     dV = -b (X^T H V + H^T X V)     dP = X^T H  (dense)
and for a basis that is applied twice, P = a I - b V C V^T with C = 2 I - V^T V and K = X^T H V + H^T X V,
    db = -<H V, X V C>     dV = -b (K C - V V^T K)
where X = U, H = P_l^T G on the right, and X = (U P_r)^T, H = G^T, P^T in place of P on the left. Only what is asked for
is computed: the scales of a plain `Projector` are numbers on the host, and their gradients would wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.projection.reference import BASIS, DENSE, apply_right, cast, over, passes

__all__ = ["backward", "setup_context"]

Side = tuple[Tensor | None, Tensor | None, Tensor | None]
_NOTHING: Side = (None, None, None)


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
    for_update, for_left, for_right = ctx.needs_input_grad[0], ctx.needs_input_grad[1:4], ctx.needs_input_grad[5:8]
    h = _apply(g.mT, left, left_identity, left_span, left_form, transpose=True).mT
    d_update = None
    if for_update:
        d_update = _apply(h, right, right_identity, right_span, right_form, transpose=True)
        d_update = d_update.sum_to_size(update.shape).to(update.dtype)
    d_left, *d_left_scales = _NOTHING
    if any(for_left):
        z = _apply(x, right, right_identity, right_span, right_form)
        d_left, *d_left_scales = _side(z.mT, g.mT, left, left_identity, left_span, left_form, for_left)
        if d_left is not None and left_form == DENSE:
            d_left = d_left.mT
    d_right = _side(x, h, right, right_identity, right_span, right_form, for_right) if any(for_right) else _NOTHING
    return (d_update, d_left, *d_left_scales, None, *d_right, None)


def _apply(
    x: Tensor, matrix: Tensor | None, identity: Tensor | None, span: Tensor | None, form: int, transpose: bool = False
) -> Tensor:
    """`x P`, or `x P^T`; the basis form is symmetric."""
    if matrix is None:
        return x
    p = matrix.mT if transpose and form == DENSE else matrix
    return apply_right(x, p, cast(identity, x.dtype), cast(span, x.dtype), form)


def _side(
    x: Tensor,
    h: Tensor,
    matrix: Tensor | None,
    identity: Tensor | None,
    span: Tensor | None,
    form: int,
    needed: tuple[bool, bool, bool],
) -> Side:
    """Gradients of one side's matrix, identity and span, as far as needed."""
    if matrix is None:
        return _NOTHING
    if form != BASIS or identity is None or span is None:
        return (x.mT @ h).sum_to_size(matrix.shape).to(matrix.dtype), None, None
    v = matrix.to(x.dtype)
    d_matrix = d_identity = d_span = None
    twice = passes(matrix) == 2
    if needed[0] or needed[2]:
        hv, xv = h @ v, x @ v
        correction = 2 * torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) - v.mT @ v if twice else None
    if needed[0]:
        k = x.mT @ hv + h.mT @ xv
        k = k if correction is None else k @ correction - v @ (v.mT @ k)
        d_matrix = (-over(span.to(x.dtype)) * k).sum_to_size(matrix.shape).to(matrix.dtype)
    if needed[1]:
        d_identity = (h * x).sum(dim=(-2, -1)).sum_to_size(identity.shape).to(identity)
    if needed[2]:
        xv = xv if correction is None else xv @ correction
        d_span = -(hv * xv).sum(dim=(-2, -1)).sum_to_size(span.shape).to(span)
    return d_matrix, d_identity, d_span
