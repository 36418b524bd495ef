"""The published recurrence of FTP as its formulas give it, with the cached displacement.

Written from method-trainable-projection, section 3; one counter for all tensors, every tensor has a gradient. Also the
small network on which both are run: vectors, matrices, a convolution and a (1, N, D) tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Base = Callable[["Recurrence", str, Tensor], Tensor]
MU = 1e-2


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


def rows(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1)


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


class Tiny(nn.Module):
    """[B, 3, 5, 5] images to 6 numbers: 4-D, (1, N, D), 2-D, 1-D and 0-d parameters near 0.02, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.pos = nn.Parameter(torch.empty(1, 4, 8))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.empty(()))
        self.head = nn.Linear(8, 6)
        for p in self.parameters():
            nn.init.normal_(p, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = 10 * self.conv(images).flatten(2).mT + self.pos
        x = x + (1 + self.gain) * self.fc2(torch.tanh(10 * self.fc1(x)))
        out: Tensor = 10 * self.head(x.mean(1))
        return out


def batch(i: int, dtype: torch.dtype = torch.float32, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images, and the answers of a fixed network."""
    generator = torch.Generator().manual_seed(1000 + i)
    images = torch.randn(size, 3, 5, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        answers = _teacher()(images)
    return images.to(dtype), answers.to(dtype)


_KEPT: dict[str, Any] = {}


def _teacher() -> nn.Module:
    if not _KEPT:
        before = torch.random.get_rng_state()
        teacher = Tiny(seed=77).double()
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(10)
        _KEPT["teacher"] = teacher
        torch.random.set_rng_state(before)
    kept: nn.Module = _KEPT["teacher"]
    return kept


def gradients(model: nn.Module, weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Of the squared error of batch i at these weights."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    dtype = next(iter(weights.values())).dtype
    images, answers = batch(i, dtype)
    loss = (torch.func.functional_call(model, leaves, (images,)) - answers).square().mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
