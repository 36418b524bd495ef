"""Gradient of `project_to_anchor`, written in differentiable operations so that it has a gradient in turn.

For y = W_0 + s c with s = min(gamma / n, 1), n = ||c|| + 1e-8 and upstream g, a row outside its ball (gamma < n) has
    dgamma = <g, c> / n        dc = s (g - <g, c> / n  d||c||/dc),   d||c||/dc = sign(c) or c / ||c||
and a row inside has dc = g and dgamma = 0. A change of the anchor alone moves y by the rest: dW_0 = g - dc.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection.reference import NORMS, TINY, as_rows, row_norms

__all__ = ["backward", "setup_context"]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, anchor, radius, norm = inputs
    ctx.save_for_backward(weight, anchor, radius)
    ctx.norm = norm


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, anchor, radius = ctx.saved_tensors
    norm, shape, work = ctx.norm, weight.shape, torch.promote_types(weight.dtype, torch.float32)
    g, c = as_rows(grad, norm).to(work), as_rows(weight, norm).to(work)
    if anchor is not None:
        c = c - as_rows(anchor, norm).to(work)
    length = row_norms(c, norm)
    n, gamma = length + TINY, radius.to(work).expand(length.shape)
    outside = gamma < n
    along = (g * c).sum(1) / n
    d_weight = d_anchor = d_radius = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        slope = c.sign() if norm == NORMS["row_l1"] else c / torch.where(length == 0, 1.0, length)[:, None]
        rows = torch.where(outside[:, None], (gamma / n)[:, None] * (g - along[:, None] * slope), g).reshape(shape)
        d_weight = rows.to(weight.dtype) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1] and anchor is not None:
            d_anchor = (grad.to(work) - rows).to(anchor.dtype)
    if ctx.needs_input_grad[2]:
        d_radius = torch.where(outside, along, 0.0).sum_to_size(radius.shape or (1,)).reshape(radius.shape)
        d_radius = d_radius.to(radius.dtype)
    return d_weight, d_anchor, d_radius, None
