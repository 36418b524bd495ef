"""Results of many runs, put together: one stream a section, one method a row, seeds as mean and spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_kernels.errors import CheckpointError

Result = Mapping[str, Any]
Matrix = list[list[float | None]]

#: What every result must carry to be shown (api.md); the rest is shown where it is there.
REQUIRED = ("method", "seed", "accuracy_matrix", "average_accuracy", "forgetting")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `count` seeds; `deviation` is None for a single one."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the finite values, or None if there is none."""
        kept = [float(v) for v in values if v is not None and math.isfinite(v)]
        if not kept:
            return None
        mean = math.fsum(kept) / len(kept)
        if len(kept) == 1:
            return cls(mean, None, 1)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / (len(kept) - 1)), len(kept))

    def text(self, *, scale: float = 100.0, digits: int = 1) -> str:
        """`81.2 ± 0.7`, in per cent unless another scale is given."""
        mean = f"{self.mean * scale:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation * scale:.{digits}f}"


@dataclass(frozen=True)
class Measure:
    """One column of the tables: where its number lies in a result and how it is written."""

    key: str
    title: str
    short: str
    pick: Callable[[Result], float | None]
    scale: float = 100.0
    digits: int = 1
    better: str = "higher"

    def text(self, spread: Spread | None) -> str:
        return "–" if spread is None else spread.text(scale=self.scale, digits=self.digits)


def _within(*path: str) -> Callable[[Result], float | None]:
    """Follow `path` into nested mappings; None where it ends early: without features that move there is no drift."""

    def pick(result: Result) -> float | None:
        value: Any = result
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, int | float) else None

    return pick


MEASURES: tuple[Measure, ...] = (
    Measure("average_accuracy", "Average accuracy (%)", "accuracy", _within("average_accuracy")),
    Measure("shift_accuracy", "Corrupted images: accuracy (%)", "corrupted", _within("shift", "mean")),
    Measure("forgetting", "Forgetting (points)", "forgetting", _within("forgetting"), better="lower"),
    Measure("task_accuracy", "Task known: accuracy (%)", "known acc.", _within("task_incremental", "average_accuracy")),
    Measure(
        "task_forgetting",
        "Task known: forgetting (points)",
        "known forg.",
        _within("task_incremental", "forgetting"),
        better="lower",
    ),
    Measure(
        "feature_drift", "Drift of old features", "drift", _within("feature_drift", "final_relative"), 1.0, 3, "lower"
    ),
    Measure("seconds", "Seconds a run", "seconds", _within("seconds", "total"), 1.0, 1, "lower"),
)


@dataclass(frozen=True)
class Group:
    """All seeds of one method on one stream."""

    label: str
    results: list[Result]

    @property
    def seeds(self) -> list[Any]:
        return [r["seed"] for r in self.results]

    @property
    def tasks(self) -> int:
        return len(self.results[0]["accuracy_matrix"])

    def spread(self, measure: Measure) -> Spread | None:
        return Spread.of(measure.pick(r) for r in self.results)

    def mean_matrix(self) -> Matrix:
        """Mean over seeds of R[i][j], j <= i; None above the diagonal and where no seed has a number."""
        rows: Matrix = []
        for i in range(self.tasks):
            row: list[float | None] = []
            for j in range(self.tasks):
                spread = Spread.of(_cell(r["accuracy_matrix"], i, j) for r in self.results) if j <= i else None
                row.append(None if spread is None else spread.mean)
            rows.append(row)
        return rows

    def curve(self, of: Callable[[Matrix], list[float | None]]) -> list[Spread | None]:
        """A curve over tasks, computed for each seed and then put together."""
        curves = [of(r["accuracy_matrix"]) for r in self.results]
        return [Spread.of(c[i] for c in curves if i < len(c)) for i in range(self.tasks)]


@dataclass
class Section:
    """All methods on one stream of tasks."""

    title: str
    groups: list[Group] = field(default_factory=list)

    def measures(self) -> list[Measure]:
        """The columns for which at least one method has a number."""
        return [m for m in MEASURES if any(g.spread(m) is not None for g in self.groups)]


def accuracy_curve(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean accuracy on the tasks seen so far, after each task."""
    return [_mean(row[: i + 1]) for i, row in enumerate(matrix)]


def forgetting_curve(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    """After each task i, the mean over old tasks j < i of max_{k<i} R[k][j] - R[i][j]; 0 after the first."""
    out: list[float | None] = []
    for i, row in enumerate(matrix):
        drops: list[float | None] = []
        for j in range(i):
            before = [v for k in range(j, i) if (v := _cell(matrix, k, j)) is not None]
            now = row[j] if j < len(row) else None
            drops.append(None if not before or now is None else max(before) - now)
        out.append(_mean(drops) if drops else 0.0)
    return out


def check(result: Result, source: str = "result") -> Result:
    """`result` itself, or CheckpointError naming what is missing."""
    if not isinstance(result, Mapping):
        raise CheckpointError(f"{source}: expected one results object, got {type(result).__name__}")
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise CheckpointError(f"{source}: not the results of a run: {', '.join(missing)} missing")
    matrix = result["accuracy_matrix"]
    if not isinstance(matrix, Sequence) or not matrix or not all(isinstance(row, Sequence) for row in matrix):
        raise CheckpointError(f"{source}: accuracy_matrix must be a non-empty list of lists")
    return result


def sections(results: Iterable[Result]) -> list[Section]:
    """Sort results by stream, then by label (the method's name, unless a result carries one), in order of arrival.

    Streams that differ in data, kind or number of tasks are never averaged together.
    """
    found: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for result in results:
        check(result)
        key = (stream_title(result), len(result["accuracy_matrix"]))
        found.setdefault(key, {}).setdefault(str(result.get("label") or result["method"]), []).append(result)
    return [
        Section(title, [Group(label, rows) for label, rows in methods.items()]) for (title, _), methods in found.items()
    ]


def stream_title(result: Result) -> str:
    """The result's own `title`, or one such as `digits: 5 tasks, class stream, backbone embedded`."""
    if result.get("title"):
        return str(result["title"])
    config = result.get("config") or {}

    def value(name: str) -> Any:
        return result.get(name, config.get(name))

    data = str(value("data") or "data").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    parts = [f"{len(result['accuracy_matrix'])} tasks"]
    if value("stream"):
        parts.append(f"{value('stream')} stream")
    if value("backbone"):
        parts.append(f"backbone {str(value('backbone')).rsplit('/', 1)[-1]}")
    return f"{data}: {', '.join(parts)}"


def _cell(matrix: Sequence[Sequence[float | None]], i: int, j: int) -> float | None:
    row = matrix[i] if i < len(matrix) else ()
    return row[j] if j < len(row) else None


def _mean(values: Iterable[float | None]) -> float | None:
    spread = Spread.of(values)
    return None if spread is None else spread.mean
