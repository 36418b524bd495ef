"""Gaussian, shot and impulse noise: every value of every channel by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.data.corruptions.draws import Draws, as_pixels, as_unit

__all__ = ["gaussian", "impulse", "shot"]

# CIFAR-10-C
_DEVIATION = (0.04, 0.06, 0.08, 0.09, 0.10)
_PHOTONS = (500, 250, 100, 75, 50)  # of a white pixel
_SHARE = (0.01, 0.02, 0.03, 0.05, 0.07)


def gaussian(images: Tensor, level: int, draws: Draws) -> Tensor:
    """x + c n, n standard normal."""
    return as_pixels(as_unit(images) + _DEVIATION[level] * draws.normal(0, *images.shape[1:]))


def shot(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Poisson(c x) / c: a pixel counts its photons."""
    photons = _PHOTONS[level]
    return as_pixels(_poisson(images, photons / 255, draws.uniform(0, *images.shape[1:])) / photons)


def impulse(images: Tensor, level: int, draws: Draws) -> Tensor:
    """A share c of the values becomes 0 or 255, one half each."""
    chance = draws.uniform(0, *images.shape[1:])
    salt = draws.uniform(1, *images.shape[1:]) < 0.5
    return torch.where(chance < _SHARE[level], salt.to(torch.uint8) * 255, images)


def _poisson(images: Tensor, rate: float, uniform: Tensor) -> Tensor:
    """Poisson numbers with mean `rate * pixel`, by inversion of the distribution function, as float64.

    One table holds `pixel + F(k; rate * pixel)` for all 256 pixels and all k: it is sorted, so a number is found by one
    search of `pixel + uniform`.
    """
    means = torch.arange(256, dtype=torch.float64) * rate
    most = int(means[-1] + 10 * means[-1].sqrt() + 20)
    counts = torch.arange(most, dtype=torch.float64)
    logarithms = torch.xlogy(counts, means[:, None]) - means[:, None] - torch.lgamma(counts + 1)
    table = torch.arange(256, dtype=torch.float64)[:, None] + logarithms.exp().cumsum(dim=1).clamp(max=1)
    place = torch.searchsorted(table.flatten(), images.double() + uniform, right=True)
    return (place - images.to(torch.int64) * most).clamp(0, most - 1).double()
