"""A model and a data set small enough to train in a second, shared by the tests of methods and continual runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cl_kernels.continual import RunConfig
from cl_kernels.data import Backbone, ImageData, ImageSet, Preprocessing
from cl_kernels.data.sets import TensorImages

SIZE = 16


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and waiting threads of a busy machine cost a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_data(classes: int = 6, train: int = 10, test: int = 5, size: int = SIZE) -> ImageData:
    """Every class is a random picture; its images are that picture and strong noise."""
    generator = torch.Generator().manual_seed(7)
    prototypes = torch.randint(0, 256, (classes, 3, size, size), generator=generator).float()

    def part(count: int) -> ImageSet:
        labels = torch.arange(classes).repeat_interleave(count)
        noise = 60 * torch.randn(classes * count, 3, size, size, generator=generator)
        images = (prototypes[labels] + noise).clamp(0, 255).to(torch.uint8)
        return ImageSet(TensorImages(images), labels)

    return ImageData("tiny", part(train), part(test), [f"class {index}" for index in range(classes)])


def tiny_model(dim: int = 32, depth: int = 2, heads: int = 2, **options: Any) -> nn.Module:
    """A timm ViT with unequal norm gains, so that what depends on them shows."""
    timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    torch.manual_seed(11)
    model: nn.Module = timm.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0, **options
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)))
            elif name.endswith("weight") and "blocks" in name:
                parameter.mul_(4)  # timm's 0.02 leaves the blocks almost idle
    return model


def tiny_backbone(**options: Any) -> Backbone:
    """The model and its preprocessing."""
    return Backbone(tiny_model(**options), Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))


def tiny_config(method: str, **changes: Any) -> RunConfig:
    """Three tasks of two classes, three epochs of three steps each."""
    weights = ("full", "null-space", "adam-nscl", "ftp", "tpgm", "spd", "l2-sp", "wise-ft")
    lr = 1e-3 if method in weights else 1e-2
    values: dict[str, Any] = {"tasks": 3, "epochs": 3, "batch_size": 8, "lr": lr, "threads": 1, "device": "cpu"}
    return RunConfig(method, **{"data": "tiny", "backbone": "tiny", **values, **changes})
