"""Two projectors put together, and what happens when nothing stays free."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceError, SubspaceMismatchError
from cl_kernels.ops import Projector
from cl_kernels.subspace._algebra import Form, form_of, from_form, union

__all__ = ["OnFull", "check_on_full", "freed", "merged", "settled", "warn_frozen"]

OnFull = Literal["freeze", "raise", "relax"]


def merged(
    name: str, ours: Projector | None, theirs: Projector | None, tolerance: float | None, on_full: OnFull
) -> Projector | None:
    """One side of two entries put together; see `SubspaceStore.merge`."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    if ours.dim != theirs.dim:
        raise SubspaceMismatchError(
            f"{name}: cannot merge a projector of dimension {theirs.dim} into one of {ours.dim}"
        )
    a, b = form_of(name, ours), form_of(name, theirs)
    if a.mix == 0.0 or b.mix == 0.0:
        a, b = (b, a) if a.mix == 0.0 else (a, b)
        return from_form(a, ours.basis)
    normalized = a.normalized if b.normalized is None else b.normalized
    if abs(a.mix - b.mix) > 1e-6 or (a.normalized is not None and a.normalized != normalized):
        raise SubspaceError(
            f"{name}: cannot merge projectors of mix {a.mix:.4g} and {b.mix:.4g} or unlike normalisation"
        )
    wide = ours.basis.dtype == theirs.basis.dtype == torch.float64
    bound = tolerance if tolerance is not None else (1e-7 if wide else 1e-4)
    return freed(name, Form(union(a.protected, b.protected, bound), a.mix, normalized), ours.basis, on_full)


def check_on_full(on_full: str) -> None:
    """Raise `ValueError` for a word that `OnFull` does not have."""
    if on_full not in ("freeze", "raise", "relax"):
        raise ValueError(f"on_full: expected 'freeze', 'raise' or 'relax', got {on_full!r}")


def settled(name: str, dimension: int, rank: int, on_full: OnFull) -> int:
    """How many of `rank` directions stay protected, where that would be all. Raises `SubspaceError` for "raise"."""
    if rank < dimension:
        return rank
    if on_full == "raise":
        raise SubspaceError(f"{name}: all {dimension} directions are protected; nothing is left to train")
    return dimension - 1 if on_full == "relax" else dimension


def freed(name: str, form: Form, like: Tensor, on_full: OnFull) -> Projector:
    """The projector of `form`, with what `on_full` asks for when it protects every direction."""
    dimension, rank = form.protected.shape
    kept = settled(name, dimension, rank, on_full)
    if kept == dimension:
        warn_frozen(name, dimension, stacklevel=5)
    return from_form(form._replace(protected=form.protected[:, :kept]), like)


def warn_frozen(name: str, dimension: int, stacklevel: int) -> None:
    """Say that a layer no longer moves."""
    warnings.warn(
        f"{name}: all {dimension} directions are protected, the layer no longer moves "
        '(on_full="relax" frees one, "raise" stops)',
        stacklevel=stacklevel,
    )
