"""The methods of a stream against one of them, and what each costs: tables and figures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import charts
from .paired import Difference, paired
from .summary import MEASURES, Group, Measure, Section, Spread, accuracy_curve, forgetting_curve

__all__ = ["costs", "difference_table", "figures", "markdown", "reading", "result_table", "slug", "verdict", "versus"]

KINDS = ("accuracy", "forgetting", "tasks", "cost")
_COMPARED = ("average_accuracy", "shift_accuracy", "forgetting", "task_accuracy")


def versus(found: Section, against: str | None) -> dict[str, Any] | None:
    """Every method minus the one called `against`, seed by seed; None where the stream has no such method."""
    reference = next((group for group in found.groups if group.label == against), None)
    if reference is None or len(found.groups) < 2:
        return None
    measures = [m for m in found.measures() if m.key in _COMPARED]
    rows = []
    for group in found.groups:
        if group is not reference:
            differences = [(m, paired(group, reference, m)) for m in measures]
            rows.append({"label": group.label, "cells": [reading(m, d) for m, d in differences]})
    return {"against": against, "measures": measures, "rows": rows}


def verdict(measure: Measure, found: Difference | None) -> str:
    """What Student's interval carries: better, worse, not told apart, or why there is none.

    A difference that the table rounds to nothing is none: seeds may agree in one test image, or in a rounding error.
    """
    if found is None:
        return "no common seed"
    if found.student is None:
        return "one seed"
    if not found.told_apart or round(abs(found.mean) * measure.scale, measure.digits) == 0.0:
        return "not told apart"
    return "better" if (found.mean > 0) == (measure.better == "higher") else "worse"


def reading(measure: Measure, found: Difference | None) -> dict[str, Any]:
    """A difference in words: the mean and Student's interval, the bootstrap's, and what may be said of it."""
    told = verdict(measure, found)
    if found is None:
        return {"text": "–", "bootstrap": "–", "seeds": 0, "verdict": told}
    text = f"{found.mean * measure.scale:+.{measure.digits}f}{_interval(found.student, measure)}"
    return {
        "text": text,
        "bootstrap": _interval(found.bootstrap, measure).strip() or "–",
        "seeds": found.seeds,
        "verdict": told,
    }


def _interval(bounds: tuple[float, float] | None, measure: Measure) -> str:
    if bounds is None:
        return ""
    low, high = (f"{bound * measure.scale:+.{measure.digits}f}" for bound in bounds)
    return f" [{low}, {high}]"


def costs(found: Section, key: str) -> dict[str, str] | None:
    """A chart of accuracy against seconds a run; None without two methods that have both."""
    named = {measure.key: measure for measure in MEASURES}
    points: dict[str, tuple[Spread, Spread]] = {}
    for group in found.groups:
        seconds, accuracy = group.spread(named["seconds"]), group.spread(named["average_accuracy"])
        if seconds is not None and accuracy is not None and seconds.mean > 0:
            points[group.label] = (seconds, accuracy)
    if len(points) < 2:
        return None
    told = "; ".join(f"{n} {x.mean:.1f} s, {y.text()} %" for n, (x, y) in points.items())
    svg = charts.scatter(
        points, xlabel="seconds a run (logarithmic)", ylabel="average accuracy (%)", key=f"{key}-cost",
        alt=f"Average accuracy against the seconds of a run. {told}.",
    )  # fmt: skip
    return {"caption": "What accuracy costs", "svg": svg}


def figures(found: Section, key: str, *, kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """The charts of one stream as SVG files, by file name; `kinds` are some of `KINDS`."""
    drawn: dict[str, str] = {}
    for name, of, label in (
        ("accuracy", accuracy_curve, "average accuracy (%)"),
        ("forgetting", forgetting_curve, "forgetting (points)"),
    ):
        if name in kinds and found.groups[0].tasks > 1:
            series = {group.label: group.curve(of) for group in found.groups}
            alt = f"{label} after each task, {found.title}"
            drawn[f"{key}-{name}.svg"] = charts.curves(series, ylabel=label, key=f"{key}-{name}", alt=alt)
    for index, group in enumerate(found.groups if "tasks" in kinds else ()):
        drawn[f"{key}-tasks-{slug(group.label)}.svg"] = _heat(group, f"{key}-m{index}")
    bought = costs(found, key) if "cost" in kinds else None
    if bought is not None:
        drawn[f"{key}-cost.svg"] = bought["svg"]
    return {name: charts.standalone(svg) for name, svg in drawn.items()}


def _heat(group: Group, key: str) -> str:
    names = [str(i + 1) for i in range(group.tasks)]
    return charts.heat_map(
        group.mean_matrix(), rows=names, columns=names, xlabel="task", ylabel="after task", key=key,
        alt=f"Accuracy of {group.label} on each task after each task",
    )  # fmt: skip


def markdown(found: Section, against: str | None) -> str:
    """The stream's results, and its differences to `against`, as Markdown tables."""
    lines = [f"## {found.title}", "", result_table(found, found.measures())]
    told = difference_table(found, against)
    if told:
        lines += [
            "",
            f"Minus {against}, seed by seed: mean [95 % interval by Student's t]; bootstrap interval; reading.",
            "",
            told,
        ]
    return "\n".join(lines)


def result_table(found: Section, measures: Sequence[Measure]) -> str:
    """One line a method: mean and deviation over seeds of each measure."""
    lines = [_row(["method", *(m.title for m in measures), "seeds"]), _rule(len(measures) + 1)]
    for group in found.groups:
        lines.append(_row([group.label, *(m.text(group.spread(m)) for m in measures), str(len(group.results))]))
    return "\n".join(lines)


def difference_table(found: Section, against: str | None) -> str:
    """One line a method: its differences to `against` in words; empty where the stream has no such method."""
    table = versus(found, against)
    if table is None:
        return ""
    lines = [_row(["method", *(m.title for m in table["measures"]), "seeds"]), _rule(len(table["measures"]) + 1)]
    for row in table["rows"]:
        cells = [f"{c['text']}; {c['bootstrap']}; {c['verdict']}" for c in row["cells"]]
        lines.append(_row([row["label"], *cells, str(max(c["seeds"] for c in row["cells"]))]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(numbers: int) -> str:
    return "|---|" + "---:|" * numbers


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text)
