"""The prompts of a model as parameters named by block, and the options they are made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.nn._attention import check_block

__all__ = ["Prompts", "check_options", "init_bound", "uniform"]


class Prompts(nn.Module):
    """Prompts [1, M, D] by block index: parameter names are the indices, so that `prompts.6` always means block 6."""

    def __init__(self, prompts: dict[int, Tensor]) -> None:
        super().__init__()
        self.indices = tuple(prompts)
        for index, prompt in prompts.items():
            self.register_parameter(str(index), nn.Parameter(prompt))

    def __getitem__(self, index: int) -> nn.Parameter:
        if index not in self.indices:
            raise KeyError(f"index: block {index} has no prompts; prompted blocks are {list(self.indices)}")
        return self.get_parameter(str(index))

    def __contains__(self, index: object) -> bool:
        return index in self.indices

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (self[index] for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def check_options(model: Any, prompts: int, depth: str | Sequence[int], placement: str) -> tuple[int, ...]:
    """The indices of the blocks to prompt, after refusing every model and option that is not supported."""
    for name in ("patch_embed", "_pos_embed", "blocks", "norm", "forward_head", "reset_classifier", "embed_dim"):
        if not hasattr(model, name):
            raise ValueError(f"timm_model: {type(model).__name__} has no {name}; expected timm's VisionTransformer")
    if getattr(model, "rope", None) is not None:
        raise ValueError(
            f"timm_model: {type(model).__name__} uses rotary positions, which PromptedViT does not support"
        )
    if model.global_pool == "":
        raise ValueError("timm_model: it does not pool (global_pool=''); create it with global_pool='token' or 'avg'")
    if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 0:
        raise ValueError(f"prompts: expected a whole number >= 0, got {prompts!r}")
    if placement not in ("append", "prepend", "prefix"):
        raise ValueError(f"placement: expected 'append', 'prepend' or 'prefix', got {placement!r}")
    if placement == "prefix" and depth == "shallow":
        raise ValueError(
            "placement: shallow prompts are tokens that travel on, not a prefix; use 'append' or 'prepend'"
        )
    count = len(model.blocks)
    if isinstance(depth, str):
        if depth not in ("deep", "shallow"):
            raise ValueError(f"depth: expected 'deep', 'shallow' or block indices, got {depth!r}")
        indices = tuple(range(count)) if depth == "deep" else (0,)
    else:
        indices = tuple(int(index) for index in depth)
        if not indices or len(set(indices)) != len(indices) or not all(0 <= index < count for index in indices):
            raise ValueError(f"depth: expected distinct block indices in 0..{count - 1}, got {list(indices)}")
    for index in indices:
        check_block(index, model.blocks[index])
    return tuple(sorted(indices))


def init_bound(init: str | float, model: Any) -> float:
    """The bound v of a uniform initialisation, by name or as a number."""
    if init == "uniform":
        return 1.0
    if init == "vpt":
        height, width = model.patch_embed.patch_size
        return math.sqrt(6.0 / (3 * height * width + int(model.embed_dim)))
    if isinstance(init, (int, float)) and not isinstance(init, bool) and math.isfinite(init) and init >= 0:
        return float(init)
    raise ValueError(f"init: expected 'uniform', 'vpt' or a finite bound >= 0, got {init!r}")


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU in fp32, so that a seed gives the same prompts on every device."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
