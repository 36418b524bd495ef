"""Reading images between their pixels, and sums of shifted copies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blur_gaussian", "directional", "magnified", "read", "scale_of"]


def scale_of(images: Tensor) -> float:
    """The factor on lengths that are given for 32 pixels: the shorter side / 32."""
    return min(images.shape[-2:]) / 32


def read(images: Tensor, rows: Tensor, columns: Tensor, *, padding: str = "border") -> Tensor:
    """Bilinear values of float64 [N, C, H, W] at pixel positions `rows`, `columns` [N or 1, H, W].

    Outside, the border is repeated ("border") or the image mirrored at its outermost pixels ("reflection").
    """
    height, width = images.shape[-2:]
    grid = torch.stack([_to_unit(columns, width), _to_unit(rows, height)], dim=-1)
    grid = grid.expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def _to_unit(positions: Tensor, size: int) -> Tensor:
    return positions * (2 / max(size - 1, 1)) - 1 if size > 1 else torch.zeros_like(positions)


def places(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, float64 [1, H, W]."""
    height, width = images.shape[-2:]
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return rows[None, :, None].expand(1, height, width), columns[None, None, :].expand(1, height, width)


def magnified(images: Tensor, factor: float) -> Tensor:
    """The centre, enlarged to the whole image."""
    rows, columns = places(images)
    middle, centre = (images.shape[-2] - 1) / 2, (images.shape[-1] - 1) / 2
    return read(images, middle + (rows - middle) / factor, centre + (columns - centre) / factor)


def directional(images: Tensor, deviation: float, degrees: Tensor) -> Tensor:
    """Half a Gaussian of that deviation (in pixels), from every pixel along `degrees` [N] (0 points to the right)."""
    rows, columns = places(images)
    angle = degrees[:, None, None] * (math.pi / 180)
    steps = range(1 + math.ceil(3.5 * deviation))
    weights = [math.exp(-0.5 * (step / deviation) ** 2) for step in steps]
    total = torch.zeros_like(images)
    for step, weight in zip(steps, weights, strict=True):
        total += weight * read(images, rows + step * angle.sin(), columns + step * angle.cos())
    return total / sum(weights)


def blur_gaussian(images: Tensor, deviation: float) -> Tensor:
    """Gaussian of that deviation in pixels, cut at four deviations, the border repeated."""
    reach = int(4 * deviation + 0.5)
    if reach == 0:
        return images
    weights = [math.exp(-0.5 * (step / deviation) ** 2) for step in range(-reach, reach + 1)]
    for dim in (-2, -1):
        edges = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
        padded, size, total = F.pad(images, edges, mode="replicate"), images.shape[dim], torch.zeros_like(images)
        for start, weight in enumerate(weights):
            total += weight / sum(weights) * padded.narrow(dim, start, size)
        images = total
    return images
