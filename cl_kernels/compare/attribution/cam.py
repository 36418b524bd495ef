"""GradCAM of a vision transformer: the patch rows before the last attention, weighed by the gradient of a logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.compare.attribution._rows import watch_rows
from cl_kernels.compare.attribution._targets import Target, chosen_columns, pieces
from cl_kernels.compare.attribution._view import Head, View, isolated, view_of

__all__ = ["gradcam"]


def gradcam(
    model: Any, images: Tensor, target: Target = "predicted", *, head: Head | None = None, batch_size: int = 32
) -> Tensor:
    """ReLU(sum_d w_d A_ijd) [B, h, w] of the logit of `target`, w_d = mean_ij G_ijd, G = d y / d A.

    A are the rows that the pre-attention norm of the last block gives, patches alone: class token, registers, shallow
    prompts and a KD token are left out for any number of them; deep prompts have no rows. Not the block's output and
    not norm2, whose patch rows have gradient zero where the feature is the class token's. Not smoothed, not scaled:
    two maps of one logit may be compared as they are. All zero where nothing speaks for the class.

    `images` [B, C, H, W]: normalised, or uint8 for a model with its own preprocessing. `target`: "predicted", a class,
    or a class for each image. `head`: features to logits, for a model without a classifier. Raises `ValueError` for
    images, classes and models that do not fit. Cost: one forward pass, of which the last block alone keeps a graph, and
    its backward. Source: Selvaraju et al., ICCV 2017; layer and rows of method-vpt-or-finetune.md 7.
    """
    view = view_of(model, head)
    maps = []
    with isolated(view):
        images = view.prepared(images)
        columns = chosen_columns(view, target, images, batch_size)
        for piece in pieces(len(images), batch_size if view.single else min(1, batch_size)):
            maps.append(_maps(view, images[piece], columns[piece]))
    if not maps:
        raise ValueError("images: expected at least one image, got none")
    return torch.cat(maps)


def _maps(view: View, images: Tensor, columns: Tensor) -> Tensor:
    rows, slopes = last_rows(view, images, columns)
    layout = view.layout(images, rows.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    patches, weights = rows[:, layout.patches].to(wide), slopes[:, layout.patches].to(wide).mean(dim=1)
    summed = (patches @ weights.unsqueeze(-1)).squeeze(-1).relu()
    maps: Tensor = summed.unflatten(1, (layout.height, layout.width))
    return maps


def last_rows(view: View, images: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """norm1's output in the last block [B, N, D], and the gradient of the logits `columns` by it."""
    held: list[Tensor] = []

    def look(_index: int, rows: Tensor) -> Tensor:
        leaf = rows.detach().requires_grad_()
        torch.set_grad_enabled(True)  # from here on; `isolated` and a query's own no_grad put it back
        held[:] = [leaf]
        return leaf

    last = len(view.backbone.blocks) - 1
    with watch_rows(view, range(last, last + 1), look), torch.no_grad():
        logits = view.outputs(images)
        value = logits.gather(1, columns.unsqueeze(1)).sum()
        (slopes,) = torch.autograd.grad(value, held)
    return held[0].detach(), slopes
