"""Gradients of the room. They are again operations, so a step makes one call for all matrices.

Under `create_graph` the formula runs in differentiable operations instead: the gradient then has a gradient in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.orthogonal_qr import reference

__all__ = ["extend_backward", "extend_context", "polar_backward", "polar_context", "qr_backward", "qr_context"]


def qr_context(ctx: Any, inputs: tuple[Any, ...], output: reference.Factors) -> None:
    q, r, solve, status = output
    ctx.save_for_backward(q, r, solve, status)
    ctx.mark_non_differentiable(solve, status)
    ctx.set_materialize_grads(False)


def qr_backward(ctx: Any, gq: Tensor | None, gr: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
    return _qr_gradient(gq, gr, *ctx.saved_tensors), None


def _qr_gradient(
    gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor, status: Tensor
) -> Tensor | None:
    if gq is None and gr is None:
        return None
    if torch.is_grad_enabled():
        flagged = status == reference.DEFICIENT
        differentiable = reference.solver(r.double(), flagged, q.dtype)
        wide = [None if g is None else g.double() for g in (gq, gr)]
        return reference.backward(wide[0], wide[1], q.double(), r.double(), differentiable).to(q.dtype)
    result: Tensor = torch.ops.cl_kernels.qr_backward(gq, gr, q, r, solve)
    return result


def extend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, _, r, solve, status = output
    ctx.save_for_backward(inputs[0], q, r, solve, status)
    ctx.mark_non_differentiable(solve, status)
    ctx.set_materialize_grads(False)


def extend_backward(
    ctx: Any, gq: Tensor | None, gs: Tensor | None, gr: Tensor | None, *_: Any
) -> tuple[None, Tensor | None, None]:
    """gA = h - P P^T h + P gS with h the gradient of the factorisation; dropped columns of A count as constants."""
    basis, q, r, solve, status = ctx.saved_tensors
    kept = (r.diagonal(dim1=-2, dim2=-1) != 0)[..., None, :]
    gr, gs = (None if g is None else torch.where(kept, g, 0.0) for g in (gr, gs))
    h = _qr_gradient(gq, gr, q, r, solve, status)
    p = basis.double()
    wide = None if gs is None else p @ gs.double()
    if h is not None:
        outside = h.double() - p @ (p.mT @ h.double())
        wide = outside if wide is None else wide + outside
    return None, None if wide is None else wide.to(q.dtype), None


def polar_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, v, s = output
    ctx.save_for_backward(q, v, s)
    ctx.mark_non_differentiable(v, s)


def polar_backward(ctx: Any, gq: Tensor, *_: Any) -> Tensor:
    q, v, s = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise NotImplementedError("polar has no second derivative; differentiate once")
    return reference.polar_backward(gq, q, v, s).to(q.dtype)
