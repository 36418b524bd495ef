"""What can be asked of a projector: is it sound, what does it protect, and what do two of them protect together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SubspaceError
from cl_kernels.ops import Projector

__all__ = [
    "Form",
    "check",
    "form_of",
    "free_share",
    "from_form",
    "orthogonality_error",
    "protected_rank",
    "thin_projector",
    "union",
    "used",
]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Form(NamedTuple):
    """P = mix * Q / (||Q||_F if normalized else 1) + (1 - mix) I with Q = I - V V^T.

    V = `protected`, in fp64 on the CPU. `normalized` is None where Q = 0 leaves it open.
    """

    protected: Tensor
    mix: float
    normalized: bool | None


def orthogonality_error(projector: Projector) -> float:
    """max |V^T V - I| over the columns of V that are not zero padding; for a dense projector max |P - P^T|."""
    if projector.dense is not None:
        return _largest(projector.dense - projector.dense.mT)
    v = projector.basis.to(torch.float64)
    gram = v.mT @ v
    return _largest(gram - torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) != 0).to(gram)))


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(name: str, projector: Projector) -> None:
    """Raise unless the basis [d, r] is finite and orthonormal and the scales are finite numbers."""
    tensor = projector.basis if projector.dense is None else projector.dense
    if tensor.ndim != 2 or tensor.dtype not in TOLERANCE:
        raise ValueError(
            f"{name}: expected a two-dimensional basis of a real floating dtype, "
            f"got shape {tuple(tensor.shape)} of {tensor.dtype}"
        )
    if projector.dense is None and projector.rank > projector.dim:
        raise SubspaceError(f"{name}: basis of shape {tuple(tensor.shape)} has more columns than dimensions")
    scales = (float(projector.identity), float(projector.span))
    bad = int((~torch.isfinite(tensor)).sum()) + sum(not math.isfinite(scale) for scale in scales)
    if bad:
        raise NonFiniteError(f"{name}: {bad} entries of the projector are NaN or infinite")
    error, bound = orthogonality_error(projector), TOLERANCE[tensor.dtype]
    if projector.dense is not None:
        bound *= max(_largest(tensor), 1e-30)
    if error > bound:
        what = "max |V^T V - I|" if projector.dense is None else "max |P - P^T|"
        raise SubspaceError(f"{name}: basis is not orthonormal: {what} = {error:.3e}, at most {bound:.1e} is allowed")


def protected_rank(projector: Projector) -> int | None:
    """Number of directions that P damps; None for a dense projector, which has no sharp one."""
    if projector.dense is not None:
        return None
    columns = int((projector.basis != 0).any(dim=-2).sum()) if projector.rank else 0
    if float(projector.span) == 0:  # c I
        return 0 if float(projector.identity) else projector.dim
    return columns if float(projector.span) > 0 else projector.dim - columns


def free_share(projector: Projector) -> float:
    """Share of directions that P leaves free; for a dense P the participation ratio (tr P)^2 / (d ||P||_F^2)."""
    if projector.dense is None:
        rank = protected_rank(projector) or 0
        return (projector.dim - rank) / projector.dim if projector.dim else 1.0
    dense = projector.dense.to(torch.float64)
    norm = float(dense.square().sum())
    return float(dense.trace()) ** 2 / (dense.shape[-1] * norm) if norm else 0.0


def used(projector: Projector) -> float:
    """Directions that P does not leave free, d (1 - free share): the protected rank, for a dense P a fraction."""
    rank = protected_rank(projector)
    return projector.dim * (1.0 - free_share(projector)) if rank is None else float(rank)


def form_of(name: str, projector: Projector) -> Form:
    """Read V, mix and normalisation back from `identity` and `span`. Raises `SubspaceError` if they fit none."""
    if projector.dense is not None:
        raise SubspaceError(f"{name}: a dense projector has no basis to merge; merge second moments and rebuild it")
    basis = projector.basis.to("cpu", torch.float64)
    basis = basis[:, (basis != 0).any(dim=0)]
    identity, span = float(projector.identity), float(projector.span)
    if identity == span == 0:
        return Form(torch.eye(projector.dim, dtype=torch.float64), 1.0, None)
    on_free, on_protected, size = (identity, identity - span, span) if span >= 0 else (identity - span, identity, -span)
    protected = basis if span >= 0 else complement(basis)
    free = protected.shape[0] - protected.shape[1]
    if free == 0 or (size == 0 and identity == 1):
        return Form(protected, 1.0 - on_protected, None) if free == 0 else Form(protected[:, :0], 0.0, None)
    if math.isclose(on_free, 1.0, abs_tol=1e-6):
        return Form(protected, size, False)
    mix = 1.0 - on_protected
    if math.isclose(size * math.sqrt(free), mix, rel_tol=1e-6):
        return Form(protected, mix, True)
    raise SubspaceError(f"{name}: identity {identity} and span {span} are of no form that can be merged")


def from_form(form: Form, like: Tensor) -> Projector:
    """The projector of `form` with the thinner of the two bases, in the dtype and on the device of `like`."""
    dimension, rank = form.protected.shape
    thin = form.protected if 2 * rank <= dimension else complement(form.protected)
    return thin_projector(thin.to(like), rank, form.mix, bool(form.normalized))


def thin_projector(thin: Tensor, rank: int, mix: float, normalized: bool) -> Projector:
    """P = mix * Q / (||Q||_F if `normalized` else 1) + (1 - mix) I, of which `rank` directions are protected.

    `thin` [d, min(rank, d - rank)] is the protected basis if that is not wider than the free one, else the free one.
    """
    dimension = len(thin)
    free = dimension - rank
    if free == 0:
        return Projector(thin[:, :0].clone(), 1.0 - mix, -mix)
    size = mix / math.sqrt(free) if normalized else mix
    return Projector(thin, size + 1.0 - mix, size) if rank <= free else Projector(thin, 1.0 - mix, -size)


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis [d, d - r] of what is orthogonal to `basis` [d, r]."""
    full: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return full[:, basis.shape[1] :]


def union(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of span(first) + span(second), the same span in either order.

    Left singular vectors of [first, second] with a singular value above `tolerance`. Where the two spans meet at a
    small angle t that value is about t / sqrt(2), so directions that differ by less than `tolerance` count once.
    """
    both = torch.cat((first, second), dim=1)
    left, values, _ = torch.linalg.svd(both, full_matrices=False)
    kept: Tensor = left[:, values > tolerance]
    again: Tensor = torch.linalg.qr(kept).Q  # the second pass: orthonormal to rounding whatever the first one lost
    return again
