"""The base steps of the reference: what torch's AdamW and SGD would subtract, and their new state."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection.arguments import SGD, Adam, Step

__all__ = ["adam", "sgd"]


def adam(s: Step, i: int, weight: Tensor, grad: Tensor, step: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-u and the new moments."""
    base = cast(Adam, s.base)
    if s.weight_decay and not base.decoupled:
        grad = grad + s.weight_decay * weight
    m = base.beta1 * s.firsts[i].to(grad.dtype) + (1 - base.beta1) * grad
    v = base.beta2 * s.seconds[i].to(grad.dtype) + (1 - base.beta2) * grad * grad
    state = [(s.firsts[i], m), (s.seconds[i], v)]
    top = v
    if s.largests:
        top = torch.maximum(s.largests[i].to(v.dtype), v)
        state.append((s.largests[i], top))
    t, lr = step.double(), _rate(s, step)
    rate = (lr / (1 - base.beta1**t)).to(m.dtype)
    direction = m / (top.sqrt() / (1 - base.beta2**t).sqrt().to(v.dtype) + base.eps)
    update = -rate * torch.where(m == 0, m, direction)  # 0 where m is, so that eps = 0 is usable
    if s.weight_decay and base.decoupled:
        update = update - (lr * s.weight_decay).to(m.dtype) * weight
    return update, state


def sgd(s: Step, i: int, weight: Tensor, grad: Tensor, step: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-u and the new momentum buffer, which the first step fills with the gradient."""
    base = cast(SGD, s.base)
    if s.weight_decay:
        grad = grad + s.weight_decay * weight
    lr = _rate(s, step).to(grad.dtype)
    if not s.firsts:
        return -lr * grad, []
    buffer = base.momentum * s.firsts[i].to(grad.dtype) + (1 - base.dampening) * grad
    buffer = torch.where(step == 1, grad, buffer)
    return -lr * (grad + base.momentum * buffer if base.nesterov else buffer), [(s.firsts[i], buffer)]


def _rate(s: Step, step: Tensor) -> Tensor:
    """The learning rate in float64 beside the step count."""
    if s.lr_tensor is None:
        return torch.full((), s.lr, dtype=torch.float64, device=step.device)
    return s.lr_tensor.to(step.device, torch.float64).reshape(())
