"""Defocus, glass, motion and zoom blur."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.data.corruptions import sampling
from cl_kernels.data.corruptions.draws import Draws, as_pixels, as_unit

__all__ = ["defocus", "glass", "motion", "zoom"]

# Radii at 32 pixels of discs with the variance of CIFAR-10-C's kernels; those are 3 x 3 and cannot be scaled.
_RADIUS = (0.19, 0.50, 0.78, 0.94, 1.42)
_GLASS = (0.2, 0.35, 0.5, 0.7, 0.9)  # ours: the share of the pixels that are fetched from elsewhere
_GLASS_DEVIATION = 0.4  # CIFAR-10-C's largest
# CIFAR-10-C at 32 pixels, but for severity 4: there it is 2 with a longer reach, whose end weighs nothing.
_MOTION = (1.0, 1.5, 2.0, 2.25, 2.5)
_ZOOM = (6, 11, 16, 21, 26)  # CIFAR-10-C: factors 1, 1.01, ..., that many


def defocus(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Mean over a disc, read bilinearly."""
    kernel = _disc(_RADIUS[level] * sampling.scale_of(images))
    reach = len(kernel) // 2
    padded, total = F.pad(as_unit(images), (reach,) * 4, mode="replicate"), torch.zeros_like(images, dtype=kernel.dtype)
    height, width = images.shape[-2:]
    for row, column in kernel.nonzero().tolist():
        total += kernel[row, column] * padded[..., row : row + height, column : column + width]
    return as_pixels(total)


def _disc(radius: float) -> Tensor:
    """Weights [2k + 1, 2k + 1] of the pixels: 64 x 64 points, those within the disc, each shared among its four."""
    reach = math.ceil(radius)
    line = (torch.arange(64, dtype=torch.float64) + 0.5) / 32 - 1
    inside = (line[:, None].square() + line.square() <= 1).double()
    distance = (line[:, None] * radius - torch.arange(-reach, reach + 1)).abs()
    shares = (1 - distance).clamp(min=0)  # [64, 2k + 1]
    kernel = shares.mT @ inside @ shares
    return kernel / kernel.sum()


def glass(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Blur, fetch a share of the pixels from a random place at most one (at 32 pixels) away, blur."""
    scale, (height, width) = sampling.scale_of(images), images.shape[-2:]
    reach = max(1, round(scale))
    values = sampling.blur_gaussian(as_unit(images), _GLASS_DEVIATION * scale)
    moves = (draws.uniform(0, 2, height, width) * (2 * reach + 1)).floor().to(torch.int64) - reach
    moves = torch.where(draws.uniform(1, 1, height, width) < _GLASS[level], moves, 0)
    rows = (torch.arange(height)[:, None] + moves[:, 0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[:, 1]).clamp(0, width - 1)
    index = (rows * width + columns).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    values = values.flatten(2).gather(2, index).view_as(values)
    return as_pixels(sampling.blur_gaussian(values, _GLASS_DEVIATION * scale))


def motion(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Half a Gaussian along a direction within 45 degrees of the horizontal."""
    degrees = 90 * draws.uniform(0, 1).squeeze(1) - 45
    return as_pixels(sampling.directional(as_unit(images), _MOTION[level] * sampling.scale_of(images), degrees))


def zoom(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Mean of the image and its enlargements by 1, 1.01, 1.02, ..."""
    values = as_unit(images)
    total = values.clone()
    for step in range(_ZOOM[level]):
        total += sampling.magnified(values, 1 + step / 100)
    return as_pixels(total / (_ZOOM[level] + 1))
