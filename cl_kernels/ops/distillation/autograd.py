"""Gradients of the losses: written while the loss was computed, and multiplied by what comes from above.

Under `create_graph`, and where the gradient was not asked for in advance, the closed form runs in differentiable
operations instead: the gradient then has a gradient in turn. So the logits are kept until the backward has run; change
them in place only before the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.distillation import reference

__all__ = ["distillation", "dkd", "jsd", "kl"]

Setup = Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def _pair(students: int, tensors: int, flags: int, formula: Callable[..., Tensor | tuple[Tensor, ...]]) -> Any:
    """(backward, setup_context) of an operation whose arguments are `tensors` tensors, the first `students` of which
    get a gradient, then numbers, the last `flags` of which say whether gradients are written.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *grads = output
        ctx.save_for_backward(*inputs[:tensors], *grads)
        ctx.numbers = inputs[tensors : len(inputs) - flags]
        ctx.written = inputs[len(inputs) - flags :]
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, above: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        rest = (None,) * (tensors - students + len(ctx.numbers) + flags)
        needed = ctx.needs_input_grad[:students]
        if above is None:
            return (None,) * students + rest
        inputs, grads = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
        if torch.is_grad_enabled() or any(n and not w for n, w in zip(needed, ctx.written, strict=True)):
            given = inputs if torch.is_grad_enabled() else [None if x is None else x.detach() for x in inputs]
            found = formula(*given, *ctx.numbers, *([True] * students if students > 1 else []))
            grads = found if isinstance(found, tuple) else (found,)
        return (*_times(above, grads, needed), *rest)

    return backward, setup


def _times(above: Tensor, grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Each gradient that is needed, times one number or one for each row; one launch for all of them."""
    chosen = [g for g, n in zip(grads, needed, strict=True) if n]
    if above.ndim == 0 and not torch.is_grad_enabled() and len(chosen) > 1 and above.dtype == torch.float32:
        made = iter(torch._foreach_mul(chosen, above))
    else:
        factors = above if above.ndim == 0 else above[:, None]
        made = iter([(g * factors).to(g.dtype) for g in chosen])
    return [next(made) if n else None for n in needed]


distillation = _pair(2, 5, 2, reference.distillation_gradients)
kl = _pair(1, 2, 1, reference.kl_gradient)
dkd = _pair(1, 4, 1, reference.dkd_gradient)
jsd = _pair(1, 2, 1, reference.jsd_gradient)
