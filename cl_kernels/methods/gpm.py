"""GPM: gradient projection memory (Saha, Garg and Roy, ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._bodies import BodyOptions
from cl_kernels.methods._memory import Grown, Memory
from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._projected import Projected, ProjectedPrompts, ProjectedWeights
from cl_kernels.methods._task import Batches
from cl_kernels.methods._weights import LINEAR_TARGETS
from cl_kernels.optim import ProjectedSGD

__all__ = ["GPMOptions", "create_gpm", "subset"]


@dataclass(frozen=True, kw_only=True)
class GPMOptions(BodyOptions):
    """Options of `gpm`; betas and eps are without effect.

    * base: "full" as published, or "prompts", with the statistics of NSP2.
    * lr: 0.1 for weights, 10 for prompts if None; head_lr: SGD needs more than the 1e-3 of Adam.
    * threshold, increment: task t (from 0) adds directions until threshold + increment t (at most 1) of its energy is
      captured (published: 0.97 + 0.003 t for 10-split CIFAR-100, a small convolutional net).
    * per_layer: thresholds of parameters whose names contain a word, such as {"mlp" = 0.99}; the longest word wins.
    * mode: "paper" captures at least the threshold; "repository" stops one direction short in the first task, as the
      official code does.
    * samples_per_task: a random subset of the task's images for the memory (published: 125); None takes all.
    * momentum: of the SGD, 0 as published; the whole update is projected.
    * sides: of the prompts: "both", "left" or "right" alone.
    """

    allowed_targets: ClassVar[tuple[str, ...]] = LINEAR_TARGETS
    base: str = "full"
    head_lr: float | None = 1e-2
    threshold: float = 0.9
    increment: float = 0.003
    per_layer: Mapping[str, float] | None = None
    mode: str = "paper"
    samples_per_task: int | None = None
    momentum: float = 0.0
    sides: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", number(self.threshold, 0.0, 1.0), "a number in [0, 1]", self.threshold)
        require("increment", number(self.increment, 0.0, 1.0), "a number in [0, 1]", self.increment)
        table = self.per_layer
        fits = table is None or (
            isinstance(table, Mapping)
            and all(isinstance(word, str) and word and number(value, 0.0, 1.0) for word, value in table.items())
        )
        require("per_layer", fits, "None or a table of words and numbers in [0, 1]", table)
        require("mode", self.mode in ("paper", "repository"), "paper or repository", self.mode)
        fits = self.samples_per_task is None or count(self.samples_per_task, 1, 10**9)
        require("samples_per_task", fits, "None or a number of images", self.samples_per_task)
        momentum = number(self.momentum, 0.0, 1.0) and self.momentum < 1
        require("momentum", momentum, "a number in [0, 1)", self.momentum)
        require("sides", self.sides in ("both", "left", "right"), "both, left or right", self.sides)

    def keep(self, task: int, parameter: str) -> float:
        """The share of the energy of `parameter`'s inputs to capture in `task`."""
        words = sorted((word for word in self.per_layer or {} if word in parameter), key=len)
        base = self.per_layer[words[-1]] if self.per_layer and words else self.threshold
        return min(base + self.increment * task, 1.0)


class GPM(Projected):
    """From task 2 on the SGD step on W is projected off M, a basis of the inputs that earlier tasks used:
    `dW = -lr g (I - M M^T)`; for prompts from both sides.

    After each task but the last: C of the task's inputs alone (their Gram matrix stands for GPM's SVD of the inputs,
    without keeping them), then M <- [M, leading eigenvectors of (I - M M^T) C (I - M M^T)], the fewest with which M
    holds the threshold's share of C. Projecting the step of plain SGD is projecting the gradient; with momentum or
    decay only the former keeps the promise. Guaranteed: M^T M = I to rounding after every task; M only grows, so what
    one task protects stays protected; an input inside M gives the same layer output for ever; a new task's captured
    energy is at least the threshold ("paper"). Not guaranteed: the share beyond the threshold, which accumulates over
    tasks. State: M, at most [in, in] a layer, and no moments.

    Traps of the official code that cannot occur (method-null-space.md 15.2): the first task's rank one short of the
    threshold (an option, "repository"); parameters chosen by a magic count k < 15 instead of by name; a dense [in, in]
    projector in every step (the thinner of the protected and the free basis is applied); bases never
    re-orthogonalised; columns cut off once they exceed the rows (they cannot exceed them, and a full basis freezes the
    layer with a warning). Its learning rate falls when the validation loss stops falling; here it follows `schedule`.
    BatchNorm, frozen there after task 1, does not occur in a vision transformer; LayerNorm and biases do not train."""

    name: ClassVar[str] = "gpm"
    options_type: ClassVar[type[Options]] = GPMOptions
    default_lr: ClassVar[float] = 0.1
    default_weight_decay: ClassVar[float] = 0.0
    options: GPMOptions

    def _new_memory(self) -> Memory:
        sides = ("left", "right") if self.options.sides == "both" else (self.options.sides,)
        return Grown(self.options.keep, sides, self.options.mode == "repository")

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ProjectedSGD(groups, lr=self._learning_rate(), momentum=self.options.momentum)

    def _images(self, loader: Batches) -> Batches:
        size = self.options.samples_per_task
        return loader if size is None else subset(loader, size, seed=self.tasks[-1].index)


class GPMPrompts(GPM, ProjectedPrompts):
    """GPM on visual prompts."""

    default_lr: ClassVar[float] = 10.0

    options: GPMOptions


class GPMWeights(GPM, ProjectedWeights):
    """GPM on the linear layers of the blocks; `sides` is without effect."""

    options: GPMOptions

    def _new_memory(self) -> Memory:
        return Grown(self.options.keep, ("right",), self.options.mode == "repository")


def subset(batches: Batches, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """At most `size` images of `batches`, each set of them equally likely, in batches no larger than the largest given.

    One pass, and `size` images and one batch in memory: every image draws a number, the smallest stay."""
    generator = torch.Generator().manual_seed(seed)
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    width = 1
    for images, labels in batches:
        keys = torch.rand(len(labels), dtype=torch.float64, generator=generator)
        width = max(width, len(labels))
        if kept is not None:
            images, labels, keys = (torch.cat(pair) for pair in zip(kept, (images, labels, keys), strict=True))
        chosen = keys.topk(min(size, len(keys)), largest=False).indices.sort().values
        kept = images[chosen.to(images.device)], labels[chosen.to(labels.device)], keys[chosen]
    if kept is None:
        return []
    parts = math.ceil(len(kept[2]) / width)
    return list(zip(kept[0].chunk(parts), kept[1].chunk(parts), strict=True))


def create_gpm(backbone: nn.Module, options: GPMOptions) -> HeadMethod:
    """The form that `options.base` names."""
    return GPMWeights(backbone, options) if options.base == "full" else GPMPrompts(backbone, options)
