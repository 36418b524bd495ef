"""From numbers to PNG files: a colour map that colour-blind eyes read too, and no smoothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_kernels.data.pictures import INSTALL
from cl_kernels.data.preprocess import Preprocessing

__all__ = ["COLOURS", "coloured", "legend", "shown", "upsampled", "write_png"]

# Seventeen stops of viridis (van der Walt and Smith, CC0): lightness rises evenly, and blue to yellow is told apart
# with any kind of colour blindness and in print without colour.
COLOURS = (
    (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141),
    (44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115),
    (94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37),
)  # fmt: skip
SIDE = 192  # pixels of a picture's shorter side, at least
OPACITY = 0.75  # of the colours over the grey image

Pixels = npt.NDArray[np.uint8]


def coloured(share: Tensor) -> Tensor:
    """Colours [..., 3] in 0..255 (float64) of numbers in [0, 1]; what lies outside is cut."""
    stops = torch.tensor(COLOURS, dtype=torch.float64, device=share.device)
    place = share.double().clamp(0, 1) * (len(COLOURS) - 1)
    low = place.floor().clamp(max=len(COLOURS) - 2).to(torch.int64)
    part = (place - low).unsqueeze(-1)
    return stops[low] * (1 - part) + stops[low + 1] * part


def shown(image: Tensor, preprocess: Preprocessing | None) -> Pixels:
    """What a model saw, as uint8 [H, W, 3]: normalised pixels [C, H, W] with the normalisation undone.

    Without `preprocess` the range of the image itself is spread over 0..255. Other channel counts than 1 and 3 show
    the mean of the channels."""
    pixels = image.detach().cpu().double()
    if preprocess is not None and len(preprocess.mean) == len(pixels):
        mean, std = (
            torch.tensor(part, dtype=torch.float64).view(-1, 1, 1) for part in (preprocess.mean, preprocess.std)
        )
        pixels = pixels * std + mean
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    if len(pixels) != 3:
        pixels = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)
    whole = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return _enlarged(whole.permute(1, 2, 0).contiguous().numpy())


def upsampled(share: Tensor, height: int, width: int, *, smooth: bool = False) -> Tensor:
    """A map [h, w] at height x width: every number as a block of pixels, or `smooth` (bilinear), which makes up what
    lies between them."""
    grid = share.detach().cpu().double()[None, None]
    if smooth:
        return torch.nn.functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    return torch.nn.functional.interpolate(grid, size=(height, width), mode="nearest-exact")[0, 0]


def legend(picture: Pixels, share: Tensor, high: float, *, smooth: bool = False) -> Pixels:
    """The map `share` [h, w] in colour over `picture` [H, W, 3] in grey; `high` is the brightest colour's number."""
    tall, wide = picture.shape[:2]
    scaled = upsampled(share, tall, wide, smooth=smooth) / (high if high > 0 else 1.0)
    grey = torch.from_numpy(picture.astype(np.float64)) @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    mixed = OPACITY * coloured(scaled) + (1 - OPACITY) * grey.unsqueeze(-1)
    result: Pixels = mixed.round().clamp(0, 255).to(torch.uint8).numpy()
    return result


def write_png(path: Path, picture: Pixels) -> int:
    """Write [H, W, 3] as PNG; its size in bytes. Raises `ImportError` with the install line without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(INSTALL) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="PNG", optimize=True)
    return path.stat().st_size


def _enlarged(picture: Pixels) -> Pixels:
    """Small pictures by a whole factor, so that a pixel stays a square."""
    factor = max(1, -(-SIDE // min(picture.shape[:2])))
    result: Pixels = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return result
