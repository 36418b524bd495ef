"""A frozen timm ViT with a prompt pool, a KD token, or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_kernels.nn import _attention, _backbone
from cl_kernels.nn._prompts import check_options
from cl_kernels.nn.kd_token import KDToken
from cl_kernels.nn.prompt_pool import LayerPrompt, PromptPool
from cl_kernels.ops.prefix_attention import prefix_attention

__all__ = ["Pooled", "PooledViT"]

Pair = tuple[Tensor, Tensor]


class Pooled(NamedTuple):
    """cls [B, D]: the pooled, normalised feature of the image rows (the class token's where the backbone reads it);
    kd [B, D]: that of the KD token, None without one; loss: the pool's, 0-d, 0 where it has none."""

    cls: Tensor
    kd: Tensor | None
    loss: Tensor


class PooledViT(nn.Module):
    """A frozen timm ViT; `forward(images)` gives `Pooled`.

    Block l computes ``softmax(Q [P_K; K; G_K]^T / sqrt(dh)) [P_V; V; G_V]`` with the pool's P^l and KDToken's G^l, both
    placed behind the projections. The pool chooses by `query(images)`, the feature of the un-prompted model.

    `backbone` is taken over and frozen for real: no parameter requires a gradient, so none is ever computed; it stays
    in eval mode whatever `train()` says, and frozen whatever `requires_grad_()` says. `backbone_digest()` proves it.

    Where the feature is row 0 alone (``global_pool="token"``), the last block forms queries, its projection and its MLP
    for that row and the KD token only, 7 % of 12 blocks, exact to rounding; `prune=False` runs it whole. With average
    (or any other) pooling all rows are read and nothing can be left out; the query is the pooled feature then too.

    Raises `ValueError` for a model that is not timm's pre-norm ViT and for pools and KD tokens of other sizes.
    """

    def __init__(
        self, backbone: nn.Module, pool: PromptPool | None = None, kd: KDToken | None = None, *, prune: bool = True
    ) -> None:
        super().__init__()
        model: Any = backbone
        check_options(model, 0, "deep", "append")
        _check_sizes(model, pool, kd)
        model.reset_classifier(0)
        self.backbone = model.requires_grad_(False).eval()
        self.num_features = int(model.num_features)
        like = next(model.parameters())
        self.pool = None if pool is None else pool.to(like)
        self.kd = None if kd is None else kd.to(like)
        self.prune = prune and _backbone.reads_one_row(model)
        self._query: Tensor | None = None

    def train(self, mode: bool = True) -> PooledViT:
        """As `nn.Module.train`, but the backbone stays in eval mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PooledViT:
        """As `nn.Module.requires_grad_`, but the backbone stays frozen."""
        super().requires_grad_(requires_grad)
        self.backbone.requires_grad_(False)
        return self

    def backbone_digest(self) -> str:
        """sha256 of the backbone's parameters and buffers; equal before and after any training."""
        return _backbone.digest(self.backbone)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """The feature [B, D] of the un-prompted model, without gradient; a teacher's pool may share it."""
        _backbone.check_images(self.backbone, images)
        x = _backbone.embed(self.backbone, images)
        for index, block in enumerate(self.backbone.blocks):
            x = self._block(index, block, x, None, None, plain=True)
        return self._features(x)

    def forward(self, images: Tensor, query: Tensor | None = None, *, train: bool | None = None) -> Pooled:
        """Features of `images` [B, C, H, W]; `query` [B, Dq] (None: `self.query(images)`) is what the pool looks at.

        `train` says whether the pool gives its training prompts and loss; None takes the module's mode. Raises
        `ValueError` where the query's width is not the pool's.
        """
        _backbone.check_images(self.backbone, images)
        train = self.training if train is None else train
        if query is None and self.pool is not None and self.pool.needs_query:
            query = self.query(images) if self._query is None else self._query
        x = _backbone.embed(self.backbone, images)
        if self._token is not None:
            x = torch.cat((x, self._token.to(x.dtype).expand(len(x), 1, -1)), dim=1)
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        recompute = bool(getattr(self.backbone, "grad_checkpointing", False)) and torch.is_grad_enabled()
        for index, block in enumerate(self.backbone.blocks):
            prompt = None if self.pool is None else self.pool.prompts(query, index, train=train)
            if prompt is not None and prompt.loss is not None:
                loss = loss + prompt.loss
            given = (index, block, x, prompt, None if self.kd is None else self.kd.prefix(index))
            x = checkpoint(self._block, *given, use_reentrant=False) if recompute else self._block(*given)
        if self._token is None:
            return Pooled(self._features(x), None, loss)
        own: Tensor = self.backbone.fc_norm(self.backbone.norm(x[:, -1]))
        return Pooled(self._features(x[:, :-1]), own, loss)

    @contextmanager
    def fixed_query(self, query: Tensor) -> Iterator[None]:
        """While open, the pool looks at `query` [B, Dq] whatever the images: their prompts are constants."""
        self._query = query
        try:
            yield
        finally:
            self._query = None

    def keys(self, index: int, k: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the image rows of block `index` attend to: the keys [B, H, N, dh] of all rows, given as projected, and
        those of the pool and of the KD prompts [B or 1, H, M, dh] (None where there are none)."""
        prompt = None if self.pool is None else self.pool.prompts(query, index, train=False)
        hidden = self.kd is not None and self.kd.decouple == "mask"
        kd = None if self.kd is None or hidden else self.kd.prefix(index)
        if prompt is not None and self._adds:
            k, prompt = self._added(k, prompt.k, k.shape[2] - (self._token is not None)), None
        found = [pair[0].to(k.dtype) for pair in (prompt, kd) if pair is not None]
        batch = next((len(part) for part in found if len(part) != 1), 1)
        return k, torch.cat([part.expand(batch, -1, -1, -1) for part in found], dim=2) if found else None

    @property
    def _token(self) -> Tensor | None:
        return None if self.kd is None else self.kd.token

    def _features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_head(self.backbone.norm(x), pre_logits=True)
        return features

    def _block(
        self, index: int, block: Any, x: Tensor, prompt: LayerPrompt | None, kd: Pair | None, *, plain: bool = False
    ) -> Tensor:
        """One block; of the last only the rows that are read."""
        token = self._token is not None and not plain
        pruned = self.prune and index == len(self.backbone.blocks) - 1
        apart = token and self.kd is not None and self.kd.decouple != "none"
        if prompt is None and kd is None and not pruned and not apart:
            out: Tensor = block(x)
            return out
        tokens = block.norm1(x)
        if pruned:
            x, read = _read(x, token), _read(tokens, token)
            q, k, v = _attention.project_some(block.attn, read, tokens)
            tokens = read
        else:
            q, k, v = _attention.project(block.attn, tokens)
        attend = self._attend_apart if apart else self._attend
        mixed = attend(q, k, v, prompt, kd, float(block.attn.scale))
        x = x + block.drop_path1(block.ls1(_attention.finish(block.attn, mixed, tokens)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]  # timm is untyped

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: LayerPrompt | None, kd: Pair | None, scale: float
    ) -> Tensor:
        if prompt is not None and self._adds:
            images = k.shape[2] - (self._token is not None)
            k, v, prompt = self._added(k, prompt.k, images), self._added(v, prompt.v, images), None
        return _with_prefixes(q, k, v, [None if prompt is None else prompt[:2], kd], scale)

    def _attend_apart(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: LayerPrompt | None, kd: Pair | None, scale: float
    ) -> Tensor:
        """Image rows and the KD token by themselves: what each may see, or may learn from, of the other."""
        image_k, image_v = k[:, :, :-1], v[:, :, :-1]
        own = (k[:, :, -1:], v[:, :, -1:])
        if prompt is not None and self._adds:
            images = image_k.shape[2]
            seen_k, seen_v = self._added(image_k, prompt.k, images), self._added(image_v, prompt.v, images)
            prefix = None
        else:
            seen_k, seen_v, prefix = image_k, image_v, None if prompt is None else prompt[:2]
        if self.kd is not None and self.kd.decouple == "mask":
            of_images = _with_prefixes(q[:, :, :-1], seen_k, seen_v, [prefix], scale)
            of_token = _with_prefixes(q[:, :, -1:], image_k, image_v, [own, kd], scale)
        else:
            of_images = _with_prefixes(q[:, :, :-1], seen_k, seen_v, [prefix, _constant(own), _constant(kd)], scale)
            seen = seen_k.detach(), seen_v.detach()
            of_token = _with_prefixes(q[:, :, -1:], *seen, [_constant(prefix), own, kd], scale)
        return torch.cat((of_images, of_token), dim=2)

    @property
    def _adds(self) -> bool:
        return self.pool is not None and self.pool.adds

    def _added(self, rows: Tensor, vector: Tensor, images: int) -> Tensor:
        """`rows` [B, H, N, dh] with `vector` [1, H, 1, dh] on the class token's row, else on every pooled one of the
        first `images`."""
        where = torch.zeros(rows.shape[2], 1, dtype=rows.dtype, device=rows.device)
        token = bool(getattr(self.backbone, "has_class_token", False))
        where[slice(0, 1) if token else slice(_backbone.prefix_rows(self.backbone), images)] = 1
        return rows + where * vector.to(rows.dtype)


def _check_sizes(model: Any, pool: PromptPool | None, kd: KDToken | None) -> None:
    depth, width = len(model.blocks), int(model.embed_dim)
    attention = model.blocks[0].attn
    heads, inner = int(attention.num_heads), int(attention.num_heads) * _attention.head_dim(attention)
    for name, part, dim in (("pool", pool, inner), ("kd", kd, width)):
        if part is not None and (part.dim, part.heads) != (dim, heads):
            raise ValueError(
                f"{name}: expected width {dim} and {heads} heads as the backbone's, got {part.dim} and {part.heads}"
            )
    if kd is not None and inner != width:
        raise ValueError(f"kd: keys of the backbone are {inner} wide and its rows {width}, which is not supported")
    if pool is not None and pool.blocks != depth:
        raise ValueError(f"pool: expected {depth} blocks as the backbone's, got {pool.blocks}")
    if kd is not None and kd.blocks > depth:
        raise ValueError(f"kd: expected at most the {depth} blocks of the backbone, got {kd.blocks}")


def _read(rows: Tensor, token: bool) -> Tensor:
    """Row 0, and the KD token's where there is one: all that is read of the last block."""
    return torch.cat((rows[:, :1], rows[:, -1:]), dim=1) if token else rows[:, :1]


def _constant(pair: Pair | None) -> Pair | None:
    return None if pair is None else (pair[0].detach(), pair[1].detach())


def _with_prefixes(q: Tensor, k: Tensor, v: Tensor, prefixes: list[Pair | None], scale: float) -> Tensor:
    """Attention over k, v and the rows of all `prefixes` [B or 1, H, m, dh]."""
    given = [pair for pair in prefixes if pair is not None]
    if not given:
        return _attention.attend(q, k, v, scale)
    batch = next((len(pair[0]) for pair in given if len(pair[0]) != 1), 1)
    joined = [torch.cat([p[side].to(k.dtype).expand(batch, -1, -1, -1) for p in given], dim=2) for side in (0, 1)]
    return prefix_attention(q, k, v, joined[0], joined[1], scale=scale)
