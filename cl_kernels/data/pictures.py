"""One picture file to one uint8 RGB tensor, through Pillow, with its limits kept on."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as PillowImage

__all__ = ["BrokenImageError", "from_pillow", "picture_size", "read_picture"]

INSTALL = 'reading picture files needs Pillow: pip install "cl-kernels[timm]"'


class BrokenImageError(ValueError):
    """A picture that cannot be decoded: damaged, cut short, of an unknown kind, or too large."""


def read_picture(source: Path | bytes, *, label: str | None = None, at_least: int | None = None) -> Tensor:
    """Decode a file, or the bytes of one, to uint8 [3, H, W].

    16-bit greys are scaled to 8 bits, palettes and CMYK become RGB, transparent parts become white, and the camera's
    orientation mark is applied. ``at_least`` lets the JPEG decoder skip resolution above twice that many pixels a side.
    Raises `BrokenImageError` naming ``label`` (the path by default): unreadable, truncated, or above Pillow's
    ``MAX_IMAGE_PIXELS`` (89 million), which stands as the user set it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(INSTALL) from error
    name = label if label is not None else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                if at_least is not None and picture.format == "JPEG":
                    picture.draft(None, (2 * at_least, 2 * at_least))
                return from_pillow(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError(f"{name}: more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS}") from error
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, IndexError, KeyError, TypeError) as error:
        # Pillow's decoders raise all of these on damaged files; none of them names the file.
        raise BrokenImageError(f"{name}: not a readable picture ({error})") from error


def picture_size(source: Path | bytes) -> tuple[int, int]:
    """Height and width in the header of a file, or of the bytes of one; the camera's orientation mark is not applied.

    Raises `BrokenImageError` where there is no such header.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(INSTALL) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                return picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"{'bytes' if isinstance(source, bytes) else source}: no size ({error})") from error


def from_pillow(picture: PillowImage.Image) -> Tensor:
    """A Pillow image as uint8 [3, H, W]; raises ``ValueError`` for floating-point pixels."""
    from PIL import ImageOps

    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        grey = torch.from_numpy(np.clip((deep + 128) // 257, 0, 255).astype(np.uint8))
        return grey.unsqueeze(0).expand(3, -1, -1).contiguous()
    return torch.from_numpy(np.array(_to_rgb(picture))).permute(2, 0, 1).contiguous()


def _to_rgb(picture: PillowImage.Image) -> PillowImage.Image:
    from PIL import Image

    see_through = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    if not see_through:
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, whole).convert("RGB")
