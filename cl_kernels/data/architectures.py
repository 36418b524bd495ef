"""The shape of a backbone in plain values, and the model built from it: what a file must say to stand alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_kernels._timm import import_timm

__all__ = ["FIELDS", "architecture_of", "build_backbone", "checked_fields"]

FIELDS: dict[str, type] = {
    "img_size": int,
    "patch_size": int,
    "in_chans": int,
    "embed_dim": int,
    "depth": int,
    "num_heads": int,
    "global_pool": str,
    "class_token": bool,
}
_LIMITS = {"img_size": 1024, "patch_size": 256, "in_chans": 16, "embed_dim": 4096, "depth": 128, "num_heads": 128}


def checked_fields(shape: object) -> dict[str, Any]:
    """`shape` as arguments of timm's `VisionTransformer`. Raises `ValueError` for other fields, types and sizes."""
    if not isinstance(shape, dict) or set(shape) != set(FIELDS):
        raise ValueError(f"architecture must have the fields {', '.join(FIELDS)}, got {shape}")
    for field, kind in FIELDS.items():
        value: Any = shape[field]
        high = _LIMITS.get(field)
        fits = type(value).__name__ == kind.__name__  # exact, as True is an int too
        if not fits or (high is not None and not 1 <= value <= high):
            raise ValueError(f"architecture field {field!r} is {value!r}")
    return shape


def architecture_of(name: str, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What `build_backbone` needs to build a model of `model`'s shape, which was loaded by `name`.

    `state`: its tensors by the names it was loaded with, where its layers were wrapped since (None: as they are).
    Raises `ValueError` where the two would not have the same tensors: a model put together by hand.
    """
    timm, given = import_timm(), cast(Any, model)  # what a model of another kind lacks is refused below
    try:
        size = int(given.patch_embed.img_size[0])
        is_file = name.endswith(".safetensors")  # and may be called as a model is
        if not is_file and timm.is_model(name.split(".")[0]):
            found: dict[str, Any] = {"timm": name, "img_size": size}
        else:
            found = {
                "img_size": size,
                "patch_size": int(given.patch_embed.patch_size[0]),
                "in_chans": int(given.patch_embed.proj.in_channels),
                "embed_dim": int(given.embed_dim),
                "depth": len(given.blocks),
                "num_heads": int(given.blocks[0].attn.num_heads),
                "global_pool": str(given.global_pool),
                "class_token": bool(given.has_class_token),
            }
        with torch.device("meta"):
            other = build_backbone(found).state_dict()
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"backbone {name!r} has a shape that no name and no fields describe ({error})") from error
    mine = {key: tuple(value.shape) for key, value in (model.state_dict() if state is None else state).items()}
    if mine != {key: tuple(value.shape) for key, value in other.items()}:
        raise ValueError(f"backbone {name!r} is not what its name and shape say: {found}")
    return found


def build_backbone(architecture: Mapping[str, Any]) -> nn.Module:
    """The model that `architecture_of` described, without its weights. Raises `ValueError` for a wrong description."""
    timm = import_timm()
    if "timm" in architecture:
        name, size = architecture["timm"], architecture.get("img_size")
        if set(architecture) != {"timm", "img_size"} or not isinstance(name, str) or not isinstance(size, int):
            raise ValueError(f"architecture: expected timm and img_size, got {dict(architecture)}")
        if not timm.is_model(name.split(".")[0]):
            raise ValueError(f"architecture: timm has no model {name!r}")
        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
        return made
    from timm.models.vision_transformer import VisionTransformer

    shape = checked_fields(dict(architecture))
    try:
        return VisionTransformer(**shape, num_classes=0)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"architecture {shape} cannot be built ({error})") from error
