"""Backbones: a timm vision transformer without its head, with weights from a local safetensors file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cl_kernels._timm import import_timm
from cl_kernels.data.architectures import build_backbone, checked_fields
from cl_kernels.data.preprocess import Preprocessing
from cl_kernels.errors import CheckpointError

__all__ = ["Backbone", "embedded_weights", "load_backbone"]

EMBEDDED = {"embedded": "vit_omniglot.safetensors", "embedded-small": "vit_omniglot_small.safetensors"}


class Backbone(NamedTuple):
    """A timm model with ``num_classes=0`` and what it expects of its input."""

    model: nn.Module
    preprocessing: Preprocessing


def embedded_weights(name: str = "embedded") -> Path:
    """Where the weights that ship with the package lie; a model card lies beside them."""
    return Path(str(files("cl_kernels.data") / "weights" / EMBEDDED[name]))


def load_backbone(
    name: str | os.PathLike[str] = "embedded",
    weights: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
) -> Backbone:
    """Build a vision transformer, load its weights, drop its head.

    ``name``: ``embedded`` or ``embedded-small`` (ours, in the package), a ``.safetensors`` file written by
    ``examples/pretrain_backbone.py`` (its metadata says the shape), or any timm model name, for which ``weights`` names
    a safetensors file in timm's layout; ``weights="random"`` leaves timm's initialisation. ``image_size`` builds a timm
    model for another input size and resamples its position embedding. Nothing is downloaded.

    Raises ``ValueError`` for an unknown name (nearest offered) or missing weights, ``FileNotFoundError`` for a missing
    file, `CheckpointError` for a damaged file and for keys or shapes that do not fit; ``ImportError`` without timm.
    """
    text = os.fspath(name)
    if text in EMBEDDED or text.endswith(".safetensors"):
        if image_size is not None:
            raise ValueError(f"image_size applies to timm models, not to backbone {text!r}, which has its own")
        return _own(embedded_weights(text) if text in EMBEDDED else Path(text), weights)
    return _timm(text, weights, image_size)


def _own(path: Path, weights: str | os.PathLike[str] | None) -> Backbone:
    """A model whose shape is in the file's metadata; ``weights`` may replace the embedded file."""
    path = path if weights is None else Path(weights)
    tensors, metadata = _read(path)
    shape = _architecture(path, metadata)
    try:
        model = build_backbone(shape)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _fill(model, tensors, path)
    channels = int(shape["in_chans"])
    mean, std = (_per_channel(path, metadata, field, channels) for field in ("mean", "std"))
    return Backbone(model.eval(), Preprocessing(int(shape["img_size"]), mean, std, channels))


def _timm(name: str, weights: str | os.PathLike[str] | None, image_size: int | None) -> Backbone:
    timm = import_timm()
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, [*EMBEDDED, *timm.list_models()], n=3, cutoff=0.4)
        raise ValueError(f"unknown backbone {name!r}; nearest: {', '.join(near) or 'embedded'}")
    if weights is None:
        raise ValueError(
            f"backbone {name!r} needs its weights and nothing is downloaded: give --weights FILE.safetensors "
            "(--teacher-weights for a teacher)"
        )
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} takes no image_size ({error})") from error
    if weights != "random":
        path = Path(weights)
        tensors, _ = _read(path)
        _fill(model, _resampled(model, tensors), path)
    return Backbone(model.eval(), _timm_preprocessing(name, model, image_size))


def _timm_preprocessing(name: str, model: nn.Module, image_size: int | None) -> Preprocessing:
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    if image_size is not None:
        height = width = image_size
    if height != width:
        raise ValueError(f"backbone {name!r} takes {height}x{width} images; only square ones are supported")
    return Preprocessing(
        int(height),
        tuple(float(value) for value in config.get("mean", (0.5,) * channels)),
        tuple(float(value) for value in config.get("std", (0.5,) * channels)),
        int(channels),
        "bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked finite."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights {os.fspath(path)!r}: there is no such file")
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK" or magic[:1] == b"\x80":
        raise CheckpointError(f"{path} is a pickle; weights must be a safetensors file, which executes nothing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a handle, not a dict
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: tensor {key!r} holds NaN or infinity")
    return tensors, metadata


def _architecture(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        shape = json.loads(metadata["architecture"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say its architecture; give a timm name as backbone and this as weights"
        ) from error
    try:
        return checked_fields(shape)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _per_channel(path: Path, metadata: Mapping[str, str], field: str, channels: int) -> tuple[float, ...]:
    try:
        return (float(metadata[field]),) * channels
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: metadata field {field!r} must be a number") from error


def _resampled(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings for another input size than the file's, resampled as timm does."""
    held, wanted = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if held is None or wanted is None or held.shape == wanted.shape or held.shape[-1] != wanted.shape[-1]:
        return tensors
    from timm.layers.pos_embed import resample_abs_pos_embed

    embed: Any = model.patch_embed
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 1))
    new = resample_abs_pos_embed(held.float(), new_size=list(embed.grid_size), num_prefix_tokens=prefix)
    return {**tensors, "pos_embed": new}


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy every tensor the model wants; heads in the file are left out, any other difference is an error."""
    wanted = model.state_dict()
    given = {
        key: value for key, value in tensors.items() if key in wanted or not key.startswith(("head.", "head_dist."))
    }
    problems = [f"missing {key}" for key in wanted if key not in given]
    problems += [f"unexpected {key}" for key in given if key not in wanted]
    problems += [
        f"{key} is {tuple(given[key].shape)}, wanted {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} does not fit the backbone: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({key: value.to(wanted[key].dtype) for key, value in given.items()})
