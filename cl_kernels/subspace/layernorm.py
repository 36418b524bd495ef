"""LayerNorm between prompts and projections: the exact folds and the tangent step (method-null-space 7.2).

With c_i = p_i - mean(p_i), sigma_i^2 = |c_i|^2 / D + eps and gain alpha, LN(p_i) = alpha * c_i / sigma_i + beta. NSP2's
conditions J1 dP^T = 0 and J2 dP = 0 leave out alpha, which stands between W_k and dP^T, and 1 / sigma, which stands
between S_P and dP. Folding both into the second moments costs one pass over them and no new data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import Projector, _checks

__all__ = ["fold_gain_and_centring", "fold_sigma", "sphere_update", "tangent_update"]


def fold_gain_and_centring(matrix: Tensor, gain: Tensor, *, centring: bool = True) -> Tensor:
    """C1* = C diag(gain) C1 diag(gain) C with C = I - 11^T / D; `centring=False` for norms that subtract no mean.

    matrix [..., D, D], gain [D]; the result has the matrix' dtype and is exactly symmetric. A projector built from it
    keeps the affinity of LN(P) where the paper's keeps that of P, up to a drift of sigma.
    """
    _checks.square("matrix", matrix)
    alpha = _checks.vector("gain", gain, matrix.shape[-1]).to(matrix)
    folded = alpha[:, None] * matrix * alpha
    if centring:
        folded = folded - folded.mean(dim=-2, keepdim=True)
        folded = folded - folded.mean(dim=-1, keepdim=True)
    return (folded + folded.mT) / 2


def fold_sigma(matrix: Tensor, sigma: Tensor) -> Tensor:
    """C2* = diag(1/sigma) C2 diag(1/sigma), with sigma [M] of the prompts at the time the projector is built.

    Fold into a copy and keep C2 itself: a fold with the sigma of another time leaves a first-order error. Raises
    `ValueError` for a sigma that is not positive.
    """
    _checks.square("matrix", matrix)
    scale = _checks.vector("sigma", sigma, matrix.shape[-1]).to(matrix)
    if not bool((scale > 0).all()):
        raise ValueError("sigma: expected positive numbers; a prompt of equal entries has none")
    inverse = scale.reciprocal()
    folded = inverse[:, None] * matrix * inverse
    return (folded + folded.mT) / 2


def tangent_update(update: Tensor, prompts: Tensor, right: Projector, left: Projector | None = None) -> Tensor:
    """The projected update X = B2 u B made tangent to the spheres of constant sigma: row i loses what lies along c_i.

    X - B2 diag(mu) N with N = C B, where (B2 * (C B C^T)) mu = (n_i . X_i)_i, C holds the centred prompts as rows and *
    is elementwise; a pseudo-inverse serves where prompts are parallel. Without `left` this is row by row
    X_i - (X_i . n_i / |n_i|^2) n_i. The result stays within the ranges of both projectors, and sigma changes in second
    order only.

    update and prompts [..., M, D]; `right` and `left` unnormalised and unmixed (eigenvalues 0 and 1), `right` built
    from a folded matrix; they may be batched. Cost: one product with B and an [M, M] pseudo-inverse in fp64.
    """
    _same_shape(update, prompts)
    x, centred = _wide(update), _centred(prompts)
    normal = right.to(x.dtype).apply(centred)
    overlap = (normal @ centred.mT).double()
    system = torch.diag_embed(overlap.diagonal(dim1=-2, dim2=-1))
    if left is not None:
        system = left.to(x.dtype).matrix() * (overlap + overlap.mT) / 2
    along = (normal * x).sum(dim=-1, keepdim=True)
    share = torch.linalg.pinv(system, rtol=torch.finfo(x.dtype).eps * 64, hermitian=True) @ along.double()
    removed = share.to(x.dtype) * normal
    return (x - (removed if left is None else left.to(x.dtype).apply(removed, "left"))).to(update.dtype)


def sphere_update(update: Tensor, prompts: Tensor, right: Projector) -> Tensor:
    """The projected update X = u B followed by a rotation within B's range that keeps every sigma exactly.

    c_i' = (I - B) c_i + |B c_i| / |B c_i + x_i| (B c_i + x_i). Exact for the affinity at any step size; its rescaling
    of rows leaves the range of a left projector, so it goes with a right one only. Same shapes as `tangent_update`.
    """
    _same_shape(update, prompts)
    centred = _centred(prompts)
    inside = right.to(centred.dtype).apply(centred)
    moved = inside + _centred(update)
    tiny = torch.finfo(centred.dtype).tiny
    length = inside.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(tiny)
    rotated: Tensor = length * moved - inside
    return rotated.to(update.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: Tensor) -> Tensor:
    wide = _wide(x)
    return wide - wide.mean(dim=-1, keepdim=True)


def _same_shape(update: Tensor, prompts: Tensor) -> None:
    if update.shape != prompts.shape or update.ndim < 2:
        raise ValueError(
            f"update: expected the shape of prompts [..., M, D], {tuple(prompts.shape)}, got {tuple(update.shape)}"
        )
