"""From second moments to a store of projectors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.ops.rules import Rule
from cl_kernels.subspace._algebra import Form
from cl_kernels.subspace._covariance import Covariance, PromptCovariance
from cl_kernels.subspace._merge import OnFull, check_on_full, freed
from cl_kernels.subspace.store import SubspaceStore

__all__ = ["build_store"]


def build_store(
    covariances: Mapping[str, Covariance | PromptCovariance],
    rule: Rule,
    *,
    left_rule: Rule | None = None,
    mix: float = 1.0,
    left_mix: float | None = None,
    normalize: Literal["fro"] | None = None,
    side: Literal["left", "right"] = "right",
    on_full: OnFull = "freeze",
    dtype: torch.dtype | None = None,
) -> SubspaceStore:
    """Projectors onto what `rule` leaves free, B = mix Q / (||Q||_F if "fro" else 1) + (1 - mix) I, by name.

    A `Covariance` gives a projector of `side` ("left" for `what="output_grad"`), a `PromptCovariance` one of each side,
    the left one by `left_rule` and `left_mix` where given. Captured energy and condition are recorded. The thinner of
    the protected and the free basis is kept, in `dtype` (default: that of the moments).

    Warns when a layer has no energy (all of it stays free), fewer than 4 rows for each protected direction, or, with
    ``on_full="freeze"``, nothing left free ("raise": `SubspaceError`; "relax": the weakest direction is given back).
    Raises `SubspaceMismatchError` for a matrix that is not square and symmetric, `NonFiniteError` for one that is not
    finite. Cost: one eigendecomposition of each matrix.
    """
    if not 0 <= mix <= 1 or (left_mix is not None and not 0 <= left_mix <= 1):
        raise ValueError(f"Invalid mix value: {mix}, left_mix {left_mix} (expected 0 <= mix <= 1)")
    if normalize not in (None, "fro"):
        raise ValueError(f"normalize: expected None or 'fro', got {normalize!r}")
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
    check_on_full(on_full)
    store = SubspaceStore()
    for name, moments in covariances.items():
        projectors: dict[str, Projector] = {}
        notes: dict[str, float] = {}
        parts = {side: moments} if isinstance(moments, Covariance) else {"left": moments.left, "right": moments.right}
        for which, part in parts.items():
            mine = isinstance(moments, Covariance) or which == "right"
            chosen, share = (rule, mix) if mine else (left_rule or rule, mix if left_mix is None else left_mix)
            label = f"{name} ({which})"
            values, vectors = _spectrum(label, part.matrix)
            rank = _protected(label, chosen, values, part.rows)
            like = part.matrix if dtype is None else part.matrix.to(dtype)
            projectors[which] = freed(label, Form(vectors[:, :rank], share, normalize == "fro"), like, on_full)
            notes[f"{which}_energy"], notes[f"{which}_condition"] = _energy_and_condition(values, rank)
        store.put(name, Sides(projectors.get("left"), projectors.get("right")), **notes)
    return store


def _energy_and_condition(values: Tensor, rank: int) -> tuple[float, float]:
    """Share of the trace held by the first `rank` eigenvalues; largest over smallest, which rounding bounds below."""
    total = float(values.double().sum())
    if not total:
        return 0.0, 1.0
    floor = torch.finfo(values.dtype).eps * len(values) * float(values[0])
    return float(values[:rank].double().sum()) / total, float(values[0]) / max(float(values[-1]), floor)


def _spectrum(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, at least 0, in the matrix' dtype (rules need its rounding), vectors in fp64."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise SubspaceMismatchError(f"{name}: expected a covariance [d, d], got shape {tuple(matrix.shape)}")
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NonFiniteError(f"{name}: {bad} of {matrix.numel()} entries of the covariance are NaN or infinite")
    error = float((matrix - matrix.mT).abs().max()) if matrix.numel() else 0.0
    if error > 1e-6 * float(matrix.abs().max()):
        raise SubspaceMismatchError(f"{name}: the covariance is not symmetric (by up to {error:.3e})")
    values, vectors = ops.symmetric_eigh(matrix)
    return values.cpu().clamp_min(0), vectors.to("cpu", torch.float64)


def _protected(name: str, rule: Rule, values: Tensor, rows: int) -> int:
    if not float(values[0]) > 0:
        warnings.warn(f"{name}: no row had any energy (a dead layer?), all of it stays free", stacklevel=3)
        return 0
    rank = rule.protected(values)
    if 0 < rows < 4 * rank:
        warnings.warn(
            f"{name}: {rows} rows are few for {rank} protected directions (fewer than 4 each); collect more",
            stacklevel=3,
        )
    return rank
