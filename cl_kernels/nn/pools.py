"""The pools with keys, L2P and DualPrompt, and APT, which adds to a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.nn.prompt_pool import (
    Grown,
    LayerPrompt,
    PromptPool,
    at_least_one,
    cosines,
    even,
    of_kind,
    pairs,
    split_heads,
    uniform,
)

__all__ = ["APT", "L2P", "DualPrompt"]


class _Entries(Grown):
    """Prompts [M, 2 m, D] and their keys [M, Dq], all of which train."""

    def __init__(self, prompts: Tensor, keys: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.keys = nn.Parameter(keys)


class L2P(PromptPool):
    """The pool of L2P in the shallow form of CODA-Prompt's code ("L2P++"): the `top` nearest of `size` prompts.

    `s_j = cos(q, k_j)` and `S = top5_j(s_j)` for every image; their prompts are concatenated, 5 x 20 rows giving 50
    keys and 50 values. Loss ``pull * mean_b sum_{j in S_b} (1 - s_bj)``; only the selected prompts and keys get a
    gradient. `layers` defaults to block 0. All prompts train in every task.

    Wang et al. (2022) instead put tokens before the image at the input (pool 10, length 5, weight 0.5); the sum over
    the batch of later code makes the loss depend on its size. Raises `ValueError` where `top` exceeds `size`.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        *,
        size: int = 30,
        length: int = 20,
        top: int = 5,
        layers: Sequence[int] | None = None,
        pull: float = 1.0,
        query_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, blocks, heads, (0,) if layers is None else layers, query_dim)
        self.size, self.length, self.pull = at_least_one("size", size), even("length", length), float(pull)
        if at_least_one("top", top) > size:
            raise ValueError(f"top: expected at most size = {size}, got {top}")
        self.top = top
        self.entries = nn.ModuleDict()
        for layer in self.layers:
            prompts = uniform(size, length, dim, generator=generator)
            self.entries[str(layer)] = _Entries(prompts, uniform(size, self.query_dim, generator=generator))

    def _prompts(self, query: Tensor, layer: int, train: bool) -> LayerPrompt | None:
        entries = of_kind(self.entries[str(layer)], _Entries)
        found = cosines(query, entries.keys).topk(self.top, dim=1)
        # embedding rather than indexing: its gradient is a sum in a fixed order, with any number of threads
        rows = F.embedding(found.indices, entries.prompts.flatten(1)).unflatten(-1, (self.length, self.dim))
        k, v = (split_heads(half.flatten(1, 2), self.heads) for half in rows.chunk(2, dim=2))
        return LayerPrompt(k, v, self.pull * (1 - found.values).sum(dim=1).mean() if train else None)

    def _choices(self, query: Tensor, layer: int) -> Tensor:
        similar = cosines(query, of_kind(self.entries[str(layer)], _Entries).keys)
        return torch.zeros_like(similar).scatter_(1, similar.topk(self.top, dim=1).indices, 1.0)


class _Bank(Grown):
    """Entries of all tasks: prompts [M, 2 m, D], keys [M, Dq]; the current task's are parameters of their own."""

    bank_prompts: Tensor
    bank_keys: Tensor

    def __init__(self, prompts: Tensor, keys: Tensor) -> None:
        super().__init__()
        self.register_buffer("bank_prompts", prompts)
        self.register_buffer("bank_keys", keys)
        self.prompt = nn.Parameter(prompts[:1].clone())
        self.key = nn.Parameter(keys[:1].clone())

    def open(self, entry: int) -> None:
        """Put what was trained into the bank and train entry `entry` instead."""
        if entry > 0:
            self.bank_prompts[entry - 1 : entry] = self.prompt.detach()
            self.bank_keys[entry - 1 : entry] = self.key.detach()
        self.prompt = nn.Parameter(self.bank_prompts[entry : entry + 1].clone())
        self.key = nn.Parameter(self.bank_keys[entry : entry + 1].clone())

    def grow(self, prompts: Tensor, keys: Tensor) -> None:
        """Add entries."""
        self.bank_prompts = torch.cat((self.bank_prompts, prompts.to(self.bank_prompts)))
        self.bank_keys = torch.cat((self.bank_keys, keys.to(self.bank_keys)))

    def rows(self, current: int, known: int) -> tuple[Tensor, Tensor]:
        """Prompts and keys of the first `known` entries, with the current one as it is now."""
        parts = [
            torch.cat((bank[:current], one, bank[current + 1 : known]))
            for bank, one in ((self.bank_prompts, self.prompt), (self.bank_keys, self.key))
        ]
        return parts[0], parts[1]


class DualPrompt(PromptPool):
    """DualPrompt (Wang et al., ECCV 2022): G-prompts that all tasks share, and one E-prompt with a key for each task.

    While a task trains, every image gets the task's own entry and the loss is
    ``pull * sum over the E blocks of mean_b (1 - cos(q_b, k_t))``; other entries are buffers. At inference an image
    gets the entry `argmax_j cos(q, k_j)` of the tasks seen so far (`candidates="seen"`), or, as the published code
    does, of all `size` entries, the untrained keys of tasks to come among them (`candidates="all"`).

    `general`, `expert`: blocks of the two kinds. As published they are 0-1 and 2-4 of 12; a backbone of n < 5 blocks
    takes the first n // 2 of its blocks and the others. Grows when there are more tasks than entries.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        *,
        size: int = 10,
        length: int = 20,
        general_length: int = 6,
        general: Sequence[int] | None = None,
        expert: Sequence[int] | None = None,
        pull: float = 1.0,
        candidates: str = "seen",
        query_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        used = min(at_least_one("blocks", blocks), 5)
        general = range(used // 2) if general is None else general
        expert = range(used // 2, used) if expert is None else expert
        super().__init__(dim, blocks, heads, (*general, *expert), query_dim)
        if candidates not in ("seen", "all"):
            raise ValueError(f"candidates: expected 'seen' or 'all', got {candidates!r}")
        self.size, self.length = at_least_one("size", size), even("length", length)
        self.pull, self.candidates = float(pull), candidates
        rows = even("general_length", general_length)
        self.general = nn.ParameterDict(
            {str(layer): nn.Parameter(uniform(1, rows, dim, generator=generator)) for layer in general}
        )
        self.expert = nn.ModuleDict()
        for layer in expert:
            self.expert[str(layer)] = _Bank(*self._draw(size, generator))

    def _draw(self, entries: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        prompts = uniform(entries, self.length, self.dim, generator=generator)
        return prompts, uniform(entries, self.query_dim, generator=generator)

    def _start(self, task: int, generator: torch.Generator | None) -> None:
        for layer in self.expert:
            bank = self._bank(layer)
            if task >= len(bank.bank_keys):
                bank.grow(*self._draw(1, generator))
            bank.open(task)

    def _bank(self, layer: int | str) -> _Bank:
        return of_kind(self.expert[str(layer)], _Bank)

    def _candidates(self, layer: int) -> tuple[Tensor, Tensor]:
        """Prompts and keys of the entries that an image may choose from."""
        bank = self._bank(layer)
        return bank.rows(self.task, self.task + 1 if self.candidates == "seen" else len(bank.bank_keys))

    def _prompts(self, query: Tensor, layer: int, train: bool) -> LayerPrompt | None:
        if str(layer) in self.general:
            return LayerPrompt(*pairs(self.general[str(layer)], self.heads))
        if train:
            bank = self._bank(layer)
            loss = self.pull * (1 - cosines(query, bank.key)).mean()
            return LayerPrompt(*pairs(bank.prompt, self.heads), loss)
        prompts, keys = self._candidates(layer)
        chosen = cosines(query, keys).argmax(dim=1)
        rows = F.embedding(chosen, prompts.flatten(1)).unflatten(-1, (self.length, self.dim))
        return LayerPrompt(*pairs(rows, self.heads))

    def _choices(self, query: Tensor, layer: int) -> Tensor | None:
        if str(layer) in self.general:
            return None
        similar = cosines(query, self._candidates(layer)[1])
        return torch.zeros_like(similar).scatter_(1, similar.argmax(dim=1, keepdim=True), 1.0)


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
