"""Second moments in plain torch: only the upper blocks are computed, and both triangles are written.

Products of 16-bit rows are exact in float32, and their partial sums are promoted every 256 rows, so the
result is as good as float32 rows give; a product with 16-bit output makes the matrix indefinite (126 of 768 eigenvalues
negative in the measurement of performance.md 1.1.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops._precision import float32_products_are_exact
from cl_kernels.ops.covariance.state import add_count_, refuse_shared_memory, scale_

__all__ = ["add_moment_", "expand_head_grams", "update_covariance_", "update_covariances_", "update_head_grams_"]

PROMOTED_ROWS = 256  # with 512, torch's narrow products are 2.4 times as wrong as its wide ones; with 256, they are not
BLOCK = 128  # 1.5x to 1.7x the full product for d from 768 to 3072 on one thread; 1.3x at 384


def update_covariance_(
    cov: Tensor,
    x: Tensor,
    total: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    alpha: float,
    beta: float,
) -> None:
    """cov <- beta cov + alpha X^T diag(weight) X, and likewise total (column sums) and count (sum of weights)."""
    refuse_shared_memory({"cov": [cov], "total": [total], "count": [count]}, {"x": [x], "weight": [weight]})
    add_moment_(cov, x, total, count, weight, alpha, beta)


def update_covariances_(
    covs: list[Tensor],
    xs: list[Tensor],
    totals: list[Tensor],
    counts: list[Tensor],
    weights: list[Tensor],
    alpha: float,
    beta: float,
) -> None:
    """`update_covariance_` for many layers; an empty list stands for "none given"."""
    refuse_shared_memory({"covs": covs, "totals": totals, "counts": counts}, {"xs": xs, "weights": weights})
    for i, (cov, x) in enumerate(zip(covs, xs, strict=True)):
        total, count, weight = (values[i] if values else None for values in (totals, counts, weights))
        add_moment_(cov, x, total, count, weight, alpha, beta)


def update_head_grams_(grams: Tensor, q: Tensor, alpha: float, beta: float) -> None:
    """G_h <- beta G_h + alpha sum over images and tokens of q_h q_h^T."""
    refuse_shared_memory({"grams": [grams]}, {"q": [q]})
    for head, gram in enumerate(grams):
        add_moment_(gram, q[:, head], None, None, None, alpha, beta)


def expand_head_grams(grams: Tensor, weight: Tensor) -> Tensor:
    """sum_h W_h^T G_h W_h in float64, returned in the dtype of `grams`."""
    heads, size, _ = grams.shape
    slices = weight.double().reshape(heads, size, -1)
    with torch.autocast(grams.device.type, enabled=False):
        full = slices.flatten(0, 1).mT @ (grams.double() @ slices).flatten(0, 1)
    return ((full + full.mT) / 2).to(grams.dtype)


def add_moment_(
    cov: Tensor,
    x: Tensor,
    total: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    alpha: float,
    beta: float,
    promoted_rows: int = PROMOTED_ROWS,
) -> None:
    """One matrix, its memory already checked; float64 rows may be taken many at a time."""
    size = cov.shape[0]
    rows = x.reshape(x.shape[:-1].numel(), size)
    weights = None if weight is None else weight.reshape(-1, 1)
    dtype = _product_dtype(x)
    scale_(cov, beta)
    if total is not None:
        scale_(total, beta)
    if count is not None:
        add_count_(count, rows.shape[0], weight, alpha, beta)
    with torch.autocast(x.device.type, enabled=False):  # it would round the products to 16 bits
        for first in range(0, rows.shape[0], promoted_rows):
            plain = rows[first : first + promoted_rows].to(dtype)
            weighted = plain if weights is None else plain * weights[first : first + promoted_rows].to(dtype)
            for left in range(0, size, BLOCK):
                cov[left : left + BLOCK, left:].add_(weighted[:, left : left + BLOCK].mT @ plain[:, left:], alpha=alpha)
            if total is not None:
                total.add_(weighted.sum(0, dtype=torch.float64), alpha=alpha)
    _mirror_(cov)


def _product_dtype(x: Tensor) -> torch.dtype:
    """float32 for rows of at most 32 bits, unless torch may shorten float32 products to TF32 or bfloat16."""
    if x.dtype == torch.float64 or not float32_products_are_exact(x.device):
        return torch.float64
    return torch.float32


def _mirror_(cov: Tensor) -> None:
    """Copy the upper triangle to the lower one, a block at a time."""
    for left in range(0, cov.shape[0], BLOCK):
        block, rest = slice(left, left + BLOCK), slice(left + BLOCK, None)
        corner = cov[block, block]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        cov[rest, block] = cov[block, rest].mT
