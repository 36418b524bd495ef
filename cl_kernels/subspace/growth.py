"""A basis of what the tasks so far have used, which only grows (GPM's memory)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.errors import NonFiniteError, SubspaceMismatchError

__all__ = ["Growth", "grow_basis"]


class Growth(NamedTuple):
    """An orthonormal `basis` [d, r] in float64, and the share of the new second moment's trace that it captures."""

    basis: Tensor
    captured: float


@torch.no_grad()
def grow_basis(basis: Tensor | None, covariance: Tensor, keep: float, *, short: bool = False) -> Growth:
    """`basis` [d, r] extended by the fewest directions with which it holds `keep` of the trace of `covariance` [d, d].

        residual = (I - M M^T) C (I - M M^T);   M <- [M, leading k eigenvectors of the residual],
        k the least with  tr(M^T C M) + lambda_1 + ... + lambda_k >= keep tr(C)

    With C = R R^T this is GPM's SVD of the residual of R, without R. The columns of `basis` (None: none yet) stay as
    they are; new ones are orthogonalised against them twice, so M^T M = I to rounding after any number of tasks, and
    r <= d. A residual eigenvalue below eps d tr(C) is rounding and adds no direction; a zero `covariance` adds none and
    counts as captured. `short` adds one direction less than needed, as the official code does in its first task.

    Raises `ValueError` for `keep` outside [0, 1], `SubspaceMismatchError` for shapes that do not fit, `NonFiniteError`.
    Cost: one eigendecomposition, and 4 products of d^2 r operations. Source: GPM, Eq. 8 and 9.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a number in [0, 1], got {keep!r}")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise SubspaceMismatchError(f"covariance: expected [d, d], got {tuple(covariance.shape)}")
    c = covariance.detach().to(torch.float64)
    m = c.new_empty(len(c), 0) if basis is None else basis.detach().to(c)
    if m.ndim != 2 or len(m) != len(c):
        raise SubspaceMismatchError(f"basis: expected [{len(c)}, r], got {tuple(m.shape)}")
    total = float(c.trace())
    if not torch.isfinite(c).all():
        raise NonFiniteError("covariance: some entries are NaN or infinite")
    if total <= 0:
        return Growth(m, 1.0)
    cross = c @ m
    inner = m.mT @ cross
    residual = c - m @ cross.mT - cross @ m.mT + m @ inner @ m.mT
    values, vectors = ops.symmetric_eigh((residual + residual.mT) / 2)
    held, wanted = float(inner.trace()), keep * total
    sums = held + values.clamp_min(0).cumsum(0)
    count = 0 if held >= wanted else int((sums < wanted).sum()) + 1
    count -= short and count > 0
    real = int((values > torch.finfo(c.dtype).eps * len(c) * total).sum())
    new = vectors[:, : min(count, real, len(c) - m.shape[1])]
    for _ in range(2):
        new = new - m @ (m.mT @ new)
    grown = torch.cat([m, torch.linalg.qr(new).Q], dim=1)
    return Growth(grown, float(((c @ grown) * grown).sum()) / total)
