"""How much state each watched layer will need, known before any of it is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from cl_kernels.subspace._moments import Moments
from cl_kernels.subspace.prompts import Prompted, PromptMoments

__all__ = ["Plan", "prompt_plans", "refuse_large"]


class Plan(NamedTuple):
    """What a layer will need: the shape of its totals, the prompts of a prompted block, sums for Ledoit-Wolf."""

    shape: tuple[int, ...]
    prompts: int = 0
    quartic: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of its state."""
        *heads, last = self.shape
        numbers = (last + 1) * last * (heads[0] if heads else 1) + self.prompts * (self.prompts + 1)
        return numbers * dtype.itemsize + (8 * (1 + last) if self.quartic else 0)

    def state(self, dtype: torch.dtype, device: torch.device) -> Moments | PromptMoments:
        """Zeros of that size."""
        if self.prompts:
            heads, last = self.shape
            return PromptMoments((heads, last), self.prompts, dtype=dtype, device=device)
        return Moments(self.shape, dtype, device, self.quartic)


def prompt_plans(model: Any) -> Iterator[tuple[str, Plan]]:
    """One plan a prompted block. Raises `ValueError` for a model without prompts that can be observed."""
    if not isinstance(model, Prompted):
        raise ValueError(
            f"model: what='prompt' needs a model with prompts, such as PromptedViT, got {type(model).__name__}"
        )
    for index in model.prompted_blocks:
        yield f"prompts.{index}", Plan(model.heads(index), model.num_prompts)


def refuse_large(plans: Mapping[str, Plan], dtype: torch.dtype, max_bytes: int | None) -> None:
    """Raise `ValueError`, naming the largest layers, when the state would need more than `max_bytes`."""
    needed = {name: plan.nbytes(dtype) for name, plan in plans.items()}
    total = sum(needed.values())
    if max_bytes is None or total <= max_bytes:
        return
    largest = sorted(needed, key=lambda name: needed[name], reverse=True)[:5]
    shown = ", ".join(f"{name} ({needed[name]:,} bytes)" for name in largest)
    raise ValueError(
        f"max_bytes: {total:,} bytes are needed, {max_bytes:,} allowed; largest layers: {shown}. "
        'Keep the sums elsewhere with device="cpu" and a larger max_bytes, halve them with dtype=torch.float32, '
        "or choose fewer layers with targets="
    )
