"""The search for NaN and infinity before a step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["found_nonfinite"]


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
