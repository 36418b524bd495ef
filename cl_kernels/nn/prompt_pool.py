"""Prompts that are chosen by a query of the frozen model: what all pools share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.nn._attention import head_dim
from cl_kernels.nn._prompts import check_options

__all__ = ["LayerPrompt", "PromptPool", "cosines", "pairs", "split_heads"]

Kind = TypeVar("Kind", bound=nn.Module)


class LayerPrompt(NamedTuple):
    """What a pool gives to one block: keys and values [B or 1, H, m, dh], and its share of the loss (None: none).

    Size 1 means that all images share the rows. A pool that `adds` gives [1, H, 1, dh], to be added to a row.
    """

    k: Tensor
    v: Tensor
    loss: Tensor | None = None


class PromptPool(nn.Module):
    """Base of the pools L2P, DualPrompt, CODAPrompt and APT.

    `dim` is the width of the backbone's keys (heads x head width), `blocks` its depth, `query_dim` (None: `dim`) the
    width of the query that keys are compared with; in distillation both models' pools are keyed by the student's.
    Prompts enter keys and values *after* their projection, heads of consecutive channels; there is no further map.

    A task starts with `begin_task(0)`, `begin_task(1)`, ... and ends with `end_task()`. Parameters are those of the
    current task and nothing else: what earlier tasks left lies in buffers and cannot move. Raises `ValueError` for
    sizes that do not fit (an odd prompt length, which cannot be halved into keys and values, among them).
    """

    needs_query: ClassVar[bool] = True
    adds: ClassVar[bool] = False  # True: added to rows of the tokens instead of standing behind them

    def __init__(self, dim: int, blocks: int, heads: int, layers: Sequence[int], query_dim: int | None = None) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("blocks", blocks), ("heads", heads)):
            at_least_one(name, value)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")
        self.dim, self.blocks, self.heads = dim, blocks, heads
        self.query_dim = dim if query_dim is None else at_least_one("query_dim", query_dim)
        self.layers = tuple(int(layer) for layer in layers)
        if len(set(self.layers)) != len(self.layers) or not all(0 <= layer < blocks for layer in self.layers):
            raise ValueError(f"layers: expected distinct block indices in 0..{blocks - 1}, got {list(layers)}")
        self.task = -1

    @classmethod
    def of(cls, backbone: nn.Module, **options: Any) -> Self:
        """A pool for a timm ViT: `dim`, `blocks` and `heads` are the backbone's; `options` as the class takes them.

        Raises `ValueError` for another model."""
        model: Any = backbone
        check_options(model, 0, "deep", "append")
        attention = model.blocks[0].attn
        heads = int(attention.num_heads)
        return cls(heads * head_dim(attention), len(model.blocks), heads, **options)

    # What a subclass says ------------------------------------------------------------------------------------------

    def _start(self, task: int, generator: torch.Generator | None) -> None:
        """Make the parameters of `task`; `self.task` is still the one before."""

    def _prompts(self, query: Tensor, layer: int, train: bool) -> LayerPrompt | None:
        raise NotImplementedError

    def _choices(self, query: Tensor, layer: int) -> Tensor | None:
        """How much each entry of a layer serves each image [B, entries] at inference; None: nothing is chosen."""
        return None

    # The interface -------------------------------------------------------------------------------------------------

    def begin_task(self, task: int, *, generator: torch.Generator | None = None) -> None:
        """Start `task`, the one after the last. What is drawn comes from `generator` (None: the global one), on the CPU
        in float32, so that a seed means the same on every device."""
        if task != self.task + 1:
            raise ValueError(f"task: expected {self.task + 1}, the one after the last, got {task}")
        with torch.no_grad():
            self._start(task, generator)
        self.task = task

    def end_task(self) -> None:
        """The task is trained."""

    def prompts(self, query: Tensor | None, layer: int, *, train: bool) -> LayerPrompt | None:
        """The prompt of block `layer` for each image, or None where the pool has none there.

        query [B, query_dim], held constant. `train` takes what the current task trains and gives the pool's loss;
        without it, as at inference (and for a teacher that makes targets), there is no loss. Raises `RuntimeError`
        before the first task, `ValueError` for a query of another shape.
        """
        if self.task < 0:
            raise RuntimeError(f"{type(self).__name__}: begin a task first")
        if layer not in self.layers:
            return None
        return self._prompts(self._checked(query), layer, train)

    @torch.no_grad()
    def usage(self, query: Tensor) -> dict[int, Tensor]:
        """By layer, how much every entry serves the images of `query` at inference: sums over them, float64 [entries].

        Selected entries count 1 an image; soft weights count their absolute value."""
        checked, found = self._checked(query), {}
        for layer in self.layers:
            chosen = self._choices(checked, layer)
            if chosen is not None:
                found[layer] = chosen.double().sum(dim=0)
        return found

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the current task trains, by name."""
        return list(self.named_parameters())

    # What travels beside the tensors -------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Plain values."""
        return {"task": self.task}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.task = int(state["task"])

    def _checked(self, query: Tensor | None) -> Tensor:
        if not self.needs_query:
            return torch.empty(0) if query is None else query
        if query is None or query.ndim != 2 or query.shape[1] != self.query_dim:
            got = None if query is None else tuple(query.shape)
            raise ValueError(f"query: expected shape [batch, {self.query_dim}], got {got}")
        return query.detach()


class Grown(nn.Module):
    """Tensors whose sizes depend on the tasks so far; a state dict brings its own."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, mine in [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]:
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != mine.shape:
                fresh = torch.empty_like(given, device=mine.device, dtype=mine.dtype)
                setattr(self, name, nn.Parameter(fresh) if isinstance(mine, nn.Parameter) else fresh)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def of_kind(module: nn.Module, kind: type[Kind]) -> Kind:
    """`module`, known to be a `kind`: what a `ModuleDict` cannot say."""
    if not isinstance(module, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(module).__name__}")
    return module


def at_least_one(name: str, value: int) -> int:
    """`value`, an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return value


def even(name: str, value: int, low: int = 2) -> int:
    """`value`, a prompt length whose halves are the keys and the values."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or value % 2:
        raise ValueError(f"{name}: expected an even number >= {low}, half keys and half values, got {value!r}")
    return value


def uniform(*shape: int, generator: torch.Generator | None) -> Tensor:
    """U[0, 1), as the official code starts prompts and keys."""
    return torch.rand(shape, generator=generator)


def split_heads(rows: Tensor, heads: int) -> Tensor:
    """[B, m, H dh] -> [B, H, m, dh], heads of consecutive channels."""
    apart: Tensor = rows.unflatten(-1, (heads, -1))
    return apart.transpose(1, 2)


def pairs(prompt: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, m, dh] of prompts [B, 2 m, D]: the first half of the rows, and the second."""
    k, v = prompt.chunk(2, dim=1)
    return split_heads(k, heads), split_heads(v, heads)


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b, k_j) [B, M] in float32 at least: in 16 bits neighbours change places."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        similar: Tensor = F.normalize(query.to(wide), dim=-1) @ F.normalize(keys.to(wide), dim=-1).mT
    return similar
