"""Attention itself: whom the row that is read looks at in the last block, and rolled out through all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels.compare.attribution._rows import same_prompts, watch_rows
from cl_kernels.compare.attribution._targets import pieces
from cl_kernels.compare.attribution._view import Layout, View, isolated, view_of
from cl_kernels.nn import PooledViT, PromptedViT, _attention

__all__ = ["AttentionMap", "attention_map", "attention_rollout"]


class AttentionMap(NamedTuple):
    """Shares of attention; `cls` + `prompts` + `patches` = 1 for every image.

    maps [B, h, w]: on each patch, mean over heads, adds up to `patches`; heads [B, H, h, w]: of each head (None for a
    rollout); cls [B]: on the class token and registers; prompts [B]: on prompts, prefixes and a KD token; patches [B].
    reads: "cls" (the class token's query) or "patches" (mean over the patches' queries, for a model that pools them).
    """

    maps: Tensor
    heads: Tensor | None
    cls: Tensor
    prompts: Tensor
    patches: Tensor
    reads: str


def attention_map(model: Any, images: Tensor, *, block: int = -1, batch_size: int = 16) -> AttentionMap:
    """The last softmax: softmax(q [K; K_P]^T / sqrt(d)) of the row that the feature is read from, over the patches.

    `images` [B, C, H, W]: normalised, or uint8 for a model with its own preprocessing. Where the model pools patches
    instead of reading a class token (the embedded backbones do), it is the mean over the patches' queries, which is
    what reaches their mean; `reads` says which. `block`: another block than the last. float32 or wider.

    Raises `ValueError` for models without such blocks, images that do not fit and unknown blocks. Cost: one forward
    pass without gradient (two for a prompt pool), and B x H x N scores, N^2 where patches are pooled, `batch_size`
    images at a time. Independent of the head: it says where a block looked, not what spoke for a class.
    """
    view = view_of(model)
    depth = len(view.backbone.blocks)
    if isinstance(block, bool) or not isinstance(block, int) or not -depth <= block < depth:
        raise ValueError(f"block: expected a number in {-depth}..{depth - 1}, got {block!r}")
    at = block % depth
    found: list[tuple[Tensor, ...]] = []
    with isolated(view):
        images = view.prepared(images)
        for piece in _pieces(view, len(images), batch_size):
            found.append(_one_block(view, images[piece], at))
    if not found:
        raise ValueError("images: expected at least one image, got none")
    heads, cls, prompts = (torch.cat(part) for part in zip(*found, strict=True))
    return AttentionMap(heads.mean(dim=1), heads, cls, prompts, heads.mean(dim=1).sum(dim=(1, 2)), _reads(view))


def attention_rollout(model: Any, images: Tensor, *, batch_size: int = 16) -> AttentionMap:
    """Attention rolled out through the blocks: the read row of prod_l (0.5 A_l + 0.5 I), A_l the mean over heads.

    A deep prompt or prefix has no row: its columns are dropped and each row is scaled to one, which is the softmax over
    the image rows alone. Shallow prompts and a KD token are rows, and travel on; what they hold is `prompts`. `images`
    and what is raised: as `attention_map`. Cost: one forward pass and L products of N x N matrices an image.
    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """
    view = view_of(model)
    maps, masses = [], []
    with isolated(view):
        images = view.prepared(images)
        for piece in _pieces(view, len(images), batch_size):
            rolled = rollout_rows(view, images[piece])
            layout = view.layout(images, rolled.shape[1])
            read = _read_rows(view, layout, rolled.shape[1])
            row = rolled[:, read].mean(dim=1)
            maps.append(row[:, layout.patches].unflatten(1, (layout.height, layout.width)))
            other = row[:, list(layout.others)].sum(dim=1)
            masses.append(torch.stack([row[:, layout.cls].sum(dim=1), other, row[:, layout.patches].sum(dim=1)]))
    if not maps:
        raise ValueError("images: expected at least one image, got none")
    cls, prompts, patches = torch.cat(masses, dim=1)
    return AttentionMap(torch.cat(maps), None, cls, prompts, patches, _reads(view))


def rollout_rows(view: View, images: Tensor) -> Tensor:
    """prod_l (0.5 A_l + 0.5 I) [B, N, N] over all rows that travel; every row adds up to one."""
    product: list[Tensor] = []
    query = _query(view, images)

    def look(index: int, rows: Tensor) -> None:
        scores, _ = _scores(view, index, rows, query, slice(None))
        step = scores.softmax(dim=-1).mean(dim=1).mul_(0.5)
        step.diagonal(dim1=1, dim2=2).add_(0.5)
        if index == 0:
            product.clear()
        product[:] = [step @ product[0] if product else step]

    with watch_rows(view, range(len(view.backbone.blocks)), look), same_prompts(view, query):
        view.features(images)
    return product[0]


def _one_block(view: View, images: Tensor, at: int) -> tuple[Tensor, ...]:
    """Attention on patches [B, H, h, w], and the shares of class token and prompts [B], of the rows that are read."""
    found: list[tuple[Tensor, ...]] = []
    query = _query(view, images)

    def look(index: int, rows: Tensor) -> None:
        layout = view.layout(images, rows.shape[1])
        read = _read_rows(view, layout, rows.shape[1])
        scores, prefix = _scores(view, index, rows, query, read)
        count = scores.shape[-1]
        weights = (scores if prefix is None else torch.cat((scores, prefix), dim=-1)).softmax(dim=-1).mean(dim=2)
        heads = weights[..., layout.patches].unflatten(2, (layout.height, layout.width))
        mean = weights.mean(dim=1)
        other = mean[:, list(layout.others)].sum(dim=1) + mean[:, count:].sum(dim=1)
        found[:] = [(heads, mean[:, layout.cls].sum(dim=1), other)]

    with watch_rows(view, range(at, at + 1), look), same_prompts(view, query):
        view.features(images)
    return found[0]


def _scores(view: View, index: int, rows: Tensor, query: Tensor | None, read: slice) -> tuple[Tensor, Tensor | None]:
    """Scaled scores of the rows `read` against all rows [B, H, R, N], and against the block's prefix [B, H, R, M]."""
    block = view.backbone.blocks[index]
    q, k, _ = _attention.project(block.attn, rows)
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q[:, :, read].to(wide) * float(block.attn.scale)
    k, prefix = _keys(view, index, k, query)
    scores = q @ k.to(wide).mT
    if isinstance(view.body, PooledViT) and view.body.kd is not None and view.body.kd.decouple == "mask":
        scores[:, :, : rows.shape[1] - 1, -1] = -torch.inf  # only the KD token, the last row, sees the KD token
    return scores, None if prefix is None else q @ prefix.to(wide).expand(len(q), -1, -1, -1).mT


def _keys(view: View, index: int, k: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The keys of all rows as this block sees them, and those of its prefix."""
    body = view.body
    if isinstance(body, PromptedViT) and not body.shallow and index in body.prompts:
        block = view.backbone.blocks[index]
        return k, _attention.project(block.attn, block.norm1(body.prompts[index]))[1]
    if isinstance(body, PooledViT):
        return body.keys(index, k, query)
    return k, None


def _read_rows(view: View, layout: Layout, rows: int) -> slice:
    """The rows that the feature is read from."""
    return slice(layout.cls.start, layout.cls.start + 1) if view.reads_cls else layout.patches


def _reads(view: View) -> str:
    return "cls" if view.reads_cls else "patches"


def _query(view: View, images: Tensor) -> Tensor | None:
    """What a prompt pool is asked with, for these images."""
    body = view.body
    return body.query(images) if isinstance(body, PooledViT) and body.pool is not None else None


def _pieces(view: View, count: int, batch_size: int) -> list[slice]:
    """One image at a time where each may go through other weights."""
    return pieces(count, batch_size if view.single else min(1, batch_size))
