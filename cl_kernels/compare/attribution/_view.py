"""One way to look into every model that can be explained: its rows, its features, its logits, its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_kernels.continual.deployed import Deployed
from cl_kernels.data.preprocess import Preprocessing
from cl_kernels.nn import LoRAStack, PooledViT, PromptedViT, _backbone
from cl_kernels.nn._prompts import check_options

__all__ = ["Head", "Layout", "View", "isolated", "view_of"]

Head = Callable[[Tensor], Tensor]
SINGLE = "one model for every image"


class Layout(NamedTuple):
    """Where things stand among the rows of a block: `cls` (class token and registers), `patches` (height x width), and
    `others` (shallow prompts, a KD token), which travel on."""

    cls: slice
    patches: slice
    height: int
    width: int
    others: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A model seen from outside: `features` [B, F] of normalised images, `logits` [B, C] of features (None: no head).

    `body` is the module that runs the blocks of `backbone`; `labels` are the classes of the logits' columns (None: the
    columns' own numbers); `single` says whether every image goes through the same weights.
    """

    body: nn.Module
    backbone: Any
    roots: tuple[nn.Module, ...]
    features: Head
    logits: Head | None
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocessing | None = None
    single: bool = True

    @property
    def reads_cls(self) -> bool:
        """Whether the feature is the class token's row; else the patch rows are pooled, and their queries are read."""
        return bool(self.backbone.global_pool == "token") and bool(getattr(self.backbone, "has_class_token", False))

    def outputs(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images. Raises `ValueError` for a model without a head."""
        if self.logits is None:
            raise ValueError(
                f"model: {type(self.body).__name__} has no classifier, so no class can be explained; "
                "give head= (features to logits), or a trained method"
            )
        return self.logits(self.features(images))

    def columns(self, target: Tensor) -> Tensor:
        """The logits' column of each class in `target` [B]. Raises `ValueError` for a class the model does not have."""
        if self.labels is None:
            return target
        column = {label: index for index, label in enumerate(self.labels)}
        missing = sorted(set(target.tolist()) - column.keys())
        if missing:
            raise ValueError(f"target: the model has no class {missing[0]}; it has {_some(self.labels)}")
        return torch.tensor([column[int(label)] for label in target], device=target.device)

    def classes(self, columns: Tensor) -> Tensor:
        """The class of each of the logits' columns."""
        return columns if self.labels is None else torch.tensor(self.labels, device=columns.device)[columns]

    def prepared(self, images: Tensor) -> Tensor:
        """Normalised float images on the model's device, none of them an inference tensor.

        uint8 images go through the model's own preprocessing. Raises `ValueError` where there is none, for images that
        are not finite, and for other shapes than the model's."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(f"images: expected a tensor [B, C, H, W], got {getattr(images, 'shape', type(images))}")
        images = images.detach().clone() if images.is_inference() else images.detach()
        if images.dtype == torch.uint8:
            if self.preprocess is None:
                raise ValueError(
                    "images: uint8 needs the model's preprocessing; give them normalised, as it takes them"
                )
            images = self.preprocess(images)
        like = next(self.body.parameters())
        images = images.to(device=like.device, dtype=like.dtype)
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images: expected finite pixels, got NaN or infinity")
        _backbone.check_images(self.backbone, images)
        return images

    def layout(self, images: Tensor, rows: int) -> Layout:
        """Where the patches of `images` stand among `rows` rows. Raises `ValueError` where they do not add up."""
        tall, wide = (int(side) for side in self.backbone.patch_embed.patch_size)
        height, width = images.shape[2] // tall, images.shape[3] // wide
        before = _backbone.prefix_rows(self.backbone)
        others = rows - before - height * width
        first = others if isinstance(self.body, PromptedViT) and self.body.placement == "prepend" else 0
        if others < 0:
            raise ValueError(f"images: {rows} rows cannot hold {before} tokens and {height} x {width} patches")
        start = first + before
        stop = start + height * width
        beside = (*range(first), *range(stop, rows))
        return Layout(slice(first, start), slice(start, stop), height, width, beside)


def view_of(model: Any, head: Head | None = None) -> View:
    """The view of a timm ViT, `PromptedViT`, `LoRAStack`, `PooledViT`, a `Sequential` of one of them and a head, a
    method of `cl_kernels.methods`, or a `Deployed` model. `head` (features to logits) replaces the model's own.

    Raises `ValueError` for other models, and for weights made under `torch.inference_mode()`, which have no gradient.
    """
    if isinstance(model, View):
        found = model
    elif isinstance(model, Deployed):
        names = tuple(model.class_names)
        found = replace(view_of(model.method), class_names=names, preprocess=model.preprocess)
    elif isinstance(model, nn.Module):
        found = _of_module(model)
    elif all(hasattr(model, name) for name in ("features", "logits", "modules", "backbone", "classes")):
        found = _of_method(model)
    else:
        raise ValueError(f"model: expected a timm ViT, a method or a deployed model, got {type(model).__name__}")
    check_options(found.backbone, 0, "deep", "append")
    if any(parameter.is_inference() for root in found.roots for parameter in root.parameters()):
        raise ValueError("model: its weights were made under torch.inference_mode(), which leaves no gradients to take")
    return found if head is None else replace(found, logits=head, labels=None, class_names=None)


def _of_method(method: Any) -> View:
    roots = tuple(method.modules())
    body = next((root for root in roots if hasattr(root, "backbone")), roots[0])
    single = str(getattr(method, "protocol", SINGLE)) == SINGLE
    if not method.classes:
        raise ValueError("model: the method has not learned any class yet")
    return View(body, method.backbone, roots, method.features, method.logits, tuple(method.classes), single=single)


def _of_module(model: nn.Module) -> View:
    if isinstance(model, nn.Sequential) and len(model) > 1:
        inner, rest = _of_module(model[0]), model[1:]
        return replace(inner, roots=(model,), logits=rest)
    if isinstance(model, PooledViT):
        return View(model, model.backbone, (model,), lambda images: model(images, train=False).cls, None)
    if isinstance(model, (PromptedViT, LoRAStack)) or hasattr(model, "backbone"):
        return View(model, model.backbone, (model,), model, None)
    vit: Any = model
    if not hasattr(vit, "forward_head") or not hasattr(vit, "forward_features"):
        raise ValueError(f"model: expected a timm ViT, a method or a deployed model, got {type(model).__name__}")
    head = getattr(vit, "head", None)
    known = isinstance(head, nn.Module) and not isinstance(head, nn.Identity)
    return View(model, vit, (model,), lambda images: vit.forward_head(vit.forward_features(images), pre_logits=True),
                head if known else None)  # fmt: skip


@contextmanager
def isolated(view: View) -> Iterator[None]:
    """Evaluation mode and normal tensors whatever the caller's mode; every module is as it was afterwards.

    Gradient checkpointing is off meanwhile: its re-entrant form would lose the graph that begins inside a block."""
    modes = {module: module.training for root in view.roots for module in root.modules()}
    recompute = getattr(view.backbone, "grad_checkpointing", None)
    try:
        for root in view.roots:
            root.eval()
        if recompute:
            view.backbone.grad_checkpointing = False
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if recompute:
            view.backbone.grad_checkpointing = recompute


def _some(labels: Sequence[int]) -> str:
    shown = ", ".join(str(label) for label in labels[:8])
    return f"{shown} and {len(labels) - 8} more" if len(labels) > 8 else shown
