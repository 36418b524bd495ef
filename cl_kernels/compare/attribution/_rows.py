"""The normalised rows that enter the attention of each block, seen in passing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cl_kernels.compare.attribution._view import View
from cl_kernels.nn import PooledViT

__all__ = ["same_prompts", "watch_rows"]

Look = Callable[[int, Tensor], Tensor | None]


@contextmanager
def watch_rows(view: View, blocks: range, look: Look) -> Iterator[None]:
    """While open, call ``look(block, rows)`` with norm1's output [B, N, D] for the image rows of each of `blocks`.

    What `look` returns (unless None) takes the rows' place. A block's norm1 also runs on its prompts, after the rows,
    and a prompt pool's query is a pass of its own: of every pass, which the patch embedding begins, the first call of a
    block counts, and the last pass is the one that predicts. The hooks are gone afterwards."""
    seen: set[int] = set()
    handles = [view.backbone.patch_embed.register_forward_hook(lambda *_: seen.clear())]

    def hook(index: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def see(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor | None:
            if index in seen:
                return None
            seen.add(index)
            return look(index, rows)

        return see

    try:
        for index in blocks:
            handles.append(view.backbone.blocks[index].norm1.register_forward_hook(hook(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def same_prompts(view: View, query: Tensor | None) -> Iterator[None]:
    """While open, a prompt pool looks at `query` instead of asking the images shown; nothing without a query."""
    if query is None or not isinstance(view.body, PooledViT):
        yield
        return
    with view.body.fixed_query(query):
        yield
