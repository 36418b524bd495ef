"""A trained method and its backbone in one safetensors file, and back: what runs in production."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels import methods
from cl_kernels.continual import checkpoint
from cl_kernels.data.architectures import architecture_of, build_backbone
from cl_kernels.data.preprocess import Preprocessing
from cl_kernels.errors import CheckpointError
from cl_kernels.nn._backbone import plain_state

__all__ = ["Deployed", "load_model", "save_model"]

FINGERPRINT = "model"


class Deployed(nn.Module):
    """A trained method, for inference: uint8 images [B, C, H, W] of any size give logits [B, classes].

    `classes` are the columns' labels in the numbering of the training data, `class_names` their names. Grey and RGB
    images are scaled, cut and normalised as in training.
    """

    def __init__(self, method: methods.Method, preprocess: Preprocessing, class_names: list[str]) -> None:
        super().__init__()
        self._method, self.preprocess = method, preprocess
        self.parts = nn.ModuleList(method.modules())
        self.classes = list(method.classes)
        self.class_names = [class_names[label] for label in self.classes]

    @property
    def method(self) -> methods.Method:
        """The method inside, which takes normalised images and gives gradients."""
        return self._method

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self._method.predict(self.preprocess(images))

    def names(self, images: Tensor) -> list[str]:
        """The most likely class of each image."""
        return [self.class_names[column] for column in self(images).argmax(dim=1).tolist()]

    def train(self, mode: bool = True) -> Deployed:
        """Stays in evaluation mode."""
        return super().train(False)


def save_model(
    path: Path,
    method: methods.Method,
    *,
    name: str,
    options: Mapping[str, Any],
    backbone: str,
    preprocess: Preprocessing,
    class_names: list[str],
) -> None:
    """Write a trained method with its backbone's weights to `path`, atomically; `load_model(path)` brings it back.

    `name` and `options` made the method, `backbone` is the name its backbone was loaded by. Raises `ValueError` for a
    backbone that cannot be rebuilt from its name and attributes, and `OSError` with the old file in place.
    """
    state = plain_state(method.backbone)
    tree = {
        "method": name,
        "options": json.dumps(dict(options)),
        "architecture": json.dumps(architecture_of(backbone, method.backbone, state)),
        "preprocessing": json.dumps(vars(preprocess)),
        "class_names": list(class_names),
        "backbone": state,
        "state": method.inference_state(),
    }
    checkpoint.save_atomically(path, tree, fingerprint=FINGERPRINT)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Deployed:
    """The model that `save_model` (or `cl-kernels train ... --teacher`) wrote; executes nothing that is in the file.

    Raises `FileNotFoundError`, and `CheckpointError` for a damaged or foreign file."""
    path, where = Path(path), torch.device(device)
    if not path.is_file():
        raise FileNotFoundError(f"model {str(path)!r}: there is no such file")
    tree = checkpoint.load(path, fingerprint=FINGERPRINT, device=where)
    try:
        settings = json.loads(tree["preprocessing"])
        settings |= {key: tuple(settings[key]) for key in ("mean", "std")}
        backbone = build_backbone(json.loads(tree["architecture"]))
        backbone.load_state_dict(tree["backbone"])
        method = methods.create(tree["method"], backbone.to(where).eval(), **json.loads(tree["options"]))
        method.load_state_dict(tree["state"])
        return Deployed(method, Preprocessing(**settings), tree["class_names"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a model of this package ({type(error).__name__}: {error})") from error
