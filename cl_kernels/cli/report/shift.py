"""In and out of distribution side by side: accuracy on clean and on corrupted test images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import charts
from .summary import Group, Section, Spread

__all__ = ["corrupted"]


def corrupted(found: Section, key: str, *, draw: bool) -> dict[str, Any] | None:
    """What the page shows of runs with `eval_shift`; None where no method has them. A method with some runs that have
    it is shown by those."""
    groups = [
        Group(group.label, kept)
        for group in found.groups
        if (kept := [result for result in group.results if result.get("shift")])
    ]
    if not groups:
        return None
    first = groups[0].results[0]["shift"]
    return {
        "count": len(first["families"]) * len(first["severities"]),
        "kinds": list(first["groups"]),
        "severities": range(1, len(first["severities"]) + 1),
        "rows": [_row(group, list(first["groups"])) for group in groups],
        "curve": _curve(groups, key) if draw else "",
        "maps": [_map(group, f"{key}-c{index}") for index, group in enumerate(groups)] if draw else [],
        "tables": [_table(group) for group in groups],
    }


def _row(group: Group, kinds: Sequence[str]) -> dict[str, Any]:
    shifts = [result["shift"] for result in group.results]
    columns = [[shift[name] for shift in shifts] for name in ("clean", "mean", "relative")]
    columns += [[shift["groups"][kind] for shift in shifts] for kind in kinds]
    return {"label": group.label, "seeds": len(shifts), "cells": [_text(values) for values in columns]}


def _table(group: Group) -> dict[str, Any]:
    families = [result["shift"]["families"] for result in group.results]
    rows = [(name, [_text(values) for values in _by_severity(families, name)]) for name in families[0]]
    return {"label": group.label, "rows": rows}


def _curve(groups: Sequence[Group], key: str) -> str:
    series: dict[str, list[Spread | None]] = {}
    for group in groups:
        lines = [[r["shift"]["clean"], *r["shift"]["severities"]] for r in group.results]
        series[group.label] = [Spread.of(values) for values in zip(*lines, strict=True)]
    told = "; ".join(f"{n} {', '.join(s.text() for s in spreads if s)} %" for n, spreads in series.items())
    count = len(next(iter(series.values())))
    return charts.curves(
        series, ylabel="accuracy (%)", xlabel="severity of the corruption", key=f"{key}-sev",
        ticks=["clean", *map(str, range(1, count))],
        alt=f"Line chart of accuracy on clean test images and on corrupted ones of rising severity. {told}.",
    )  # fmt: skip


def _map(group: Group, key: str) -> dict[str, str]:
    families = [result["shift"]["families"] for result in group.results]
    matrix: list[list[float | None]] = []
    for name in families[0]:
        spreads = [Spread.of(values) for values in _by_severity(families, name)]
        matrix.append([None if spread is None else spread.mean for spread in spreads])
    told = "; ".join(
        f"{name} " + ", ".join("none" if v is None else f"{100 * v:.0f}" for v in row)
        for name, row in zip(families[0], matrix, strict=True)
    )
    columns = [str(i + 1) for i in range(len(matrix[0]))]
    svg = charts.heat_map(
        matrix, key=key, rows=list(families[0]), columns=columns, xlabel="severity", ylabel="", cell=(0.62, 0.3),
        alt=f"Heat map of accuracy in per cent for {group.label} by corruption and severity. {told}.",
    )  # fmt: skip
    return {"caption": group.label, "svg": svg}


def _by_severity(families: Sequence[Mapping[str, Sequence[float]]], name: str) -> list[tuple[float, ...]]:
    """One tuple a severity, with the accuracy of every seed."""
    return list(zip(*(family[name] for family in families), strict=True))


def _text(values: Iterable[float | None]) -> str:
    spread = Spread.of(values)
    return "–" if spread is None else spread.text()
