"""From pixels to patches."""

from __future__ import annotations

from torch import Tensor

__all__ = ["on_patches"]


def on_patches(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [B, H, W] summed over the pixels of each of height x width patches; patch maps pass through.

    Raises `ValueError` where the patches do not fit the maps."""
    if tuple(maps.shape[1:]) == (height, width):
        return maps
    if maps.ndim != 3 or maps.shape[1] % height or maps.shape[2] % width:
        raise ValueError(f"maps: expected [B, {height}, {width}] or pixels of them, got {tuple(maps.shape)}")
    summed: Tensor = maps.unflatten(2, (width, -1)).unflatten(1, (height, -1)).sum(dim=(2, 4))
    return summed
