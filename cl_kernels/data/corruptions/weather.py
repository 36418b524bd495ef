"""Snow, frost, fog and brightness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_kernels.data.corruptions import sampling
from cl_kernels.data.corruptions.draws import Draws, as_pixels, as_unit

__all__ = ["brightness", "fog", "frost", "snow"]

# CIFAR-10-C: mean and deviation of the layer, its enlargement, threshold, deviation of the motion, share that stays.
# Enlargement and motion are for 32 pixels.
_SNOW = (
    (0.10, 0.2, 1.00, 0.60, 3, 0.95),
    (0.10, 0.2, 1.00, 0.50, 4, 0.90),
    (0.15, 0.3, 1.75, 0.55, 4, 0.90),
    (0.25, 0.3, 2.25, 0.60, 6, 0.85),
    (0.30, 0.3, 1.25, 0.65, 12, 0.80),
)
_FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # CIFAR-10-C: thickness, decay
_FROST = (0.2, 0.3, 0.4, 0.45, 0.5)  # ours: the share of the texture
_VALUE = (0.05, 0.1, 0.15, 0.2, 0.3)  # CIFAR-10-C
_LUMA = (0.299, 0.587, 0.114)


def brightness(images: Tensor, level: int, draws: Draws) -> Tensor:
    """HSV's value plus c, hue and saturation kept: all channels times (v + c) / v, black becomes grey."""
    values = as_unit(images)
    value = values.amax(dim=1, keepdim=True)
    wanted = (value + _VALUE[level]).clamp(max=1)
    return as_pixels(torch.where(value > 0, values * (wanted / value.clamp(min=1 / 255)), wanted))


def fog(images: Tensor, level: int, draws: Draws) -> Tensor:
    """(x + c plasma) m / (m + c), m the image's largest value."""
    thickness, decay = _FOG[level]
    values = as_unit(images)
    largest = values.amax(dim=(1, 2, 3), keepdim=True)
    haze = _plasma(draws, images.shape[-2], images.shape[-1], decay)
    return as_pixels((values + thickness * haze) * largest / (largest + thickness))


def snow(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Bright streaks, and the same turned by half a circle, over a paler image."""
    mean, deviation, enlarged, threshold, motion, stays = _SNOW[level]
    scale, values = sampling.scale_of(images), as_unit(images)
    layer = mean + deviation * draws.normal(0, 1, *images.shape[-2:])
    layer = sampling.magnified(layer, enlarged * max(1.0, scale))  # a flake is a pixel at least
    layer = torch.where(layer < threshold, 0, layer).clamp(0, 1)
    layer = sampling.directional(layer, motion * scale, -135 + 90 * draws.uniform(2, 1).squeeze(1))
    weights = torch.tensor(_LUMA if images.shape[1] == 3 else (1.0,), dtype=values.dtype).view(1, -1, 1, 1)
    grey = (values * weights).sum(dim=1, keepdim=True)
    pale = stays * values + (1 - stays) * torch.maximum(values, 1.5 * grey + 0.5)
    return as_pixels(pale + layer + layer.rot90(2, (-2, -1)))


def frost(images: Tensor, level: int, draws: Draws) -> Tensor:
    """(1 - a) x + a f: f has bright veins where two plasmas cross, on a pale ground. A stand-in for photographs."""
    height, width = images.shape[-2:]
    first, second = (_plasma(draws, height, width, 1.6, stream) for stream in (0, 40))
    veins = (1 - (first - second).abs() / 0.25).clamp(0, 1)
    texture = 0.35 + 0.3 * first + 0.45 * veins
    return as_pixels((1 - _FROST[level]) * as_unit(images) + _FROST[level] * texture)


def _plasma(draws: Draws, height: int, width: int, decay: float, stream: int = 0) -> Tensor:
    """A height map [N, 1, height, width] in [0, 1] by the diamond-square algorithm on a torus; step k adds uniform
    noise of size decay^-2k, as CIFAR-10-C's does."""
    size = 1 << max(1, math.ceil(math.log2(max(height, width))))
    surface = draws.uniform(stream, 1, 1) * 0
    amplitude, side = 1.0, 1
    while side < size:
        count, stream, side = len(surface), stream + 2, 2 * side
        finer = surface.new_zeros(count, side, side)
        middle = _mean_of_four(surface, surface.roll(-1, 1), surface.roll(-1, 2), surface.roll((-1, -1), (1, 2)))
        middle = middle + amplitude * (2 * draws.uniform(stream, side // 2, side // 2) - 1)
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = surface, middle
        noise = amplitude * (2 * draws.uniform(stream + 1, 2, side // 2, side // 2) - 1)
        right = _mean_of_four(surface, surface.roll(-1, 2), middle, middle.roll(1, 1)) + noise[:, 0]
        below = _mean_of_four(surface, surface.roll(-1, 1), middle, middle.roll(1, 2)) + noise[:, 1]
        finer[:, ::2, 1::2], finer[:, 1::2, ::2] = right, below
        surface, amplitude = finer, amplitude / decay**2
    surface = surface - surface.amin(dim=(1, 2), keepdim=True)
    surface = surface / surface.amax(dim=(1, 2), keepdim=True)
    return surface[:, None, :height, :width]


def _mean_of_four(*values: Tensor) -> Tensor:
    return (values[0] + values[1] + values[2] + values[3]) / 4
