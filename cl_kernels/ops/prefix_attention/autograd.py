"""The gradient of the merged form: again an operation. Torch's own log-sum-exp carries none (see `tokens`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.prefix_attention import reference

__all__ = ["backward", "context"]


def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        found: reference.Gradients = reference.twice(grad, q, k, v, prefix_k, prefix_v, ctx.scale)
    else:
        inputs = (q, k, v, prefix_k, prefix_v)
        found = torch.ops.cl_kernels.prefix_attention_backward(grad, *inputs, out, lse, ctx.scale, any(needed[:3]))
    return (*(g if wanted else None for g, wanted in zip(found, needed, strict=True)), None)
