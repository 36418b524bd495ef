"""Augmentation of whole batches of photographs on their own device, without a loop over images.

Images are float [N, 3, H, W] in [0, 1]; every random number comes from the generator that is handed in, so an epoch can
be drawn again. RandAugment (Cubuk et al. 2020) chooses operations per image; here each image's geometric ones join its
crop in one affine map and one resampling, and the colour ones are computed for the batch and chosen by a mask.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def chosen(n: int, share: float, generator: torch.Generator) -> Tensor:
    """A mask [n, 1, 1, 1] that is true for `share` of the images."""
    return (torch.rand(n, generator=generator, device=generator.device) < share).view(-1, 1, 1, 1)


def flip_and_shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and move each by up to `reach` whole pixels; what comes in is their own reflection."""
    n, _, high, wide = images.shape
    images = torch.where(chosen(n, 0.5, generator), images.flip(3), images)
    if reach == 0:
        return images
    padded = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    top, left = (torch.randint(2 * reach + 1, (n, 1), generator=generator, device=images.device) for _ in range(2))
    rows = (top + torch.arange(high, device=images.device))[:, :, None]
    columns = (left + torch.arange(wide, device=images.device))[:, None, :]
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows, columns].permute(0, 3, 1, 2).contiguous()


def crop_and_turn(images: Tensor, smallest: float, magnitude: float, operations: int, gen: torch.Generator) -> Tensor:
    """A resized crop of `smallest` to all of the area (3:4 to 4:3), mirrored at random, with RandAugment's rotation,
    shear and shift for some images, in one bilinear resampling.
    """
    n = len(images)
    area, ratio = uniform(n, smallest, 1.0, gen), torch.exp(uniform(n, -math.log(4 / 3), math.log(4 / 3), gen))
    wide, tall = (area * ratio).sqrt().clamp_max(1.0), (area / ratio).sqrt().clamp_max(1.0)
    x, y = uniform(n, -1, 1, gen) * (1 - wide), uniform(n, -1, 1, gen) * (1 - tall)
    mirror = torch.where(chosen(n, 0.5, gen).flatten(), -1.0, 1.0)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    crop = torch.stack([wide * mirror, zero, x, zero, tall, y, zero, zero, one], 1).view(n, 3, 3)

    def some(limit: float) -> Tensor:  # each of the five geometric operations comes to an image by operations / 12
        picked = chosen(n, operations / 12, gen).flatten()
        return torch.where(picked, uniform(n, -limit, limit, gen) * magnitude, zero)

    angle, shear_x, shear_y, shift_x, shift_y = some(math.pi / 6), some(0.3), some(0.3), some(0.4), some(0.4)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin + shear_x, shift_x, sin + shear_y, cos, shift_y, zero, zero, one], 1).view(n, 3, 3)
    grid = F.affine_grid((turn @ crop)[:, :2], list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour(images: Tensor, magnitude: float, operations: int, gen: torch.Generator) -> Tensor:
    """RandAugment's seven operations on pixel values, each for `operations` / 12 of the images."""
    n = len(images)

    def factor() -> Tensor:
        return 1 + uniform(n, -0.9, 0.9, gen).view(-1, 1, 1, 1) * magnitude

    def grey(x: Tensor) -> Tensor:
        return (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)

    def contrast(x: Tensor) -> Tensor:
        return torch.lerp(grey(x).mean((2, 3), keepdim=True).expand_as(x), x, factor())

    def stretch(x: Tensor) -> Tensor:
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return (x - low) / (high - low).clamp_min(1 / 255)

    def sharpen(x: Tensor) -> Tensor:
        return torch.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x, factor())

    levels = 2 ** round(8 - 4 * magnitude)
    steps: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x * factor(),
        contrast,
        lambda x: torch.lerp(grey(x).expand_as(x), x, factor()),
        sharpen,
        stretch,
        lambda x: (x * levels).floor().clamp_max(levels - 1) / (levels - 1),
        lambda x: torch.where(x > 1 - 0.8 * magnitude * torch.rand((), generator=gen, device=x.device), 1 - x, x),
    )
    for step in steps:
        images = torch.where(chosen(n, operations / 12, gen), step(images).clamp(0, 1), images)
    return images


def cut_in(images: Tensor, others: Tensor, share: float, host: random.Random) -> tuple[Tensor, float]:
    """CutMix: one box of about `1 - share` of the area comes from `others`; returns the share that did not."""
    box = []
    for side in images.shape[2:]:
        length = round(side * math.sqrt(1 - share))
        start = round(host.random() * side - length / 2)  # the centre is anywhere, so boxes at the edge are cut
        box.append((max(0, start), min(side, start + length)))
    (top, bottom), (left, right) = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
