"""Teacher against student: what the page shows of runs that distilled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .summary import Group, Result, Section, Spread, accuracy_curve

__all__ = ["teachers"]

LOADER = 'cl_kernels.continual.load_model("student.safetensors")'


def teachers(found: Section, key: str, *, draw: bool) -> list[dict[str, Any]]:
    """One entry for each method that had a teacher: accuracy on every task after the last, size and latency."""
    return [
        _entry(group, f"{key}-t{index}", draw=draw)
        for index, group in enumerate(found.groups)
        if all(r.get("teacher") for r in group.results)
    ]


def _entry(group: Group, key: str, *, draw: bool) -> dict[str, Any]:
    last = group.tasks - 1
    rows = []
    for task in range(group.tasks):
        taught = [r["teacher"]["accuracy_matrix"][last][task] for r in group.results]
        learned = [r["accuracy_matrix"][last][task] for r in group.results]
        rows.append(_row(str(task + 1), taught, learned))
    rows.append(
        _row(
            "mean",
            [r["teacher"]["average_accuracy"] for r in group.results],
            [r["average_accuracy"] for r in group.results],
        )
    )
    return {
        "label": group.label,
        "svg": _curves(group, key) if draw and group.tasks > 1 else "",
        "rows": rows,
        "costs": _costs(group.results),
        "loader": LOADER,
    }


def _row(name: str, taught: list[float | None], learned: list[float | None]) -> dict[str, str]:
    gaps = [None if a is None or b is None else b - a for a, b in zip(taught, learned, strict=True)]
    return {"task": name, "teacher": _text(taught), "student": _text(learned), "gap": _text(gaps)}


def _costs(results: list[Result]) -> list[dict[str, str]]:
    """Parameters and bytes as they are, latencies as means over seeds."""
    first = results[0]
    rows = [
        {
            "name": name,
            "teacher": f"{first['teacher'][field] / scale:{form}}",
            "student": f"{first['student'][field] / scale:{form}}",
        }
        for name, field, scale, form in (
            ("Parameters (million)", "parameters", 1e6, ".2f"),
            ("Size (MB)", "bytes", 1e6, ".2f"),
        )
    ]
    latencies = [r["seconds"].get("latency") for r in results]
    if all(isinstance(latency, Mapping) and latency for latency in latencies):
        for name, field in (("Latency, one image (ms)", "one"), ("Latency, one batch (ms)", "batch")):
            texts = {
                who: _text([x[who][field] for x in latencies], scale=1e3, digits=2) for who in ("teacher", "student")
            }
            rows.append({"name": name, **texts})
    return rows


def _curves(group: Group, key: str) -> str:
    def spreads(pick: Any) -> list[Spread | None]:
        curves = [accuracy_curve(pick(r)) for r in group.results]
        return [Spread.of(c[i] for c in curves) for i in range(group.tasks)]

    series = {
        "teacher": spreads(lambda r: r["teacher"]["accuracy_matrix"]),
        "student": spreads(lambda r: r["accuracy_matrix"]),
    }
    told = "; ".join(f"{name} {points[-1].text()} %" for name, points in series.items() if points[-1] is not None)
    return charts.curves(
        series, ylabel="average accuracy (%)", key=key,
        alt=f"Line chart of the average accuracy of teacher and student after each task. After the last task: {told}.",
    )  # fmt: skip


def _text(values: list[float | None], *, scale: float = 100.0, digits: int = 1) -> str:
    spread = Spread.of(values)
    return "–" if spread is None else spread.text(scale=scale, digits=digits)
