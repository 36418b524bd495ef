"""CODA-Prompt: prompts composed from components by soft weights (Smith et al., CVPR 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_kernels.nn.prompt_pool import Grown, LayerPrompt, PromptPool, at_least_one, even, of_kind, pairs
from cl_kernels.ops import extend_basis, qr

__all__ = ["CODAPrompt", "coda_weights", "fresh_rows"]

_KINDS = ("prompt", "key", "attention")


class _Components(Grown):
    """p [M, 2 m D], k [M, Dq] and a [M, Dq]: of earlier tasks as buffers `past_*`, of the current one as parameters."""

    def __init__(self, prompt: int, query: int) -> None:
        super().__init__()
        for kind, width in zip(_KINDS, (prompt, query, query), strict=True):
            self.register_buffer(f"past_{kind}", torch.empty(0, width))
            setattr(self, kind, nn.Parameter(torch.empty(0, width)))

    def past(self, kind: str) -> Tensor:
        return self.get_buffer(f"past_{kind}")

    def both(self, kind: str) -> tuple[Tensor, Tensor]:
        """Earlier rows and those that train."""
        return self.past(kind), self.get_parameter(kind)

    def absorb(self) -> None:
        """What was trained joins the past."""
        for kind in _KINDS:
            self.register_buffer(f"past_{kind}", torch.cat([rows.detach() for rows in self.both(kind)]))

    def start(self, kind: str, rows: Tensor) -> None:
        """Rows to train."""
        setattr(self, kind, nn.Parameter(rows.to(self.past(kind))))


class CODAPrompt(PromptPool):
    """`w_bm = cos(q_b * a_m, k_m)` (product first, no softmax) and `P_b = sum_m w_bm p_m` over the components so far.

    Every task adds `components` (10 as published: 100 for 10 tasks) and trains these; earlier ones stay in the sum,
    fixed. New rows of p, k and a are drawn from N(0, 1) and made orthonormal to each other and to the span of all
    earlier rows: by two-pass projection and QR (`orthogonalize="qr"`), or by the published classical Gram-Schmidt
    (`"published"`), which subtracts projections onto the earlier rows one by one and is off by cosines of 0.04 to 0.23
    once training has turned those. Where no direction is left, rows are random units and a warning says so.

    Weights by two products, ``q (A * K_n)^T / sqrt(q^2 (A^2)^T)`` with normalised keys K_n, and prompts by a third:
    nothing of size [B, M, D] is formed. `layers`: blocks 0-4 as published, all of a smaller backbone.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        *,
        components: int = 10,
        length: int = 8,
        layers: Sequence[int] | None = None,
        orthogonalize: str = "qr",
        query_dim: int | None = None,
    ) -> None:
        chosen = range(min(at_least_one("blocks", blocks), 5)) if layers is None else layers
        super().__init__(dim, blocks, heads, chosen, query_dim)
        if orthogonalize not in ("qr", "published"):
            raise ValueError(f"orthogonalize: expected 'qr' or 'published', got {orthogonalize!r}")
        self.components, self.length = at_least_one("components", components), even("length", length)
        self.orthogonalize = orthogonalize
        self.parts = nn.ModuleDict()
        for layer in self.layers:
            self.parts[str(layer)] = _Components(length * dim, self.query_dim)

    def _start(self, task: int, generator: torch.Generator | None) -> None:
        for name in self.parts:
            part = self._part(name)
            part.absorb()
            for kind in _KINDS:
                past = part.past(kind)
                drawn = torch.randn(self.components, past.shape[1], generator=generator)
                part.start(kind, fresh_rows(drawn, past, published=self.orthogonalize == "published"))

    def _part(self, name: str) -> _Components:
        return of_kind(self.parts[name], _Components)

    def _weights(self, query: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Of earlier components and of those that train [B, M]."""
        part = self._part(str(layer))
        old, new = zip(part.both("attention"), part.both("key"), strict=True)
        return coda_weights(query, old[0], old[1]), coda_weights(query, new[0], new[1])

    def _prompts(self, query: Tensor, layer: int, train: bool) -> LayerPrompt | None:
        old, new = self._part(str(layer)).both("prompt")
        of_old, of_new = self._weights(query, layer)
        rows = of_new.to(new.dtype) @ new
        if len(old):
            rows = rows + of_old.to(old.dtype) @ old
        return LayerPrompt(*pairs(rows.unflatten(-1, (self.length, self.dim)), self.heads))

    def _choices(self, query: Tensor, layer: int) -> Tensor:
        return torch.cat(self._weights(query, layer), dim=1).abs()


def coda_weights(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b * a_m, k_m) [B, M] of query [B, D], attention and keys [M, D], in float32 at least, by two products."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, a = query.to(wide), attention.to(wide)
        tiny = torch.finfo(wide).tiny
        against = a * torch.nn.functional.normalize(keys.to(wide), dim=-1)
        length = (q.square() @ a.square().mT).clamp_min(tiny).sqrt()
        return (q @ against.mT) / length


def fresh_rows(drawn: Tensor, past: Tensor, *, published: bool = False) -> Tensor:
    """`drawn` [n, D] made orthonormal, and orthogonal to the span of the rows of `past` [k, D], in float64.

    `published`: projections of each raw row onto the earlier rows are subtracted one by one, as the official code does.
    Rows for which no direction is left (k + n > D) are the drawn ones, normalised, with a warning.
    """
    rows, earlier = drawn.double().cpu(), past.detach().double().cpu()
    unit = torch.nn.functional.normalize(rows, dim=1)
    if published:
        return _classical(rows, earlier).float()
    room = rows.shape[1] - len(earlier)
    found = unit.clone()
    if room > 0:
        few = rows[:room].mT
        basis = qr(earlier.mT).q if len(earlier) else few[:, :0]
        extension = extend_basis(basis, few)
        found[:room] = torch.where(extension.kept[:, None], extension.q.mT, unit[:room])
    if room < len(rows):
        warnings.warn(
            f"CODAPrompt: {len(earlier)} components of width {rows.shape[1]} leave room for {max(room, 0)} orthogonal "
            f"ones, {len(rows)} were asked for; the others are random",
            stacklevel=2,
        )
    return found.float()


def _classical(rows: Tensor, earlier: Tensor) -> Tensor:
    """Classical Gram-Schmidt against rows that need not be orthogonal themselves."""
    made = list(earlier)
    for row in rows:
        rest = row - sum(((row @ one) / (one @ one) * one for one in made), torch.zeros_like(row))
        made.append(rest / rest.norm())
    return torch.stack(made[len(earlier) :])
