"""Methods that train a pool of prompts on a frozen backbone, chosen for each image by a query of that backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._options import Options, count, require
from cl_kernels.methods._task import Batch, Batches, Task
from cl_kernels.nn import Pooled, PooledViT, PromptPool

__all__ = ["PoolMethod", "PoolOptions", "even", "first"]


@dataclass(frozen=True, kw_only=True)
class PoolOptions(Options, ABC):
    """Options of methods with a prompt pool; a subclass says which pool they describe."""

    @abstractmethod
    def pool(self, backbone: nn.Module, *, query_dim: int | None = None) -> PromptPool:
        """The pool for a backbone; `query_dim` is the query's width (None: the backbone's)."""


class PoolMethod(HeadMethod):
    """A pool of prompts and heads, trained by Adam without decay; the backbone is frozen and its digest is checked.

    Timeline of a task: the pool begins it, train, see which prompts the task's images choose, evaluate. The query is
    one more forward pass without gradient; without augmentation it is computed once an image and phase. Resets of the
    optimizer at every task, and heads that train on the task's own classes, are as published.
    """

    options_type: ClassVar[type[Options]] = PoolOptions
    default_lr: ClassVar[float] = 1e-3
    default_weight_decay: ClassVar[float] = 0.0
    options: PoolOptions
    model: PooledViT

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._seed = int(torch.randint(2**31, ()))  # what later tasks draw is drawn alike in a resumed run
        self._digest: str | None = None
        self._usage: dict[str, list[float]] = {}
        self._training = False

    @property
    def pool(self) -> PromptPool:
        """The pool."""
        if self.model.pool is None:
            raise RuntimeError(f"{self.name}: the model has no pool")
        return self.model.pool

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        return PooledViT(backbone, self.options.pool(backbone))

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"pool.{name}", parameter) for name, parameter in self.pool.trainable_parameters()]

    def _start(self, task: Task) -> None:
        if self._digest is None:
            self._digest = self.model.backbone_digest()
        number = self.pool.task + 1
        self.pool.begin_task(number, generator=torch.Generator().manual_seed(self._seed + number))

    def _init_head(self, task: Task, new: bool) -> None:
        """Heads start from the features that the task will train on: those with its own prompts."""
        self._training = True
        try:
            super()._init_head(task, new)
        finally:
            self._training = False

    def per_image(self, images: Tensor) -> tuple[Tensor, ...]:
        """The query."""
        return (self.model.query(images),) if self.pool.needs_query else ()

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """Mean cross-entropy over the task's own classes and the pool's loss; `facts` holds the query, if given."""
        images, labels = batch
        found: Pooled = self.model(images, facts[0] if facts else None, train=True)
        return self._cross_entropy(found.cls, labels) + found.loss

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] with the prompts that inference chooses."""
        found: Pooled = self.model(images, train=self._training)
        return found.cls

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        self.pool.end_task()
        self.check_backbone()
        self._usage = self._count(loader) if self.pool.needs_query else {}

    def check_backbone(self) -> None:
        """Raise `RuntimeError` unless the frozen backbone is bit for bit what it was at the first task."""
        if self.model.backbone_digest() != self._digest:
            raise RuntimeError(f"{self.name}: the frozen backbone changed during task {self.tasks[-1].index}")

    def _count(self, loader: Batches) -> dict[str, list[float]]:
        sums: dict[int, Tensor] = {}
        images = 0
        for batch, _ in loader:
            images += len(batch)
            for layer, used in self.pool.usage(self.model.query(batch)).items():
                sums[layer] = sums[layer] + used if layer in sums else used
        return {f"blocks.{layer}": (used / max(images, 1)).tolist() for layer, used in sums.items()}

    def prompt_usage(self) -> dict[str, list[float]]:
        """By block, what share of the last task's images chooses each entry (CODA-Prompt: its mean absolute weight)."""
        return self._usage

    def _state(self) -> dict[str, Any]:
        kept = dict(self.pool.state_dict())
        return {"pool": kept, "seed": self._seed, "digest": self._digest, "usage": self._usage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the pool first, whose shapes depend on the tasks so far."""
        self.pool.load_state_dict(state["own"]["pool"])
        super().load_state_dict(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        self._seed, self._digest, self._usage = state["seed"], state["digest"], state["usage"]


def even(name: str, value: object) -> None:
    """Refuse a prompt length that cannot be halved into keys and values."""
    fits = count(value, 2, 4096) and isinstance(value, int) and value % 2 == 0
    require(name, fits, "an even int in [2, 4096], half keys and half values", value)


def first(name: str, blocks: int | None, backbone: Any) -> range | None:
    """The first `blocks` blocks of a backbone; None leaves the choice to the pool."""
    if blocks is None:
        return None
    depth = len(getattr(backbone, "blocks", ()))
    require(name, blocks <= depth, f"at most the {depth} blocks of the backbone", blocks)
    return range(blocks)
