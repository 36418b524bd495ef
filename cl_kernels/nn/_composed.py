"""A linear layer with adapters through one composed weight: cheaper than thin products where there are many rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Part", "composed_linear"]


class Part(NamedTuple):
    """The adapters of the output columns start:stop; what is not there is None, a coefficient of None is 1."""

    start: int
    stop: int
    scale: float
    past_a: Tensor | None
    past_b: Tensor | None
    values: Tensor | None
    a: Tensor | None
    b: Tensor | None
    gain: Tensor | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [in, K], B [K, out] of history and current adapter side by side, without coefficients."""
        pairs = ((self.past_a, self.past_b), (self.a, self.b))
        there = [(a, b) for a, b in pairs if a is not None and b is not None]
        return torch.cat([a for a, _ in there], dim=1), torch.cat([b for _, b in there])

    def coefficients(self, like: Tensor) -> Tensor:
        """One for each column, scale included."""
        parts = []
        if self.past_a is not None:
            parts.append(like.new_ones(self.past_a.shape[1]) if self.values is None else self.values)
        if self.a is not None:
            ones = like.new_ones(self.a.shape[1])
            parts.append(ones if self.gain is None else ones * self.gain)
        return self.scale * torch.cat(parts)


def composed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor:
    """y = x W^T + b, W = weight [out, in] + s (A diag(c) B)^T formed for this call from all adapters at once.

    Same function and gradients as x weight^T + s ((x A) c) B; weight, bias and the history are constant. Forming W
    takes 2 K in out operations whatever the number of rows N; the thin form takes 2 N K (in + out), and in the backward
    pass as many again, of which here only those for the coefficients and the current adapter remain. The graph keeps W:
    memory of the frozen weight, whatever the number of tasks, instead of N x K. Differentiable once.
    """
    layout = tuple((part.start, part.stop, part.scale) for part in parts)
    y: Tensor = _Composed.apply(x, weight, bias, layout, *(t for part in parts for t in part[3:]))  # type: ignore[no-untyped-call]  # torch does not annotate it
    return y


def _parts(layout: tuple[tuple[int, int, float], ...], tensors: tuple[Any, ...]) -> list[Part]:
    return [Part(*place, *tensors[6 * index : 6 * index + 6]) for index, place in enumerate(layout)]


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Any, *tensors: Tensor | None
    ) -> Tensor:
        w = weight.clone()
        for part in _parts(layout, tensors):
            a, b = part.factors()
            w[part.start : part.stop].addmm_((part.coefficients(w)[:, None] * b).mT, a.mT)
        ctx.layout = layout
        ctx.save_for_backward(x, w, *tensors)
        return F.linear(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w, *tensors = ctx.saved_tensors
        gx = grad @ w if ctx.needs_input_grad[0] else None
        rows, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        found: list[Tensor | None] = []
        for index, part in enumerate(_parts(ctx.layout, tuple(tensors))):
            needs = ctx.needs_input_grad[4 + 6 * index : 10 + 6 * index]
            found += _gradients(part, rows, flat[:, part.start : part.stop], needs)
        return (gx, None, None, None, *found)


def _gradients(part: Part, x: Tensor, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Of past_a, past_b, values, a, b, gain."""
    result: list[Tensor | None] = [None] * 6
    if not any(needs):
        return result
    if not needs[2]:  # the history is constant altogether
        part = part._replace(past_a=None, past_b=None, values=None)
    a, b = part.factors()
    down, up = x @ a, grad @ b.mT  # [N, K]
    past = 0 if part.past_a is None else part.past_a.shape[1]
    if needs[2]:
        result[2] = part.scale * (down[:, :past] * up[:, :past]).sum(dim=0)
    size = part.scale if part.gain is None else part.scale * part.gain
    if needs[3]:
        result[3] = size * (x.mT @ up[:, past:])
    if needs[4]:
        result[4] = size * (down[:, past:].mT @ grad)
    if needs[5]:
        result[5] = part.scale * (down[:, past:] * up[:, past:]).sum()
    return result
