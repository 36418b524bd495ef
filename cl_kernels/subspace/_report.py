"""Rows of a store's report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypedDict

from cl_kernels.ops import Sides
from cl_kernels.subspace._algebra import orthogonality_error, protected_rank

__all__ = ["SideReport", "side_reports"]


class SideReport(TypedDict):
    """One row of `SubspaceStore.report()`; `rank` counts protected directions and is None for a dense projector."""

    layer: str
    side: str
    dimension: int
    rank: int | None
    energy: float | None
    condition: float | None
    orthogonality_error: float


def side_reports(name: str, sides: Sides, notes: Mapping[str, float]) -> Iterator[SideReport]:
    """One row for each side that has a projector."""
    for side, projector in zip(Sides._fields, sides, strict=True):
        if projector is not None:
            yield SideReport(
                layer=name,
                side=side,
                dimension=projector.dim,
                rank=protected_rank(projector),
                energy=notes.get(f"{side}/energy"),
                condition=notes.get(f"{side}/condition"),
                orthogonality_error=orthogonality_error(projector),
            )
