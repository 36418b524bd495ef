"""FTP's published recurrence, twice, written anew from its formulas. tests/test_official.py holds the two equal.

`Recurrence` is a function of weights by name, which the optimizers' tests follow step by step; `Released` works in
place and tensor by tensor with its caches, its branch on the host and its bounds read there, and is what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

__all__ = ["Base", "Recurrence", "Released", "adamw", "rows", "sgd"]

BETA1, BETA2, EPS, MOMENTUM, FLOOR = 0.9, 0.999, 1e-8, 0.9, 1e-8
RADIUS_BETA1, RADIUS_BETA2 = 0.9, 0.999
STEPS = 5000.0  # of the state: past the bias corrections
Base = Callable[["Recurrence", str, Tensor], Tensor]
MU = 1e-2


def rows(x: Tensor) -> Tensor:
    """As the method sees a parameter: the first dimension for matrices and kernels, one row for vectors."""
    return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)


class Recurrence:
    """Weights by name, stepped by `step(grads, lr)`; radii, floors and pre-clip radii are kept as they were found."""

    def __init__(self, weights: dict[str, Tensor], base: Base, kappa: float, excluded: tuple[str, ...] = ()) -> None:
        self.weights = {name: w.clone() for name, w in weights.items()}
        self.anchors = {name: w.clone() for name, w in weights.items()}
        self.base, self.kappa, self.excluded = base, kappa, excluded
        self.t = 0
        self.lr = 0.0
        self.moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        self.cached: dict[str, tuple[Tensor, Tensor]] = {}
        self.radii: dict[str, Tensor] = {}
        self.h: dict[str, Tensor] = {}

    def step(self, grads: dict[str, Tensor], lr: float) -> None:
        self.t, self.lr = self.t + 1, lr
        for name, weight in self.weights.items():
            u = self.base(self, name, grads[name])
            if name in self.excluded:
                self.weights[name] = weight - u
                continue
            anchor = rows(self.anchors[name])
            c = rows(weight - u) - anchor
            n = c.abs().sum(1) + 1e-8
            gamma = self._radius(name, rows(grads[name]), n)
            scale = (gamma / n).clamp(0, 1)
            self.weights[name] = (anchor + scale[:, None] * c).reshape(weight.shape)
            self.cached[name], self.radii[name] = (c, n), gamma

    def _radius(self, name: str, grad: Tensor, n: Tensor) -> Tensor:
        state = self.moments[name]
        if self.t == 1:
            state["a"] = state["b"] = n.new_zeros(())
            return n.new_full((), 1e-8)
        c, before = self.cached[name]
        h = ((grad * c).sum(1) / before).sum()
        self.h[name] = h
        if h > 0:
            h = self.kappa * h
        state["a"] = 0.9 * state["a"] + 0.1 * h
        state["b"] = 0.999 * state["b"] + 0.001 * h * h
        mean, square = state["a"] / (1 - 0.9**self.t), state["b"] / (1 - 0.999**self.t)
        moved = self.radii[name] - MU * mean / (square.sqrt() + 1e-8)
        return torch.minimum(moved.clamp_min(1e-8), n.max())

    def floored(self, name: str) -> bool:
        return float(self.radii[name]) <= 1.0001e-8


def adamw(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0, amsgrad: bool = False
) -> Base:
    def base(r: Recurrence, name: str, grad: Tensor) -> Tensor:
        state, weight = r.moments[name], r.weights[name]
        m = betas[0] * state.get("m", torch.zeros_like(grad)) + (1 - betas[0]) * grad
        v = betas[1] * state.get("v", torch.zeros_like(grad)) + (1 - betas[1]) * grad * grad
        state["m"], state["v"] = m, v
        if amsgrad:
            v = state["top"] = torch.maximum(state.get("top", v), v)
        denominator = v.sqrt() / (1 - betas[1] ** r.t) ** 0.5 + eps
        return r.lr / (1 - betas[0] ** r.t) * m / denominator + r.lr * decay * weight

    return base


def sgd(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, decay: float = 0.0) -> Base:
    def base(r: Recurrence, name: str, grad: Tensor) -> Tensor:
        state = r.moments[name]
        direction = grad + decay * r.weights[name]
        if momentum:
            kept = state.get("buffer")
            buffer = direction if kept is None else momentum * kept + (1 - dampening) * direction
            state["buffer"] = buffer
            direction = direction + momentum * buffer if nesterov else buffer
        return r.lr * direction

    return base


class Released:
    """Steps an `ftp_variants.State`, or anything with its fields, in place, tensor by tensor.

    `speed`: the radius's learning rate, 0 where radii stand still; `taken`: how many steps were before.
    """

    def __init__(self, s: Any, speed: float = 0.0, taken: float = STEPS) -> None:
        self.s, self.speed, self.before = s, speed, taken
        self.cached = [torch.empty_like(p) for p in s.params]
        self.inverse = [torch.empty_like(rows(p)[:, :1]) for p in s.params]
        self.radii = [torch.empty_like(step) for step in s.steps]
        self.averages = [(torch.zeros_like(step), torch.zeros_like(step)) for step in s.steps]
        s.resets.append(self.reset)
        self.reset()

    def reset(self) -> None:
        self.taken = self.before
        for i, (p, anchor) in enumerate(zip(self.s.params, self.s.anchors, strict=True)):
            torch.sub(p, anchor, out=self.cached[i])
            self.inverse[i].copy_(1 / (torch.linalg.vector_norm(rows(self.cached[i]), 1, dim=1, keepdim=True) + 1e-8))
            self.radii[i].fill_(self.s.gammas[i])
            for average in self.averages[i]:
                average.zero_()

    def bytes(self) -> int:
        return sum(t.nbytes for t in self.cached)

    def tensors(self) -> list[Tensor]:
        """All that it holds beside weights, anchors and Adam's moments."""
        return [*self.cached, *self.inverse, *self.radii, *(t for pair in self.averages for t in pair)]

    def direction(self, i: int) -> Tensor:
        g, m, v = self.s.grads[i], self.s.first[i], self.s.second[i]
        if self.s.base == "sgd":
            m.mul_(MOMENTUM).add_(g)
            return self.s.lr * (g + MOMENTUM * m)
        t = float(self.s.steps[i]) if self.s.steps[i].device.type == "cpu" else STEPS  # the official count is a number
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v.sqrt() / math.sqrt(1 - BETA2**t)).add_(EPS)
        return self.s.lr / (1 - BETA1**t) * (m / denominator)

    def step(self) -> None:
        self.taken += 1
        for i, (p, g, anchor) in enumerate(zip(self.s.params, self.s.grads, self.s.anchors, strict=True)):
            self.s.steps[i] += 1
            c = (p - self.direction(i)) - anchor
            norms = rows(c).abs().sum(1, keepdim=True) + 1e-8
            h = torch.sum(torch.sum(rows(g) * rows(self.cached[i]), dim=1, keepdim=True) * self.inverse[i])
            if h > 0:
                h = h * 1.0  # kappa
            a, b = self.averages[i]
            a.mul_(RADIUS_BETA1).add_(h, alpha=1 - RADIUS_BETA1)
            b.mul_(RADIUS_BETA2).addcmul_(h, h, value=1 - RADIUS_BETA2)
            t = self.taken
            unit = (a / (1 - RADIUS_BETA1**t)) / ((b / (1 - RADIUS_BETA2**t)).sqrt() + 1e-8)
            # The released code hands the bound over as a tensor; torch reads it on the host.
            self.radii[i].copy_(hardtanh(self.radii[i] - self.speed * unit, FLOOR, norms.max().item()))
            ratio = torch.clamp(self.radii[i] / norms, 0, 1)
            p.copy_((rows(anchor) + ratio * rows(c)).view_as(p))
            self.cached[i].copy_(c)
            self.inverse[i].copy_(1 / norms)
