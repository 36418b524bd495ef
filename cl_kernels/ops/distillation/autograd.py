"""Gradients of the losses: written while the loss was computed, and multiplied by what comes from above.

Under `create_graph` the closed form runs in differentiable operations instead: the gradient then has a gradient in
turn. So the logits are kept until the backward has run; change them in place only before the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops.distillation import reference

__all__ = ["DISTILLATION", "DKD", "JSD", "KL", "Rule"]

Gradients = tuple[Tensor | None, ...]


class Rule(NamedTuple):
    """How an operation is differentiated.

    Its arguments are `tensors` tensors, the first `students` of which get a gradient, then numbers, then for each
    student whether its gradient is written. It returns the loss and those gradients; `closed_form` takes the same
    arguments and returns the gradients alone, in differentiable operations.
    """

    name: str
    students: int
    tensors: int
    closed_form: Callable[..., tuple[Tensor, ...]]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """For torch.library, whose gradients compilers trace: what was written is saved as any tensor is."""
        ctx.save_for_backward(*inputs[: self.tensors], *output[1:])
        self._note(ctx, inputs, output)

    def backward(self, ctx: Any, above: Tensor | None, *_: Any) -> Gradients:
        needed = ctx.needs_input_grad[: self.students]
        if above is None:
            return self._padded(ctx, [None] * self.students)
        inputs, grads = ctx.saved_tensors[: self.tensors], ctx.saved_tensors[self.tensors :]
        if torch.is_grad_enabled() or _lacking(needed, ctx.written):
            grads = self.closed_form(*inputs, *ctx.numbers, *needed)
        return self._padded(ctx, _times(grads, above, needed))

    def eager(self) -> Any:
        """An autograd function around the operation for eager calls: 31 us of overhead where torch.library has 55.

        What was written belongs to the first backward, which scales it in place and gives it away: with a factor of 1
        on the CPU it moves no byte. A second backward through a kept graph computes it again, to the same bits.
        """
        call = getattr(torch.ops.cl_kernels, self.name).default

        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            output: tuple[Tensor, ...] = call(*inputs)
            return output

        # `apply` reads the signature in every call: 17 us to find it, 3 us where it lies ready.
        forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        members = {"forward": staticmethod(forward), "setup_context": staticmethod(self._hand_over)}
        members["backward"] = staticmethod(self._take_over)
        return type(f"Eager_{self.name}", (torch.autograd.Function,), members)

    def _hand_over(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: self.tensors])
        self._note(ctx, inputs, output)
        ctx.grads = output[1:]

    def _take_over(self, ctx: Any, above: Tensor | None, *_: Any) -> Gradients:
        needed = ctx.needs_input_grad[: self.students]
        if above is None:
            return self._padded(ctx, [None] * self.students)
        if torch.is_grad_enabled():
            grads = self.closed_form(*ctx.saved_tensors, *ctx.numbers, *needed)
            return self._padded(ctx, _times(grads, above, needed))
        mine, ctx.grads = ctx.grads, None
        if mine is None or _lacking(needed, ctx.written):
            call = getattr(torch.ops.cl_kernels, self.name).default
            mine = call(*ctx.saved_tensors, *ctx.numbers, *needed)[1:]
        chosen = [g for g, n in zip(mine, needed, strict=True) if n]
        if above.ndim:
            for g in chosen:
                g.mul_(above[:, None])
        elif above.device.type != "cpu" or above.item() != 1.0:
            torch._foreach_mul_(chosen, above)
        return self._padded(ctx, [g if n else None for g, n in zip(mine, needed, strict=True)])

    def _note(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.numbers, ctx.written = inputs[self.tensors : -self.students], inputs[-self.students :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def _padded(self, ctx: Any, grads: list[Tensor | None]) -> Gradients:
        return (*grads, *[None] * (self.tensors + len(ctx.numbers)))


def _lacking(needed: tuple[bool, ...], written: tuple[bool, ...]) -> bool:
    return any(n and not w for n, w in zip(needed, written, strict=True))


def _times(grads: tuple[Tensor, ...], above: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
    factors = above if above.ndim == 0 else above[:, None]
    return [(g * factors).to(g.dtype) if n else None for g, n in zip(grads, needed, strict=True)]


DISTILLATION = Rule("distillation_loss", 2, 5, reference.distillation_gradients)
KL = Rule("kl_loss", 1, 2, reference.kl_gradient)
DKD = Rule("dkd_loss", 1, 4, reference.dkd_gradient)
JSD = Rule("jsd_loss", 1, 2, reference.jsd_gradient)
