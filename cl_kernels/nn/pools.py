"""The pools whose prompts have keys: L2P and DualPrompt."""

from __future__ import annotations

from collections.abc import Sequence

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

__all__ = ["L2P", "DualPrompt"]


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
