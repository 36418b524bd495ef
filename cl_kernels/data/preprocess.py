"""From uint8 images to what a backbone expects: pure functions on batches, on whatever device the batch is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Preprocessing", "convert_channels", "cover", "normalise", "translated"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"


def cover(images: Tensor, size: int, *, interpolation: str = "bilinear") -> Tensor:
    """Scale [N, C, H, W] so that it covers a ``size`` x ``size`` square, and cut the centre.

    The shorter side becomes ``size``; antialiased when shrinking. uint8 stays uint8 (rounded), floats stay floats.
    Raises ``ValueError`` for an empty image or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    height, width = images.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"images must not be empty, got {height}x{width}")
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    resized = F.interpolate(images.float(), size=(tall, wide), mode=interpolation, antialias=True, align_corners=False)
    top, left = (tall - size) // 2, (wide - size) // 2
    resized = resized[..., top : top + size, left : left + size]
    if images.dtype == torch.uint8:
        return resized.round().clamp(0, 255).to(torch.uint8)
    return resized.to(images.dtype)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """[N, C, H, W] float images as grey (``channels`` 1: luma 0.299 R + 0.587 G + 0.114 B) or RGB (3: grey repeated).

    Raises ``ValueError`` for other counts than 1 and 3 that would have to be converted.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if given == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    if given == 3 and channels == 1:
        weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        return (images * weights).sum(dim=1, keepdim=True)
    raise ValueError(f"images with {given} channels cannot become {channels}; only grey (1) and RGB (3) convert")


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std, channel by channel."""
    shape = (1, -1, 1, 1)
    means = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    return (images - means) / torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)


def translated(images: Tensor, given: Preprocessing, wanted: Preprocessing) -> Tensor:
    """Images [N, C, H, W] prepared for one backbone, as another wants them.

    Undoes the normalisation, scales (antialiased when shrinking), converts grey and RGB, normalises; the images
    themselves where both want the same. Details below the first backbone's resolution are gone.
    """
    if given == wanted:
        return images
    shape = (1, -1, 1, 1)
    mean = torch.tensor(given.mean, dtype=images.dtype, device=images.device).view(shape)
    std = torch.tensor(given.std, dtype=images.dtype, device=images.device).view(shape)
    pixels = cover(images * std + mean, wanted.size, interpolation=wanted.interpolation)
    return normalise(convert_channels(pixels.clamp(0, 1), wanted.channels), wanted.mean, wanted.std)


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its input: called on uint8 [N, C, H, W], returns float32 [N, channels, size, size].

    Scale to cover the square (antialiased), cut the centre, convert grey and RGB, divide by 255, normalise.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have one value for each of {self.channels}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
        pixels = cover(images.float() / 255, self.size, interpolation=self.interpolation)
        pixels = convert_channels(pixels.clamp(0, 1), self.channels)
        return normalise(pixels, self.mean, self.std)
