"""Domain transforms of image batches: deterministic functions of a uint8 tensor [N, C, H, W], named for
`RunConfig.domains`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.data import corruptions

__all__ = ["Transform", "get", "names"]

Transform = Callable[[Tensor], Tensor]


def _contrast(factor: float, shift: float = 0.0) -> Transform:
    def apply(images: Tensor) -> Tensor:
        return ((images.float() - 127.5) * factor + 127.5 + shift).round_().clamp_(0, 255).to(torch.uint8)

    return apply


def _blur(images: Tensor) -> Tensor:
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(padded, 3, stride=1).round_().to(torch.uint8)


def _dilate(images: Tensor) -> Tensor:
    return F.max_pool2d(images.float(), 3, stride=1, padding=1).to(torch.uint8)


def _erode(images: Tensor) -> Tensor:
    return 255 - _dilate(255 - images)


def _edges(images: Tensor) -> Tensor:
    return _dilate(images) - _erode(images)


def _noise(images: Tensor) -> Tensor:
    """The same noise picture for every image (seed 0, std 40): an image's transform must not depend on its batch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape[1:], generator=generator).to(images.device) * 40
    return (images.float() + noise).round_().clamp_(0, 255).to(torch.uint8)


def _checkerboard(images: Tensor) -> Tensor:
    """Invert the cells of a 4x4 checkerboard: local contrast changes sign across the image."""
    rows = torch.arange(images.shape[-2], device=images.device) * 4 // images.shape[-2]
    columns = torch.arange(images.shape[-1], device=images.device) * 4 // images.shape[-1]
    odd = (rows[:, None] + columns[None, :]) % 2 == 1
    return torch.where(odd, 255 - images, images)


_TRANSFORMS: dict[str, Transform] = {
    "identity": lambda images: images,
    "invert": lambda images: 255 - images,
    "rotate90": lambda images: torch.rot90(images, 1, (-2, -1)),
    "rotate180": lambda images: torch.rot90(images, 2, (-2, -1)),
    "rotate270": lambda images: torch.rot90(images, 3, (-2, -1)),
    "mirror": lambda images: images.flip(-1),
    "transpose": lambda images: images.mT,
    "low-contrast": _contrast(0.3),
    "high-contrast": _contrast(2.5),
    "dark": _contrast(0.5, -60.0),
    "bright": _contrast(0.5, 60.0),
    "blur": _blur,
    "dilate": _dilate,
    "erode": _erode,
    "edges": _edges,
    "noise": _noise,
    "checkerboard": _checkerboard,
}


def names() -> list[str]:
    """Every known transform."""
    return list(_TRANSFORMS)


def get(name: str) -> Transform:
    """The transform called `name`, or several joined by "+", applied left to right ("invert+rotate90").

    A corruption of `cl_kernels.data.corruptions` and its severity is one too ("fog@3"), drawn from the image's own
    pixels, so the same in every batch. Raises `ValueError` offering the nearest names.
    """
    steps = [_one(part) for part in name.split("+")]
    if len(steps) == 1:
        return steps[0]

    def chain(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return chain


def _one(name: str) -> Transform:
    family, at, severity = name.partition("@")
    if at:
        return _corruption(name, family, severity)
    if name not in _TRANSFORMS:
        near = difflib.get_close_matches(name, _TRANSFORMS, n=3, cutoff=0.4) or list(_TRANSFORMS)
        raise ValueError(f"domains: unknown transform {name!r}; nearest: {', '.join(near)}")
    return _TRANSFORMS[name]


def _corruption(name: str, family: str, severity: str) -> Transform:
    strengths = [str(value) for value in corruptions.SEVERITIES]
    if family not in corruptions.names():
        near = difflib.get_close_matches(family, corruptions.names(), n=3, cutoff=0.4) or corruptions.names()
        raise ValueError(f"domains: unknown corruption {family!r} in {name!r}; nearest: {', '.join(near)}")
    if severity not in strengths:
        raise ValueError(f"domains: a corruption has a severity of {', '.join(strengths)}, got {name!r}")
    return lambda images: corruptions.corrupt(images, family, int(severity))
