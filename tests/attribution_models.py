"""Models to explain, shared by the tests of maps and pictures: small, of every kind, and one that is built by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels import methods
from cl_kernels.nn import PromptedViT

SIDE, PATCH, GRID, CLASSES = 32, 8, 4, 5


def vit(*, pool: str = "token", depth: int = 3, classes: int = CLASSES, seed: int = 11, **options: Any) -> Any:
    """A random timm ViT of 4 x 4 patches whose blocks are not idle."""
    timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    torch.manual_seed(seed)
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": depth, "num_heads": 4}
    token = pool == "token"
    model = timm.VisionTransformer(**(shape | options), num_classes=classes, global_pool=pool, class_token=token)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)) if "norm" in name else 4)
            elif name.startswith("head"):
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompted(prompts: int, depth: Any = "deep", placement: str = "append", pool: str = "token") -> nn.Sequential:
    """A `PromptedViT` and a linear head; the same prompts whatever the placement."""
    generator = torch.Generator().manual_seed(5)
    body = PromptedViT(vit(pool=pool, classes=0), prompts, depth, placement, generator=generator)
    head = nn.Linear(body.num_features, CLASSES)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(6)))
    return nn.Sequential(body, head)


@dataclass(frozen=True)
class Toy:
    """A task of noisy pictures of its classes."""

    index: int
    classes: tuple[int, ...]
    last: bool = False
    epochs: int = 1

    def all(self) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(self.classes).repeat_interleave(4)
        means = torch.randn(20, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
        return images(len(labels), 100 + self.index) + 0.5 * means[labels], labels

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels = self.all()
        yield from zip(pixels.split(8), labels.split(8), strict=True)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


def learned(name: str, *, pool: str = "token", **options: Any) -> Any:
    """A method after a step on each of two tasks, whose labels are not their columns' numbers."""
    torch.manual_seed(3)
    method = methods.create(name, vit(pool=pool, classes=0), **options)
    for task in (Toy(0, (7, 2)), Toy(1, (0, 4), last=True)):
        method.begin_task(task)
        if method.optimizer is not None:
            method.optimizer.zero_grad()
            method.loss(task.all()).backward()
            method.optimizer.step()
        method.end_task(task, task.batches())
    return method


def planted() -> Any:
    """A ViT whose logit 1 hears one thing: a patch of pixels 1 in channel 0 among patches of zeros.

    A patch of zeros is a row of zeros, before and after the norm: no key, no value. The marked patch is a row along
    axis 1; the class token's query meets its key with a large score, and its value moves axis 2, which the head reads.
    The first block passes everything on."""
    model = vit(depth=2, embed_dim=16, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        model.cls_token[..., 0] = 1.0
        model.patch_embed.proj.weight[1, 0] = 1 / PATCH**2
        for block in model.blocks:
            qkv, width = block.attn.qkv, 16
            qkv.bias[0] = qkv.bias[8] = 4.0  # every query, the same for both heads
            qkv.weight[width, 1] = qkv.weight[width + 8, 1] = 2.0  # keys of marked rows
            qkv.weight[2 * width, 1] = qkv.weight[2 * width + 8, 1] = 1.0
        last = model.blocks[-1].attn.proj.weight
        last[2, 0] = last[2, 8] = 1.0
        model.head.weight[1, 2] = 3.0
    return model


def marked(place: int) -> Tensor:
    """An image of zeros but for the patch `place`."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    row, column = PATCH * (place // GRID), PATCH * (place % GRID)
    image[:, 0, row : row + PATCH, column : column + PATCH] = 1.0
    return image
