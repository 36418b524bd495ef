"""What NSP2 gathers of a prompted block: head Grams of the image queries, the Gram of the softmax mass on prompts.

With J1 the rows q_h W_k,h of all heads stacked and J2 the softmax columns of the prompts (Lu et al., NeurIPS 2024,
Eqs. 24 and 25), the right matrix is J1^T J1 = sum_h W_k,h^T G_h W_k,h with G_h = sum q q^T: H small Grams are a
sufficient statistic, 156 times cheaper at ViT-B than forming J1 (method-null-space 12.2). The left one is J2^T J2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.subspace._covariance import PromptCovariance
from cl_kernels.subspace._moments import Moments, Sums

__all__ = ["PromptMoments", "Prompted", "read"]


@runtime_checkable
class Prompted(Protocol):
    """A model whose prompts can be observed; `nn.PromptedViT` is one."""

    num_prompts: int

    @property
    def prompted_blocks(self) -> tuple[int, ...]: ...
    def heads(self, index: int) -> tuple[int, int]: ...
    def key_weight(self, index: int) -> Tensor: ...
    def observe(self, callback: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]: ...


class PromptMoments:
    """Running statistics of one prompted block: `update(q, s_p)` for each batch, then `covariance(key_weight)`.

    `shape` is (heads, head width), `prompts` their number M. State: H dh^2 + M^2 numbers, whatever the width D.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        prompts: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.queries = Moments(shape, dtype, torch.device(device))
        self.mass = Moments((prompts,), dtype, torch.device(device))

    def update(self, q: Tensor, s_p: Tensor, weighting: str = "rows") -> None:
        """Add image queries q [B, H, N, dh] (before the scale) and the prompts' softmax columns s_p [B, H, N, M].

        Every (image, head, token) is a row of both: n = B H N. "batches" adds Grams divided by n, as the official code
        does, "rows" the Grams.
        """
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        if s_p.shape[:3] != q.shape[:3]:
            raise ValueError(f"s_p: expected {tuple(q.shape[:3])} leading dimensions, got {tuple(s_p.shape)}")
        if not rows:
            return
        self.queries.update([q], rows, weighting)
        self.mass.update([s_p.reshape(rows, s_p.shape[-1])], rows, weighting)

    def covariance(self, key_weight: Tensor, centred: bool = False) -> PromptCovariance:
        """Left [M, M] and right [D, D] for `key_weight` [H dh, D], expanded in fp64. Raises `NonFiniteError`."""
        return read("prompts", self.sums(), key_weight, centred)

    @property
    def count(self) -> float:
        """Rows so far, or batches with that weighting."""
        return self.queries.count

    def sums(self) -> tuple[Sums, ...]:
        """Left and right sums as they stand."""
        return (*self.mass.sums(), *self.queries.sums())


def read(name: str, sums: tuple[Sums, ...], key_weight: Tensor, centred: bool) -> PromptCovariance:
    """The covariances behind the sums of a `PromptMoments`."""
    mass, queries = sums[0].checked(f"{name} (left)"), sums[1].checked(f"{name} (right)")
    weight = key_weight.to(queries.matrix.device, torch.float64)
    right = ops.expand_head_grams(queries.matrix.double(), weight)
    heads = weight.unflatten(0, queries.total.shape)
    total = torch.einsum("hk,hkd->d", queries.total.double(), heads)
    expanded = Sums((right + right.mT) / 2, total, queries.weight, queries.rows, queries.updates, None)
    return PromptCovariance(mass.covariance(centred), expanded.covariance(centred))
