"""From grouped results to what the page's template shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .anchors import anchored
from .distillation import teachers
from .prompts import prompt_usage
from .shift import corrupted
from .summary import Group, Measure, Result, Section, accuracy_curve, forgetting_curve
from .versus import costs, versus


def title(found: Sequence[Section]) -> str:
    labels = list(dict.fromkeys(g.label for s in found for g in s.groups))
    who = labels[0] if len(labels) == 1 else f"{len(labels)} methods"
    return f"{who} on {found[0].title if len(found) == 1 else f'{len(found)} streams'}"


def section(found: Section, key: str, *, draw: bool, against: str | None = None) -> dict[str, Any]:
    """Everything the template shows of one stream; `key` makes its ids unique on the page,
    `against` is the label of the method that the others are compared with."""
    measures = found.measures()
    return {
        "key": key,
        "title": found.title,
        "measures": measures,
        "rows": _rows(found, measures),
        "versus": versus(found, against),
        "cost": costs(found, key) if draw and against is not None else None,
        "curves": _curves(found, key) if draw and found.groups[0].tasks > 1 else [],
        "maps": [_map(g, f"{key}-m{i}") for i, g in enumerate(found.groups)] if draw else [],
        "matrices": [_matrix(g) for g in found.groups],
        "teachers": teachers(found, key, draw=draw),
        "corrupted": corrupted(found, key, draw=draw),
        "prompts": prompt_usage(found, key, draw=draw),
        "anchored": anchored(found),
        "subspaces": _subspaces(found, key, draw=draw),
        "subspace_seed": next((f"seed {g.results[0]['seed']}" for g in found.groups if subspace_use(g.results[0])), ""),
        "runs": [
            {"label": g.label, "seed": r["seed"], "cells": [_one(m, r) for m in measures]}
            for g in found.groups
            for r in g.results
        ],
    }


def settings(found: Sequence[Section]) -> list[dict[str, Any]]:
    """One entry a method for its settings, then one for each distinct machine."""
    entries: list[dict[str, Any]] = []
    machines: list[list[tuple[str, str]]] = []
    for part in found:
        for group in part.groups:
            pairs = _pairs({k: v for k, v in (group.results[0].get("config") or {}).items() if k != "seed"})
            if pairs:
                where = f" ({part.title})" if len(found) > 1 else ""
                entries.append({"label": f"Settings of {group.label}{where}", "pairs": pairs})
            for result in group.results:
                machine = _pairs(result.get("environment") or {})
                if machine and machine not in machines:
                    machines.append(machine)
    return entries + [{"label": "Machine and versions", "pairs": m} for m in machines]


Use = tuple[int, int, float | None]


def subspace_use(result: Result) -> dict[str, list[Use | None]]:
    """Layer (and side, where both are projected) -> after each task (protected directions, all, share of the energy).

    None where nothing was stored yet; empty for matched-lr, which reports the projectors whose step length it copies
    and protects nothing. Read from `result["subspace"]`, one mapping a task:
    parameter -> {"left"|"right": {"dim", "protected", "energy"}}.
    """
    if result["method"] == "matched-lr":
        return {}
    per_task: list[dict[str, Use]] = []
    for layers in result.get("subspace") or []:
        both = any(len(sides) > 1 for sides in layers.values())
        uses: dict[str, Use] = {}
        for name, sides in layers.items():
            for side, entry in sides.items():
                energy = entry.get("energy")
                uses[f"{name}, {side}" if both else name] = (int(entry["protected"]), int(entry["dim"]), energy)
        per_task.append(uses)
    while per_task and not per_task[-1]:  # nothing is stored after the last task: no other follows
        per_task.pop()
    names = dict.fromkeys(name for uses in per_task for name in uses)
    return {name: [uses.get(name) for uses in per_task] for name in names}


def _rows(found: Section, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    spreads = [[g.spread(m) for m in measures] for g in found.groups]
    best: list[str | None] = []
    for column, measure in enumerate(measures):
        values = [(row[column].mean, measure.text(row[column])) for row in spreads if row[column] is not None]  # type: ignore[union-attr]  # None is filtered in the same expression
        pick = max if measure.better == "higher" else min
        best.append(pick(values)[1] if len(found.groups) > 1 and values and measure.key != "seconds" else None)
    rows = []
    for group, row in zip(found.groups, spreads, strict=True):
        texts = [m.text(s) for m, s in zip(measures, row, strict=True)]
        cells = [{"text": t, "best": t == b} for t, b in zip(texts, best, strict=True)]
        rows.append({"label": group.label, "cells": cells, "seeds": len(group.results)})
    return rows


def _one(measure: Measure, result: Result) -> str:
    value = measure.pick(result)
    return "–" if value is None else f"{value * measure.scale:.{measure.digits}f}"


def _curves(found: Section, key: str) -> list[dict[str, str]]:
    accuracy = {g.label: g.curve(accuracy_curve) for g in found.groups}
    forgetting = {g.label: g.curve(forgetting_curve) for g in found.groups}
    last = "; ".join(f"{n} {s[-1].text()} %" for n, s in accuracy.items() if s[-1] is not None)
    lost = "; ".join(f"{n} {s[-1].text()}" for n, s in forgetting.items() if s[-1] is not None)
    return [
        {
            "caption": "Accuracy over the tasks seen so far (%)",
            "svg": charts.curves(
                accuracy, ylabel="average accuracy (%)", key=f"{key}-acc",
                alt=f"Line chart of average accuracy after each task. After the last task: {last}.",
            ),
        },
        {
            "caption": "Forgetting so far (points)",
            "svg": charts.curves(
                forgetting, ylabel="forgetting (points)", key=f"{key}-fgt",
                alt=f"Line chart of forgetting after each task. After the last task, in points: {lost}.",
            ),
        },
    ]  # fmt: skip


def _map(group: Group, key: str) -> dict[str, str]:
    matrix = group.mean_matrix()
    names = [str(i + 1) for i in range(group.tasks)]
    rows = "; ".join(
        f"after task {i + 1}: " + ", ".join("none" if v is None else f"{100 * v:.0f}" for v in row[: i + 1])
        for i, row in enumerate(matrix)
    )
    svg = charts.heat_map(
        matrix, key=key, rows=names, columns=names, xlabel="accuracy on task", ylabel="after task",
        alt=f"Heat map of accuracy in per cent for {group.label}. {rows}.",
    )  # fmt: skip
    return {"caption": group.label, "svg": svg}


def _matrix(group: Group) -> dict[str, Any]:
    rows = [["" if v is None else f"{100 * v:.1f}" for v in row] for row in group.mean_matrix()]
    return {"label": group.label, "columns": range(1, group.tasks + 1), "rows": rows}


def _subspaces(found: Section, key: str, *, draw: bool) -> list[dict[str, Any]]:
    items = []
    for index, group in enumerate(found.groups):
        use = subspace_use(group.results[0])
        if not use:
            continue
        tasks = [str(i + 1) for i in range(max(len(row) for row in use.values()))]
        cells = {name: ["" if c is None else f"{c[0]}/{c[1]}" for c in row] for name, row in use.items()}
        full = {name: [_use_text(c) for c in row] for name, row in use.items()}
        svg = ""
        if draw:
            shares = [[None if c is None else c[0] / c[1] if c[1] else 0.0 for c in row] for row in use.values()]
            told = "; ".join(f"{n} {row[-1]}" for n, row in cells.items())
            svg = charts.heat_map(
                shares, key=f"{key}-u{index}", rows=list(use), columns=tasks, xlabel="after task", ylabel="",
                labels=list(cells.values()), cell=(0.82, 0.3),
                alt=f"Heat map of the protected share of each layer for {group.label}. After the last task: {told}.",
            )  # fmt: skip
        items.append({"label": group.label, "svg": svg, "columns": tasks, "rows": list(full.items())})
    return items


def _use_text(use: Use | None) -> str:
    if use is None:
        return ""
    protected, dim, energy = use
    return f"{protected}/{dim}" if energy is None else f"{protected}/{dim} ({100 * energy:.1f} %)"


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            out += [(f"{name}.{inner}", text) for inner, text in _pairs(value)]
        elif value is not None:
            out.append((str(name), str(value)))
    return out
