"""A frozen timm vision transformer: its fingerprint, its input, and the rows of its last block that anyone reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_images", "digest", "digest_of", "embed", "plain_state", "prefix_rows", "reads_one_row"]


def check_images(backbone: Any, images: Tensor) -> None:
    """Raise `ValueError` unless `images` are [B, C, H, W] of the size that the backbone takes."""
    patches = backbone.patch_embed
    size = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", True) else None
    wanted = (getattr(backbone, "in_chans", None), *(size or (None, None)))
    fits = images.ndim == 4 and all(w in (None, s) for w, s in zip(wanted, images.shape[1:], strict=True))
    if not fits:
        shape = ", ".join("any" if w is None else str(w) for w in wanted)
        raise ValueError(f"images: expected shape [batch, {shape}], got {tuple(images.shape)}")


def embed(backbone: Any, images: Tensor) -> Tensor:
    """Rows [B, N, D] as block 0 gets them."""
    rows: Tensor = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))
    return rows


def prefix_rows(backbone: Any) -> int:
    """How many rows stand before the patches: class token and registers."""
    return int(getattr(backbone, "num_prefix_tokens", 1))


def reads_one_row(backbone: Any) -> bool:
    """Whether the feature is row 0 alone, so that the last block need not compute the others."""
    return backbone.global_pool == "token" and getattr(backbone, "attn_pool", None) is None


def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors of a timm model under its own names, where a `LoRAStack` may have wrapped its layers."""
    return {
        name.replace(".base.", "."): value
        for name, value in backbone.state_dict().items()
        if isinstance(value, Tensor) and ".adapters." not in name
    }


@torch.no_grad()
def digest(module: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    return digest_of(module.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The same over tensors by name."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
