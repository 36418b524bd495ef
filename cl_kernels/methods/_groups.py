"""An optimizer's groups: the learning rate by depth, and what weight decay leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

__all__ = ["by_layer", "depth_of", "matrices_apart"]


def matrices_apart(groups: Iterable[dict[str, Any]], undecayed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Each group that decays as two: matrices, and, without decay, vectors (norm scales, biases) and `undecayed` names.

    The official VPT code names `LayerNorm.*`, which matches nothing, and so decays norm scales. Empty groups are left
    out, and the order stays."""
    found: list[dict[str, Any]] = []
    for group in groups:
        if not group["weight_decay"]:
            found.append(group)
            continue
        free = [pair for pair in group["params"] if pair[1].ndim <= 1 or pair[0] in undecayed]
        names = {name for name, _ in free}
        kept = [pair for pair in group["params"] if pair[0] not in names]
        parts = ({**group, "params": kept}, {**group, "params": free, "weight_decay": 0.0})
        found.extend(part for part in parts if part["params"])
    return found


def depth_of(name: str, blocks: int) -> int:
    """How deep a parameter of a timm vision transformer lies: 0 for embeddings, l + 1 in block l, L + 1 above."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    before = first.endswith(("_embed", "_token")) or first in ("norm_pre", "patch_drop")
    return 0 if before else blocks + 1


def by_layer(
    body: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float, decay: float
) -> list[dict[str, Any]]:
    """One group for each depth, from the top: its learning rate is lr * decay^(L + 1 - depth) (BEiT, MAE)."""
    blocks = max((int(name.split(".")[1]) + 1 for name, _ in body if name.startswith("blocks.")), default=0)
    depths = sorted({depth_of(name, blocks) for name, _ in body}, reverse=True)
    return [
        {
            "params": [(name, parameter) for name, parameter in body if depth_of(name, blocks) == depth],
            "lr": lr * decay ** (blocks + 1 - depth),
            "weight_decay": weight_decay,
        }
        for depth in depths
    ]
