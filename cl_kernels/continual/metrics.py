"""Accuracy matrices and what is read off them.

`R[i][j]` is the accuracy on task j after task i, in [0, 1]; entries above the diagonal are None (the task is unseen).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "Matrix",
    "accuracy_after",
    "average_accuracy",
    "forgetting",
    "forgetting_after",
    "forgetting_variants",
    "last_row_mean",
    "repository_metrics",
]

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix, sizes: Sequence[int] | None = None) -> float:
    """Mean of the last row; weighted by the tasks' test sizes when `sizes` is given (method-null-space.md T11).

    Raises `ValueError` for an empty or ragged matrix.
    """
    row = _rows(matrix)[-1]
    weights = [1] * len(row) if sizes is None else list(sizes)
    if len(weights) < len(row) or sum(weights[: len(row)]) <= 0:
        raise ValueError(f"sizes: expected a positive size for each of {len(row)} tasks, got {weights}")
    return sum(value * weight for value, weight in zip(row, weights, strict=False)) / sum(weights[: len(row)])


def forgetting(matrix: Matrix, *, last_row: bool = False) -> float:
    """Mean over old tasks j of `max_{i < T-1} R[i][j] - R[T-1][j]`; 0 for one task. May be negative.

    `last_row=True` lets the maximum include the last row, as the official NSP2 code does; it is then never negative.
    """
    rows = _rows(matrix)
    last = rows[-1]
    old = len(rows) - 1
    if old == 0:
        return 0.0
    end = len(rows) if last_row else old
    drops = [max(rows[i][j] for i in range(j, end)) - last[j] for j in range(old)]
    return sum(drops) / old


def forgetting_variants(matrix: Matrix) -> dict[str, float]:
    """Forgetting as three groups of authors define it, over T tasks, by name.

    maximum: `forgetting`, the best before the last task, over T - 1 tasks (Chaudhry et al.). diagonal: from the
    accuracy right after each task, R[j][j] - R[T-1][j], over T - 1. diagonal_over_all: the same sum over T, as the KDP
    code prints it, (T - 1) / T of the former (method-distillation.md 5, T13).
    """
    rows = _rows(matrix)
    old = len(rows) - 1
    lost = sum(rows[j][j] - rows[-1][j] for j in range(old))
    return {
        "maximum": forgetting(matrix),
        "diagonal": lost / old if old else 0.0,
        "diagonal_over_all": lost / len(rows),
    }


def repository_metrics(matrix: Matrix, sizes: Sequence[int]) -> dict[str, float]:
    """Both numbers as the official NSP2 code computes them: accuracy weighted by `sizes`, the maximum over all rows."""
    return {"average_accuracy": average_accuracy(matrix, sizes), "forgetting": forgetting(matrix, last_row=True)}


def accuracy_after(matrix: Matrix) -> list[float]:
    """Mean accuracy over the tasks seen so far, after each task."""
    return [sum(row) / len(row) for row in _rows(matrix)]


def forgetting_after(matrix: Matrix) -> list[float]:
    """`forgetting` of the leading part of the matrix, after each task."""
    rows = _rows(matrix)
    return [forgetting(rows[: i + 1]) for i in range(len(rows))]


def last_row_mean(matrix: Matrix) -> float | None:
    """Mean over the old tasks of the last row of a drift matrix; None for one task."""
    old = _rows(matrix)[-1][:-1]
    return sum(old) / len(old) if old else None


def _rows(matrix: Matrix) -> list[list[float]]:
    """The lower triangle as lists of numbers; row i must hold at least i + 1 of them."""
    rows: list[list[float]] = []
    for i, row in enumerate(matrix):
        seen = [value for value in row[: i + 1] if value is not None]
        if len(seen) != i + 1:
            raise ValueError(f"matrix: row {i} must start with {i + 1} numbers, got {list(row)}")
        rows.append(seen)
    if not rows:
        raise ValueError("matrix: expected at least one row, got none")
    return rows
