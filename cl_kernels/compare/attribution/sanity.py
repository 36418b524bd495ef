"""Do the maps say anything? Agreement of two maps, a head of random weights, and pixels taken away in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.compare.attribution._patches import on_patches
from cl_kernels.compare.attribution._targets import Target, chosen_columns, pieces
from cl_kernels.compare.attribution._view import Head, View, isolated, view_of

__all__ = ["Curves", "deletion_insertion", "randomised_head", "spearman"]


class Curves(NamedTuple):
    """deletion [B]: area under the class probability while patches go, the most important first (low is good);
    insertion [B]: while they come to the baseline (high is good); random [B]: the mean of both for a random order (NaN
    where that was not asked for)."""

    deletion: Tensor
    insertion: Tensor
    random: Tensor


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation [B] of the maps a, b [B, ...], equal values sharing their mean rank; NaN for a constant map.

    Raises `ValueError` for other shapes than each other's."""
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"b: expected maps [B, ...] of the shape {tuple(a.shape)} of a, got {tuple(b.shape)}")
    first, second = (_ranks(maps.flatten(1).double()) for maps in (a, b))
    first, second = first - first.mean(dim=1, keepdim=True), second - second.mean(dim=1, keepdim=True)
    size = (first.square().sum(dim=1) * second.square().sum(dim=1)).sqrt()
    return torch.where(size > 0, (first * second).sum(dim=1) / size, torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks of each row [B, n]."""
    ranks = torch.empty_like(values)
    for row, found in zip(values, ranks, strict=True):
        _, place, count = row.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).to(values.dtype)
        found.copy_((last - 0.5 * (count.to(values.dtype) - 1))[place])
    return ranks


def randomised_head(model: Any, *, seed: int = 0) -> Head:
    """A head with random weights for the features of `model`, as many classes as it has: give it as `head=`.

    A map that speaks of the class must change with it. Nothing in the model is touched. Weights are standard normal;
    their size does not matter to a rank."""
    view = view_of(model)
    made: dict[tuple[int, int], Tensor] = {}
    real = view.logits

    def head(features: Tensor) -> Tensor:
        with torch.no_grad():
            classes = 2 if real is None else real(features.detach()[:1]).shape[1]
        shape = (classes, features.shape[1])
        if shape not in made:
            made[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        logits: Tensor = F.linear(features, made[shape].to(features))
        return logits

    return head


def deletion_insertion(
    model: Any,
    images: Tensor,
    maps: Tensor,
    target: Target = "predicted",
    *,
    head: Head | None = None,
    baseline: Tensor | None = None,
    steps: int = 16,
    chance: bool = True,
    seed: int = 0,
    batch_size: int = 32,
) -> Curves:
    """Areas under the probability of `target` while patches are replaced by the baseline in the order of `maps`.

    `maps` [B, h, w] of patches, or of pixels, which are summed over patches. `steps` equal shares of the patches;
    trapezoid rule. The same with a random order (`chance`) says what an area means here. Equal places go in a random
    order, so a constant map scores as chance does. Arguments, what is raised: as `integrated_gradients`. Cost: B x 4 x
    (steps + 1) forward passes, half of them without `chance`. Source: Petsiuk et al., RISE, BMVC 2018.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, got {steps!r}")
    view = view_of(model, head)
    with isolated(view):
        images = view.prepared(images)
        columns = chosen_columns(view, target, images, batch_size)
        tall, wide = (int(side) for side in view.backbone.patch_embed.patch_size)
        height, width = images.shape[2] // tall, images.shape[3] // wide
        if len(maps) != len(images):
            raise ValueError(f"maps: expected one for each of the {len(images)} images, got {len(maps)}")
        scores = on_patches(maps, height, width).flatten(1).to(images.device, torch.float64)
        empty = torch.zeros_like(images) if baseline is None else baseline.to(images).expand(images.shape)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.stack([torch.randperm(height * width, generator=generator) for _ in range(len(images))])
        drawn = drawn.to(images.device)
        order = drawn.gather(1, scores.gather(1, drawn).argsort(dim=1, descending=True, stable=True))
        area = _areas(view, images, empty, columns, (height, width), steps, batch_size)
        deletion, insertion = area(order, False), area(order, True)
        other = 0.5 * (area(drawn, False) + area(drawn, True)) if chance else torch.full_like(deletion, torch.nan)
        return Curves(deletion, insertion, other)


def _areas(
    view: View, images: Tensor, empty: Tensor, columns: Tensor, grid: tuple[int, int], steps: int, batch_size: int
) -> Callable[[Tensor, bool], Tensor]:
    count = grid[0] * grid[1]
    cuts = torch.linspace(0, count, min(steps, count) + 1).round().to(torch.int64).to(images.device)
    tall, wide = images.shape[2] // grid[0], images.shape[3] // grid[1]

    def area(order: Tensor, insert: bool) -> Tensor:
        """Of patches in `order` [B, h w], shown from the baseline where `insert`, else taken from the image."""
        rank = order.argsort(dim=1)
        heights = []
        for piece in pieces(len(images) * len(cuts), batch_size):
            pairs = torch.arange(piece.start, piece.stop, device=images.device)
            image, cut = pairs // len(cuts), cuts[pairs % len(cuts)]
            changed = (rank[image] < cut.unsqueeze(1)).unflatten(1, grid)
            changed = changed.repeat_interleave(tall, dim=1).repeat_interleave(wide, dim=2).unsqueeze(1)
            shown = torch.where(changed == insert, images[image], empty[image])
            chosen = view.outputs(shown).double().softmax(dim=1).gather(1, columns[image].unsqueeze(1))
            heights.append(chosen.squeeze(1))
        curve = torch.cat(heights).unflatten(0, (len(images), len(cuts)))
        return torch.trapezoid(curve, cuts.double() / count, dim=1)

    return area
