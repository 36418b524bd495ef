"""Nearest class mean on the frozen feature: no training at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._heads import class_means
from cl_kernels.methods._options import Options
from cl_kernels.methods._task import Batch, Batches, Task

__all__ = ["ClassMean"]


@dataclass(frozen=True, kw_only=True)
class ClassMeanOptions(Options):
    """head="cosine": the class whose mean direction is nearest in angle; "linear": whose mean is nearest
    (Euclidean)."""


class ClassMean(HeadMethod):
    """Classifies by the nearest mean of the training features of a class. The floor every trained method must beat.

    `head="linear"` scores `x . m_k - |m_k|^2 / 2`, whose argmax is the Euclidean nearest mean. In a domain-incremental
    stream the mean runs over all domains seen.
    """

    name: ClassVar[str] = "class-mean"
    options_type: ClassVar[type[Options]] = ClassMeanOptions
    frozen = True

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # head number -> sums of features and counts, by class

    def _make_optimizer(self) -> None:
        """Nothing trains."""

    def _init_head(self, task: Task, new: bool) -> None:
        """Heads are set at the task's end."""

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """Raises `RuntimeError`: this method has nothing to train."""
        raise RuntimeError("class-mean does not train; its optimizer is None after begin_task")

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        pairs = ((self.features(images), labels) for images, labels in loader)
        means = class_means(pairs, self.heads, self._current, self.device)
        cosine = self.options.head == "cosine"
        sums, counts = means.unit if cosine else means.raw, means.counts
        if self._current in self._sums:
            before, seen = self._sums[self._current]
            sums, counts = sums + before, counts + seen
        self._sums[self._current] = (sums, counts)
        centres = sums / counts.clamp(min=1)[:, None]
        head = self.heads.head(self._current)
        head.weight.copy_(centres)
        if head.bias is not None:
            head.bias.copy_(-0.5 * centres.square().sum(dim=1))

    def _state(self) -> dict[str, object]:
        return {"sums": {index: list(pair) for index, pair in self._sums.items()}}

    def _load_state(self, state: dict[str, object]) -> None:
        sums = state["sums"]
        if not isinstance(sums, dict):
            raise ValueError(f"state: expected sums by head, got {type(sums).__name__}")
        self._sums = {index: (pair[0].to(self.device), pair[1].to(self.device)) for index, pair in sums.items()}
