"""Visual prompt tuning on a frozen timm ViT, deep and shallow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_kernels.nn import _attention, _backbone
from cl_kernels.nn._prompts import Prompts, check_options, init_bound, uniform
from cl_kernels.ops.prefix_attention import prefix_attention

__all__ = ["Observer", "PromptedViT"]

Observer = Callable[[int, Tensor, Tensor], None]


class PromptedViT(nn.Module):
    """A frozen timm ViT with M trainable prompts in its blocks; `forward(images)` gives the pooled feature [B, D].

    Deep (Jia et al., VPT, ECCV 2022; Lu et al., NSP2, NeurIPS 2024): block l computes
    ``softmax(scale Q [K; K_P]^T) [V; V_P]`` for the N image tokens, K_P and V_P being projected from
    ``norm1(prompts.l)``. Prompt outputs are discarded, so prompts are never queries. Shallow: prompts join the tokens
    of block 0 and travel on.

    `timm_model` is taken over: frozen, held in eval mode whatever `train()` says, its head dropped (pooling and norms
    stay). `depth` is "deep" (every block), "shallow", or the block indices to prompt, e.g. ``range(4)``. `placement`
    is "append" (after the image tokens) or "prepend"; they differ by rounding only. Deep appended prompts are a prefix
    of the attention (`ops.prefix_attention`); "prefix" says so and is the same. `init` is "uniform" (-1, 1) as in
    NSP2, "vpt" for U(-v, v) with v = sqrt(6 / (3 patch^2 + D)), or a bound v. Parameters are ``prompts.<block>``,
    [1, M, D], in the backbone's dtype and on its device. `dropout` zeroes entries of the prompts (and scales up the
    rest) in training mode, by one mask an image, drawn by the attribute `generator` (None: torch's own state).

    Raises `ValueError` for a model, depth or placement that is not supported. Cost: a deep block forms N (N + M)
    attention scores a head instead of N^2, and projects M rows to q, k, v once a batch.
    """

    def __init__(
        self,
        timm_model: nn.Module,
        prompts: int = 4,
        depth: str | Sequence[int] = "deep",
        placement: str = "append",
        *,
        init: str | float = "uniform",
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        backbone: Any = timm_model
        indices = check_options(backbone, prompts, depth, placement)
        bound = init_bound(init, backbone)  # the last check: a wrong call leaves the model as it was
        backbone.reset_classifier(0)
        self.backbone = backbone.requires_grad_(False).eval()
        # with one block nothing travels on, and shallow prompts are deep ones
        self.shallow = depth == "shallow" and len(backbone.blocks) > 1
        self.placement = placement
        self.num_prompts = prompts
        self.num_features = int(backbone.num_features)
        like = backbone.blocks[0].norm1.weight if hasattr(backbone.blocks[0], "norm1") else next(backbone.parameters())
        shape = (1, prompts, int(backbone.embed_dim))
        self.prompts = Prompts({i: uniform(shape, bound, generator).to(like) for i in indices if prompts})
        self.dropout = float(dropout)
        self.generator: torch.Generator | None = None  # of dropout masks, on the prompts' device
        self._observers: list[Observer] = []

    @property
    def prompted_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that have prompts of their own."""
        return self.prompts.indices

    def train(self, mode: bool = True) -> PromptedViT:
        """As `nn.Module.train`, but the frozen backbone stays in eval mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled, normalised features [B, D] of `images` [B, C, H, W], as timm's ``forward_head(pre_logits=True)``."""
        backbone = self.backbone
        _backbone.check_images(backbone, images)
        x = _backbone.embed(backbone, images)
        recompute = bool(getattr(backbone, "grad_checkpointing", False)) and torch.is_grad_enabled()
        run = self._run_shallow if self.shallow else self._run_deep
        for index, block in enumerate(backbone.blocks):
            prompt = self._prompt(index, len(x)) if index in self.prompts else None
            if recompute:
                x = checkpoint(run, index, block, x, prompt, use_reentrant=False)
            else:
                x = run(index, block, x, prompt)
        if self.shallow and self.num_prompts:
            x = x[:, : -self.num_prompts] if self.placement == "append" else x[:, self.num_prompts :]
        features: Tensor = backbone.forward_head(backbone.norm(x), pre_logits=True)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """The same as `forward_features`."""
        return self.forward_features(images)

    @contextmanager
    def observe(self, callback: Observer) -> Iterator[None]:
        """While open, call ``callback(block, q, s_p)`` for every block with prompts of its own, in every forward pass.

        q [B, H, N, dh] are the image queries after bias and query norm, before the scale; s_p [B, H, N, M] are the
        softmax columns of the prompts, ``exp(scale q k_P^T - lse)``. Both are detached; neither may be written to.
        """
        self._observers.append(callback)
        try:
            yield
        finally:
            self._observers.remove(callback)

    def key_weight(self, index: int) -> Tensor:
        """W_k [H*dh, D] of block `index`, the factor of the head-Gram identity C1 = sum_h W_k,h^T G_h W_k,h.

        A key norm's gain (and centring) is folded in; a plain block gives the rows of its qkv weight.
        """
        return _attention.effective_key_weight(self._block(index).attn)

    def norm1(self, index: int) -> tuple[Tensor, float]:
        """Gain [D] and eps of the norm before the attention of block `index`, for `subspace.fold_gain_and_centring`."""
        norm = self._block(index).norm1
        gain = getattr(norm, "weight", None)
        ones = torch.ones(
            int(self.backbone.embed_dim), device=self.prompts[index].device, dtype=self.prompts[index].dtype
        )
        return (ones if gain is None else gain.detach().clone()), float(norm.eps)

    def norm1_centres(self, index: int) -> bool:
        """Whether that norm subtracts the mean (LayerNorm) or not (RMS norm)."""
        return isinstance(self._block(index).norm1, nn.LayerNorm)

    def layernorm_sigma(self, index: int) -> Tensor:
        """sigma [M] by which norm1 divides the prompts of block `index` as they are now: sqrt(variance + eps)."""
        prompt = self.prompts[index].detach()[0]
        if self.norm1_centres(index):
            prompt = prompt - prompt.mean(dim=-1, keepdim=True)
        return (prompt.square().mean(dim=-1) + self.norm1(index)[1]).sqrt()

    def heads(self, index: int) -> tuple[int, int]:
        """Number of heads and their width in block `index`."""
        attention = self._block(index).attn
        return int(attention.num_heads), _attention.head_dim(attention)

    def _block(self, index: int) -> Any:
        if index not in self.prompts:
            raise ValueError(f"index: block {index} has no prompts; prompted blocks are {list(self.prompted_blocks)}")
        return self.backbone.blocks[index]

    def _prompt(self, index: int, batch: int) -> Tensor:
        """The prompts of block `index`: [1, M, D], or [batch, M, D] where dropout is on. Not drawn inside of what
        activation checkpointing runs twice."""
        prompt: Tensor = self.prompts[index]
        if not (self.training and self.dropout):
            return prompt
        expanded = prompt.expand(batch, *prompt.shape[1:])
        if self.generator is None:
            return F.dropout(expanded, self.dropout, training=True)
        kept = torch.empty(expanded.shape, dtype=prompt.dtype, device=prompt.device)
        kept.bernoulli_(1 - self.dropout, generator=self.generator)
        return expanded * kept.div_(1 - self.dropout)

    def _run_deep(self, index: int, block: Any, x: Tensor, prompt: Tensor | None) -> Tensor:
        """One block; prompts add keys and values, and no query."""
        if prompt is None:
            out: Tensor = block(x)
            return out
        tokens = block.norm1(x)
        q, k, v = _attention.project(block.attn, tokens)
        prompt_k, prompt_v = self._project(block, prompt)
        mixed = self._attend(index, q, k, v, prompt_k, prompt_v, float(block.attn.scale))
        x = x + block.drop_path1(block.ls1(_attention.finish(block.attn, mixed, tokens)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]  # timm is untyped

    def _project(self, block: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts. Where each image has its own, their queries would cost half as much again."""
        rows = block.norm1(prompt)
        if len(rows) == 1:
            return _attention.project(block.attn, rows)[1:]
        return _attention.project_some(block.attn, rows[:, :0], rows)[1:]

    def _attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
    ) -> Tensor:
        """The prompts are a prefix that the batch shares; an observer wants its softmax columns, so keys are joined."""
        if not self._observers and self.placement != "prepend":
            return prefix_attention(q, k, v, prompt_k, prompt_v, scale=scale)
        keys, values = self._join(k, prompt_k, dim=2), self._join(v, prompt_v, dim=2)
        if not self._observers:
            return _attention.attend(q, keys, values, scale)
        mixed, mass = _attention.attend_with_mass(q, keys, values, prompt_k, scale)
        self._tell(index, q.detach(), mass)
        return mixed

    def _run_shallow(self, index: int, block: Any, x: Tensor, prompt: Tensor | None) -> Tensor:
        """One block of all rows; at block 0 the prompts join them."""
        if prompt is not None:
            if self._observers:
                self._observe_first(index, block, x, prompt)
            x = self._join(x, prompt, dim=1)
        out: Tensor = block(x)
        return out

    @torch.no_grad()
    def _observe_first(self, index: int, block: Any, x: Tensor, prompt: Tensor) -> None:
        q, k, v = _attention.project(block.attn, block.norm1(x))
        _, prompt_k, prompt_v = _attention.project(block.attn, block.norm1(prompt))
        keys, values = self._join(k, prompt_k, dim=2), self._join(v, prompt_v, dim=2)
        self._tell(index, q, _attention.attend_with_mass(q, keys, values, prompt_k, float(block.attn.scale))[1])

    def _join(self, tokens: Tensor, prompt: Tensor, dim: int) -> Tensor:
        expanded = prompt.expand(tokens.shape[0], *prompt.shape[1:]).to(tokens.dtype)
        return torch.cat((expanded, tokens) if self.placement == "prepend" else (tokens, expanded), dim=dim)

    def _tell(self, index: int, q: Tensor, mass: Tensor) -> None:
        for observer in tuple(self._observers):
            observer(index, q, mass)
