"""Small checks that the projected optimizers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_rate", "found_nonfinite"]


def check_rate(group: dict[str, Any]) -> None:
    """The settings every optimizer has, in torch's wording."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if group["foreach"] and not group.get("capturable", False):
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: a projected step is not recorded by autograd")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def found_nonfinite(
    grads: list[Tensor | None], found: Tensor | None, skipped: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(1.0 if any gradient holds NaN or infinity else 0.0, the count of such steps), without a word to the host."""
    present = [grad for grad in grads if grad is not None and grad.numel()]
    if not present:
        return found, skipped
    device = present[0].device
    norms = torch._foreach_norm(present, float("inf"))
    total = torch.stack([norm.float().to(device) for norm in norms])
    bad = (~torch.isfinite(total).all()).float()
    if found is not None:
        bad = torch.maximum(bad, found.to(device))
    return bad, bad if skipped is None else skipped.to(device) + bad
