"""The small network and the data on which FTP's published recurrence and ours are run; the recurrence is official_ftp's
of the benchmarks. The network has vectors, matrices, a convolution and a (1, N, D) tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from cl_kernels.benchmarks.official_ftp import Base, Recurrence, adamw, rows, sgd
from torch import Tensor, nn

__all__ = ["Base", "Recurrence", "Tiny", "adamw", "batch", "gradients", "rows", "sgd"]


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
