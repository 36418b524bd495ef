"""Which logit of which image is explained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_kernels.compare.attribution._view import View

__all__ = ["Target", "chosen_columns", "pieces"]

Target = int | str | Sequence[int] | Tensor


def chosen_columns(view: View, target: Target, images: Tensor, batch_size: int) -> Tensor:
    """The logits' column [B] that `target` means for each of the prepared `images`.

    `target` is "predicted" (each image's most likely class), one class for all images, or a class for each. Raises
    `ValueError` for another word, another length, and classes that the model does not have."""
    count = len(images)
    if isinstance(target, str):
        if target != "predicted":
            raise ValueError(f"target: expected 'predicted', a class or a class for each image, got {target!r}")
        parts = [view.outputs(images[piece]).argmax(dim=1) for piece in pieces(count, batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=images.device)
    if isinstance(target, bool):
        raise ValueError(f"target: expected 'predicted', a class or a class for each image, got {target!r}")
    wanted = torch.as_tensor(target, device=images.device).detach()
    if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool:
        raise ValueError(f"target: expected whole numbers, got {wanted.dtype}")
    if wanted.ndim > 1 or (wanted.ndim == 1 and len(wanted) != count):
        raise ValueError(f"target: expected one class for each of the {count} images, got {tuple(wanted.shape)}")
    columns = view.columns(wanted.to(torch.int64).expand(count).clone())
    if count and view.labels is None:
        width = view.outputs(images[:1]).shape[1]
        if not 0 <= int(columns.min()) <= int(columns.max()) < width:
            raise ValueError(f"target: the model has the classes 0 to {width - 1}, got {sorted(set(columns.tolist()))}")
    return columns


def pieces(count: int, batch_size: int) -> list[slice]:
    """Slices of at most `batch_size`. Raises `ValueError` for a size below 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    return [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
