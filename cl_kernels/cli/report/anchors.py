"""How far weights went from their anchor, and what held them."""

from __future__ import annotations

from typing import Any

from .summary import Group, Section

__all__ = ["anchored"]


def anchored(found: Section) -> list[dict[str, Any]]:
    """One entry for each method with anchors, of its first run: after each task, by weight."""
    return [_entry(group) for group in found.groups if any(group.results[0].get("anchoring") or [])]


def _entry(group: Group) -> dict[str, Any]:
    first = group.results[0]
    by_task: list[dict[str, dict[str, float]]] = first["anchoring"]
    names = list(dict.fromkeys(name for report in by_task for name in report))
    return {
        "label": group.label,
        "seed": first["seed"],
        "columns": [str(task + 1) for task in range(len(by_task))],
        "rows": [(name, [_text(report.get(name)) for report in by_task]) for name in names],
    }


def _text(values: dict[str, float] | None) -> str:
    """The distance as a share of the anchor's norm; in brackets what is known of the rule."""
    if values is None:
        return ""
    rule = [f"radius {values['radius']:.2g}"] if "radius" in values else []
    rule += [f"{100 * values['projected']:.0f} % of rows"] if "projected" in values else []
    rule += [f"{100 * values['fire_rate']:.0f} % of steps"] if "fire_rate" in values else []
    return f"{100 * values['relative']:.2f} %" + (f" ({', '.join(rule)})" if rule else "")
