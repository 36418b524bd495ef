"""From second moments to a store of projectors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cl_kernels import ops
from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.ops.rules import Rule
from cl_kernels.subspace._algebra import thin_projector
from cl_kernels.subspace._covariance import Covariance, PromptCovariance
from cl_kernels.subspace._merge import OnFull, check_on_full, settled, warn_frozen
from cl_kernels.subspace._owners import Solved, solved_by_owners
from cl_kernels.subspace._reduce import same_everywhere
from cl_kernels.subspace.store import SubspaceStore

__all__ = ["build_store"]


class _Item(NamedTuple):
    """One matrix, and what is to become of it."""

    name: str
    side: str
    moments: Covariance
    rule: Rule
    mix: float

    @property
    def label(self) -> str:
        return f"{self.name} ({self.side})"


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
    process_group: dist.ProcessGroup | None = None,
) -> SubspaceStore:
    """Projectors onto what `rule` leaves free, B = mix Q / (||Q||_F if "fro" else 1) + (1 - mix) I, by name.

    A `Covariance` gives a projector of `side` ("left" for `what="output_grad"`), a `PromptCovariance` one of each side,
    the left one by `left_rule` and `left_mix` where given. Captured energy and condition are recorded. The thinner of
    the protected and the free basis is kept, in `dtype` (default: that of the moments).

    With a `process_group` every process calls this with the same covariances, each matrix is solved by one of them
    (largest first, by d^3), and all return the same store, bit for bit; an error of one is raised by all.

    Warns when a layer has no energy (all of it stays free), fewer than 4 rows for each protected direction, or, with
    ``on_full="freeze"``, nothing left free ("raise": `SubspaceError`; "relax": the weakest direction is given back).
    Raises `SubspaceMismatchError` for a matrix that is not square and symmetric, or other layers on other processes,
    `NonFiniteError` for one that is not finite, `SolverError`. Cost: one eigendecomposition of each matrix.
    """
    if not 0 <= mix <= 1 or (left_mix is not None and not 0 <= left_mix <= 1):
        raise ValueError(f"Invalid mix value: {mix}, left_mix {left_mix} (expected 0 <= mix <= 1)")
    if normalize not in (None, "fro"):
        raise ValueError(f"normalize: expected None or 'fro', got {normalize!r}")
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
    check_on_full(on_full)
    items = list(_items(covariances, side, (left_rule or rule, rule), (mix if left_mix is None else left_mix, mix)))
    matrices = [item.moments.matrix for item in items]
    if process_group is None:
        solved = [_solve(item, on_full, dtype) for item in items]
    else:
        options = (mix, left_mix, normalize, on_full, dtype)
        described = repr((options, [(item.label, tuple(item.moments.matrix.shape)) for item in items]))
        if not same_everywhere(described, matrices[0].device if matrices else None, process_group):
            raise SubspaceMismatchError(
                f"process_group: its processes build different stores; this one has {described}"
            )
        solved = solved_by_owners(matrices, dtype, lambda i: _solve(items[i], on_full, dtype), process_group)
    store = SubspaceStore()
    made: dict[str, dict[str, Projector]] = {}
    notes: dict[str, dict[str, float]] = {}
    for item, one in zip(items, solved, strict=True):
        _warn(item, one)
        projector = thin_projector(one.basis, one.protected, item.mix, normalize == "fro")
        made.setdefault(item.name, {})[item.side] = projector
        known = {f"{item.side}_energy": one.energy, f"{item.side}_condition": one.condition}
        notes.setdefault(item.name, {}).update(known)
    for name, sides in made.items():
        store.put(name, Sides(sides.get("left"), sides.get("right")), **notes[name])
    return store


def _items(
    covariances: Mapping[str, Covariance | PromptCovariance],
    side: str,
    chosen: tuple[Rule, Rule],
    mixes: tuple[float, float],
) -> Iterator[_Item]:
    for name, moments in covariances.items():
        if isinstance(moments, Covariance):
            yield _Item(name, side, moments, chosen[1], mixes[1])
        else:
            yield _Item(name, "left", moments.left, chosen[0], mixes[0])
            yield _Item(name, "right", moments.right, chosen[1], mixes[1])


def _solve(item: _Item, on_full: OnFull, dtype: torch.dtype | None) -> Solved:
    matrix = item.moments.matrix
    values, vectors = _spectrum(item.label, matrix)
    dead = not float(values[0]) > 0
    rank = settled(item.label, len(values), 0 if dead else item.rule.protected(values), on_full)
    thin = vectors[:, :rank] if 2 * rank <= len(values) else vectors[:, rank:]
    basis = matrix.new_empty(thin.shape, dtype=dtype).copy_(thin)  # a view would keep all vectors alive
    return Solved(basis, rank, dead, *_energy_and_condition(values, rank))


def _energy_and_condition(values: Tensor, rank: int) -> tuple[float, float]:
    """Share of the trace held by the first `rank` eigenvalues; largest over smallest, which rounding bounds below."""
    total = float(values.double().sum())
    if not total:
        return 0.0, 1.0
    most = 1 / (torch.finfo(values.dtype).eps * len(values))
    largest, smallest = float(values[0]), float(values[-1])
    condition = largest / smallest if smallest > largest / most else most  # of denormal values largest / most is 0
    return float(values[:rank].double().sum()) / total, condition


def _spectrum(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, at least 0, in the matrix' dtype (rules need its rounding), and vectors."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise SubspaceMismatchError(f"{name}: expected a covariance [d, d], got shape {tuple(matrix.shape)}")
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NonFiniteError(f"{name}: {bad} of {matrix.numel()} entries of the covariance are NaN or infinite")
    error = float((matrix - matrix.mT).abs().max()) if matrix.numel() else 0.0
    if error > 1e-6 * float(matrix.abs().max()):
        raise SubspaceMismatchError(f"{name}: the covariance is not symmetric (by up to {error:.3e})")
    values, vectors = ops.symmetric_eigh(matrix)
    return values.cpu().clamp_min(0), vectors


def _warn(item: _Item, one: Solved) -> None:
    rows, dimension = item.moments.rows, len(item.moments.matrix)
    if one.dead:
        warnings.warn(f"{item.label}: no row had any energy (a dead layer?), all of it stays free", stacklevel=3)
    if 0 < rows < 4 * one.protected:
        warnings.warn(
            f"{item.label}: {rows} rows are few for {one.protected} protected directions (fewer than 4 each); "
            "collect more, or shrink them (`Covariance.shrunk`)",
            stacklevel=3,
        )
    if one.protected == dimension:
        warn_frozen(item.label, dimension, stacklevel=4)
