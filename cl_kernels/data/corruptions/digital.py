"""Contrast, elastic deformation, pixelation and JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cl_kernels.data.corruptions import sampling
from cl_kernels.data.corruptions.draws import Draws, as_pixels, as_unit

if TYPE_CHECKING:
    from types import ModuleType

    from PIL import Image as PillowImage

__all__ = ["contrast", "elastic", "jpeg", "pixelate"]

# CIFAR-10-C
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_SIDE = (0.95, 0.9, 0.85, 0.75, 0.65)
_QUALITY = (80, 65, 58, 50, 40)
# Ours, as shares of the side: how far the affine map moves its three points, how far the local part moves a pixel at
# most, and over which distance the local moves are smoothed. CIFAR-10-C's affine part falls from 0.08 to 0.03.
_ELASTIC = ((0.02, 0.05, 0.04), (0.03, 0.10, 0.04), (0.04, 0.15, 0.04), (0.05, 0.20, 0.04), (0.06, 0.25, 0.04))


def contrast(images: Tensor, level: int, draws: Draws) -> Tensor:
    """c (x - mean) + mean, the mean of each channel of each image."""
    pixels = images.shape[-2] * images.shape[-1]
    mean = images.to(torch.int64).sum(dim=(2, 3), keepdim=True).double() / (255 * pixels)
    return as_pixels(_CONTRAST[level] * (as_unit(images) - mean) + mean)


def elastic(images: Tensor, level: int, draws: Draws) -> Tensor:
    """A random affine map and smooth local moves, read bilinearly; the image is mirrored outside."""
    affine, local, smooth = _ELASTIC[level]
    height, width = images.shape[-2:]
    side = min(height, width)
    rows, columns = sampling.places(images)
    down, across = (rows - (height - 1) / 2) / (side / 3), (columns - (width - 1) / 2) / (side / 3)
    # Three corners of a square of 2/3 of the side, (1, 1), (1, -1) and (-1, -1), move; the map between them is affine.
    moves = side * affine * (2 * draws.uniform(0, 2, 3, 1, 1) - 1)
    first, second, third = moves[:, :, 0], moves[:, :, 1], moves[:, :, 2]
    shift = (first + third) / 2 + (second - third) / 2 * down[:, None] + (first - second) / 2 * across[:, None]
    field = 2 * draws.uniform(1, 2, height, width) - 1
    shift = shift + side * local * sampling.blur_gaussian(field, side * smooth)
    return as_pixels(sampling.read(as_unit(images), rows + shift[:, 0], columns + shift[:, 1], padding="reflection"))


def pixelate(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Shrunk to a share c of its side and enlarged again, both by Pillow's box filter."""
    image = _pillow()
    height, width = images.shape[-2:]
    small = (max(1, int(width * _SIDE[level])), max(1, int(height * _SIDE[level])))

    def apply(picture: PillowImage.Image) -> PillowImage.Image:
        shrunk = picture.resize(small, image.Resampling.BOX)
        return shrunk.resize((width, height), image.Resampling.BOX)

    return _each(images, apply)


def jpeg(images: Tensor, level: int, draws: Draws) -> Tensor:
    """Written as JPEG of quality c and read again."""
    image = _pillow()

    def apply(picture: PillowImage.Image) -> PillowImage.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY[level])
        again: PillowImage.Image = image.open(buffer)
        return again

    return _each(images, apply)


def _each(images: Tensor, apply: Callable[[PillowImage.Image], PillowImage.Image]) -> Tensor:
    image, grey = _pillow(), images.shape[1] == 1
    made = []
    for pixels in (images[:, 0] if grey else images.permute(0, 2, 3, 1)).contiguous().numpy():
        made.append(torch.from_numpy(np.array(apply(image.fromarray(pixels)))))
    stacked = torch.stack(made)
    return stacked[:, None] if grey else stacked.permute(0, 3, 1, 2).contiguous()


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('JPEG and pixelate need Pillow: pip install "cl-kernels[timm]"') from error
    return Image
