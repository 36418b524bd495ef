"""APT: vectors that are added to a row of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_kernels.nn.prompt_pool import LayerPrompt, PromptPool, split_heads

__all__ = ["APT"]


class APT(PromptPool):
    """APT: one vector for the keys and one for the values of every block, added to the class token's row.

    `K[:, :, 0] += u_K`, `V[:, :, 0] += u_V`, started from a truncated normal of std 0.02. Inference uses a running
    mean: `g = u` after task 1, then `g <- momentum g + (1 - momentum) u`. On a backbone without a class token they are
    added to every row that is pooled; equal shifts of all keys then cancel in the softmax, which leaves `u_V`.

    `merge="before"` (default): inference inside a task counts what is trained so far, as `end_task` will. The official
    code merges only after the student was trained (`merge="after"`), so that its teacher makes targets with prompts of
    zeros in task 1 and stale ones later. Its head (a LayerNorm and row-normalised weights) is the method's choice.
    """

    needs_query: ClassVar[bool] = False
    adds: ClassVar[bool] = True
    merged: Tensor

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        *,
        momentum: float = 0.7,
        layers: Sequence[int] | None = None,
        merge: str = "before",
        query_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, blocks, heads, range(blocks) if layers is None else layers, query_dim)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1], got {momentum!r}")
        if merge not in ("before", "after"):
            raise ValueError(f"merge: expected 'before' or 'after', got {merge!r}")
        self.momentum, self.merge = float(momentum), merge
        drawn = torch.empty(len(self.layers), 2, dim)
        nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
        self.vectors = nn.Parameter(drawn)
        self.register_buffer("merged", torch.zeros_like(drawn))
        self._ended = -1  # the last task that is in `merged`

    def end_task(self) -> None:
        """Merge what the task trained; a second call for the same task changes nothing."""
        if self._ended < self.task:
            self.merged = self._mean().detach().clone()
            self._ended = self.task

    def _mean(self) -> Tensor:
        if self.task == 0:
            return self.vectors
        return self.momentum * self.merged + (1 - self.momentum) * self.vectors

    def _prompts(self, query: Tensor, layer: int, train: bool) -> LayerPrompt | None:
        if train:
            rows: Tensor = self.vectors
        else:
            rows = self._mean() if self.merge == "before" and self._ended < self.task else self.merged
        k, v = rows[self.layers.index(layer)].unsqueeze(1).split(1)
        return LayerPrompt(split_heads(k, self.heads), split_heads(v, self.heads))

    def get_extra_state(self) -> dict[str, int]:
        """Plain values."""
        return {**super().get_extra_state(), "ended": self._ended}

    def set_extra_state(self, state: dict[str, int]) -> None:
        super().set_extra_state(state)
        self._ended = int(state["ended"])
