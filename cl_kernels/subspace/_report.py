"""Rows of a store's report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypedDict

from cl_kernels.ops import Sides
from cl_kernels.subspace._algebra import free_share, orthogonality_error, protected_rank

__all__ = ["SideReport", "side_reports"]

ROUNDING = 1e-6  # directions of a dense projector come in fractions


class SideReport(TypedDict):
    """One row of `SubspaceStore.report()`; `rank` counts protected directions and is None for a dense projector."""

    layer: str
    side: str
    dimension: int
    rank: int | None
    energy: float | None
    condition: float | None
    orthogonality_error: float
    used: float
    added: float | None
    tasks_left: float | None


def side_reports(name: str, sides: Sides, notes: Mapping[str, float]) -> Iterator[SideReport]:
    """One row for each side that has a projector."""
    for side, projector in zip(Sides._fields, sides, strict=True):
        if projector is not None:
            free, added = free_share(projector), notes.get(f"{side}/added")
            yield SideReport(
                layer=name,
                side=side,
                dimension=projector.dim,
                rank=protected_rank(projector),
                energy=notes.get(f"{side}/energy"),
                condition=notes.get(f"{side}/condition"),
                orthogonality_error=orthogonality_error(projector),
                used=1.0 - free,
                added=added,
                tasks_left=None if added is None else _tasks_left(free * projector.dim, added),
            )


def _tasks_left(free: float, added: float) -> float:
    """floor(free / added), infinity where the last task added nothing (or gave back)."""
    if added <= ROUNDING:
        return math.inf
    return float(math.floor(free / added + ROUNDING))
