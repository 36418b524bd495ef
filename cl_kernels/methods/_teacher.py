"""The teacher of a continual distillation: a pool method of its own, keyed by its student's query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_kernels.methods._pools import PoolMethod, PoolOptions
from cl_kernels.methods._task import Batch
from cl_kernels.nn import Pooled, PooledViT

__all__ = ["Teacher"]


class Teacher(PoolMethod):
    """Prompts and heads on the larger backbone, trained before its student in every task; it forgets like any other.

    Images come as the student wants them: `adapt` turns them into the teacher's. Its pool is keyed by the student's
    `query` [B, `query_dim`], which is computed once for both. `whole` keeps all rows of the last block.
    """

    name: ClassVar[str] = "teacher"

    def __init__(
        self,
        backbone: nn.Module,
        options: PoolOptions,
        *,
        query: Callable[[Tensor], Tensor],
        query_dim: int,
        adapt: Callable[[Tensor], Tensor],
        whole: bool,
    ) -> None:
        self._query, self._query_dim, self._adapt, self._whole = query, query_dim, adapt, whole
        super().__init__(backbone, options)

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        pool = self.options.pool(backbone, query_dim=self._query_dim)
        return PooledViT(backbone, pool, prune=not self._whole)

    def look(self, images: Tensor, query: Tensor | None = None, *, train: bool = False) -> Pooled:
        """What the model makes of a student's images; `query` is the student's, computed here where it is None."""
        if query is None and self.pool.needs_query:
            query = self._query(images)
        found: Pooled = self.model(self._adapt(images), query, train=train)
        return found

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of a student's images, with the prompts that inference chooses."""
        return self.look(images, train=self._training).cls

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """Mean cross-entropy over the task's own classes and the pool's loss; `facts` holds the query, if given."""
        images, labels = batch
        found = self.look(images, facts[0] if facts else None, train=True)
        return self._cross_entropy(found.cls, labels) + found.loss

    @torch.no_grad()
    def targets(self, images: Tensor, query: Tensor | None) -> Tensor:
        """Logits [B, classes of the task] of the current task's head, with the prompts that inference chooses."""
        logits: Tensor = self.heads.head(self._current)(self.look(images, query).cls)
        return logits

    def rest(self) -> None:
        """The task is trained: nothing of the teacher moves until the next."""
        self.optimizer = self.scheduler = None
        self.pool.end_task()
        self._freeze()
        self.check_backbone()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, at rest where it was."""
        super().load_state_dict(state)
        if self.optimizer is None:
            self._freeze()

    def _freeze(self) -> None:
        for _, parameter in self._saved_parameters():
            parameter.requires_grad_(False)
