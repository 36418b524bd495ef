"""The formulas of the room in plain torch: short, slow on purpose, right in float64.

    A = Q R, diag(R) >= 0                                                          (method-lora-composition 2.1, 2.2)
    M = R gR^T - gQ^T Q,  C = tril(M, -1) + tril(M, -1)^T + diag(M),  gA = (gQ + Q C) S                         (2.3)
    S = R^-T,  or R (R^T R + delta^2 I)^-1 with delta = 10 n u max R_jj where the rank is deficient (0 for R = 0)

Float matrices are factored in double and rounded once, as the kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DECLINED", "DEFICIENT", "NONFINITE", "OK", "backward", "polar_backward", "qr", "qr_backward", "solver"]

OK, DEFICIENT, NONFINITE, DECLINED = 0, 1, 2, 3  # csrc/orthogonal_qr.h: QrStatus

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def qr(a: Tensor, floor: Tensor | None = None) -> Factors:
    """q, r, solve and status of matrices [..., m, n] in float32 or float64.

    With `floor` [..., n] a column whose part outside of the earlier ones is not longer than its floor is dropped: its
    column of q, and its row and column of solve, are zero, as is its row of r.
    """
    x = a.double()
    bad = ~torch.isfinite(x).flatten(-2).all(-1)
    x = torch.where(bad[..., None, None], 0.0, x)
    exponent = torch.frexp(x.abs().amax(-2).clamp_min(1e-300)).exponent.to(torch.float64)
    unit = torch.exp2(exponent.clamp(-960, 1000))  # exact; columns of length 1e200 or 1e-200 are as good as any
    scaled = x / unit[..., None, :]
    if floor is None:
        q, r = torch.linalg.qr(scaled)
        sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r.dtype)
        q, r = q * sign[..., None, :], r.triu() * sign[..., :, None]
        flagged = _flagged(r, a.dtype)
    else:
        q, r = _gram_schmidt(scaled, floor.double() / unit)
        flagged = torch.zeros_like(bad)
    r = r * unit[..., None, :]
    solve = solver(r, flagged, a.dtype)
    status = torch.where(bad, NONFINITE, torch.where(flagged, DEFICIENT, OK)).to(torch.int32)
    q, solve = (torch.where(bad[..., None, None], torch.nan, t) for t in (q, solve))
    r = torch.where(bad[..., None, None], torch.full_like(r, torch.nan).triu(), r)
    return q.to(a.dtype).contiguous(), r.to(a.dtype).contiguous(), solve.to(a.dtype).contiguous(), status


def _flagged(r: Tensor, dtype: torch.dtype) -> Tensor:
    """A column that adds at most 2^-22 (float, whose storage rounds that away) or 10 n u (double) of its length."""
    pivots, lengths = r.diagonal(dim1=-2, dim2=-1), torch.linalg.vector_norm(r, dim=-2)
    limit = 2.0**-22 if dtype == torch.float32 else 10 * r.shape[-1] * torch.finfo(dtype).eps / 2
    regular: Tensor = (pivots > limit * lengths).all(-1)
    return ~regular


def _gram_schmidt(x: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Column after column, each orthogonalised three times; what is not longer than its floor becomes zero."""
    q, r = torch.zeros_like(x), x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1])
    for j in range(x.shape[-1]):
        v = x[..., j].clone()
        for _ in range(3):
            part = (q.mT @ v[..., None])[..., 0]
            v, r[..., j] = v - (q @ part[..., None])[..., 0], r[..., j] + part
        length = torch.linalg.vector_norm(v, dim=-1)
        kept = length > floor[..., j]
        q[..., j] = torch.where(kept[..., None], v / torch.where(kept, length, 1.0)[..., None], 0.0)
        r[..., j, j] = torch.where(kept, length, 0.0)
    return q, r


def solver(r: Tensor, flagged: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix S of the backward, in the dtype of `r`; `dtype` is that of the input and sets delta.

    Dropped columns (R_jj = 0 without a flag) get nothing. Differentiable where nothing is flagged.
    """
    n = r.shape[-1]
    eye = torch.eye(n, dtype=r.dtype, device=r.device)
    gone = r.diagonal(dim1=-2, dim2=-1) == 0
    none = flagged[..., None] | gone
    plain = torch.where(none[..., :, None] | none[..., None, :], eye, r)
    inverse = torch.linalg.solve_triangular(plain.mT, eye.expand_as(r), upper=False)
    inverse = torch.where(none[..., :, None] | none[..., None, :], 0.0, inverse)
    if not bool(flagged.any()):
        return inverse
    u, s, vh = torch.linalg.svd(torch.where(flagged[..., None, None], r, eye))
    delta = 10 * n * torch.finfo(dtype).eps / 2 * r.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    unit = s.amax(-1, keepdim=True)
    t, d = s / unit, delta / unit
    weight = torch.where(unit > 0, t / (t * t + d * d) / unit, 0.0)
    return torch.where(flagged[..., None, None], (u * weight[..., None, :]) @ vh, inverse)


def qr_backward(gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor) -> Tensor:
    """gA from the saved factors; products in float64."""
    grads = [None if g is None else g.double() for g in (gq, gr)]
    return backward(grads[0], grads[1], q.double(), r.double(), solve.double()).to(q.dtype).contiguous()


def backward(gq: Tensor | None, gr: Tensor | None, q: Tensor, r: Tensor, solve: Tensor) -> Tensor:
    """The formula itself, differentiable in everything."""
    m = torch.zeros_like(r)
    if gr is not None:
        m = m + r @ gr.triu().mT
    if gq is not None:
        m = m - gq.mT @ q
    lower = m.tril(-1)
    x = q @ (lower + lower.mT + torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)))
    return (x if gq is None else x + gq) @ solve


def polar_backward(gq: Tensor, q: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """gA = (gQ - Q X) H^-1 + Q Omega, X = Q^T gQ, H Omega + Omega H = X - X^T, H = V diag(s) V^T          (2.5)

    Singular values below delta = 10 n u s_max are damped, 1/s -> s / (s^2 + delta^2).
    """
    delta = 10 * s.shape[-1] * torch.finfo(gq.dtype).eps / 2 * s.amax(-1, keepdim=True)
    gq, q, v, s, delta = (t.double() for t in (gq, q, v, s, delta))
    x = q.mT @ gq
    pairs = s[..., :, None] + s[..., None, :]
    omega = v @ (_damped(pairs, delta[..., None]) * (v.mT @ (x - x.mT) @ v)) @ v.mT
    inverse = (v * _damped(s, delta)[..., None, :]) @ v.mT
    return (gq - q @ x) @ inverse + q @ omega


def _damped(s: Tensor, delta: Tensor) -> Tensor:
    """1 / s without the infinity."""
    square = s * s + delta * delta
    return torch.where(square > 0, s / torch.where(square > 0, square, 1.0), 0.0)
