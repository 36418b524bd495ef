"""What is built on the QR operation and on matrix products alone, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["PENALTIES", "extend", "penalty", "polar_factor"]

PENALTIES = ("frobenius", "cross", "l1", "mean_square")


def polar_factor(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The polar factor Q, and V and s of (A^T A)^(1/2) = V diag(s) V^T."""
    q, r, *_ = torch.ops.cl_kernels.qr(a)
    wide = r.double()
    lost = ~torch.isfinite(wide).flatten(-2).all(-1)[..., None, None]
    u, s, vh = torch.linalg.svd(torch.where(lost, torch.eye(r.shape[-1], dtype=wide.dtype, device=r.device), wide))
    factor = (q.double() @ (u @ vh)).to(a.dtype)  # in double whatever torch's switch for TF32 says
    v = torch.where(lost, torch.nan, vh.mT)
    return factor.contiguous(), v.to(a.dtype).contiguous(), s.to(a.dtype)


def extend(basis: Tensor, a: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    """q, coefficients, r, solve, status of A = P S + Q R, by two passes of block Gram-Schmidt (2.4)."""
    p, wide = basis.double(), a.double()
    floor = tolerance * torch.linalg.vector_norm(wide, dim=-2)
    s1 = p.mT @ wide
    q1, r1, solve1, status1 = torch.ops.cl_kernels.qr((wide - p @ s1).to(a.dtype), floor.to(a.dtype))
    # Kept columns of q1 have length 1 up to what the old span still holds of them, which is little.
    half = floor.new_full((), 0.5, dtype=a.dtype).expand(floor.shape)
    w = q1.double()
    s2 = p.mT @ w
    q, r2, solve2, status2 = torch.ops.cl_kernels.qr((w - p @ s2).to(a.dtype), half)
    r, solve = r2.double() @ r1.double(), solve2.double() @ solve1.double()
    coefficients = s1 + s2 @ r1.double()
    narrow = [t.to(a.dtype).contiguous() for t in (coefficients, r, solve)]
    return q, *narrow, torch.maximum(status1, status2)


class _Frobenius(torch.autograd.Function):
    """sqrt(past + 2 |C|^2 + |S|^2) with its own gradient: two products, and no division by a value of zero."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, old: Tensor | None, past: Tensor | None) -> Tensor:
        s = new.mT @ new
        s.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        square = s.square().sum(dim=(-2, -1))
        c = None
        if old is not None:
            c = old.mT @ new
            square = square + 2 * c.square().sum(dim=(-2, -1)) + (0.0 if past is None else past)
        value = square.sqrt()
        ctx.save_for_backward(new, old, c, s, value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        new, old, c, s, value = ctx.saved_tensors
        product = new @ s if old is None else new @ s + old @ c
        factor = torch.where(value > 0, 2 * grad / torch.where(value > 0, value, 1.0), 0.0)
        return (factor[..., None, None] * product).sum_to_size(new.shape), None, None


def _frobenius(new: Tensor, old: Tensor | None, past: Tensor | None) -> Tensor:
    value: Tensor = _Frobenius.apply(new, old, past)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return value


def penalty(new: Tensor, old: Tensor | None, norm: str, past: Tensor | None) -> Tensor:
    """One number for each matrix; `old` is constant."""
    if norm == "frobenius":
        if old is not None and past is None:
            past = _frobenius(old, None, None).square()
        return _frobenius(new, old, past)
    if old is None:  # the public function refuses this; the type checker cannot know
        raise ValueError(f"old: norm {norm!r} needs it")
    c = old.mT @ new
    if norm == "l1":
        value = c.abs().sum(dim=(-2, -1))
    else:
        value = torch.linalg.matrix_norm(c) if norm == "cross" else c.square().mean(dim=(-2, -1))
    return value
