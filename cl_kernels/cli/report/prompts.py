"""Which prompts of a pool the images choose."""

from __future__ import annotations

from typing import Any

from . import charts
from .summary import Group, Section

__all__ = ["prompt_usage"]


def prompt_usage(found: Section, key: str, *, draw: bool) -> list[dict[str, Any]]:
    """One entry for each method with a prompt pool, of its first run: after each task, by block."""
    groups = [group for group in found.groups if any(group.results[0].get("prompt_usage") or [])]
    return [_entry(group, f"{key}-p{index}", draw=draw) for index, group in enumerate(groups)]


def _entry(group: Group, key: str, *, draw: bool) -> dict[str, Any]:
    first = group.results[0]
    by_task: list[dict[str, list[float]]] = first["prompt_usage"]
    blocks = list(dict.fromkeys(name for usage in by_task for name in usage))
    return {
        "label": group.label,
        "seed": first["seed"],
        "columns": [str(task + 1) for task in range(len(by_task))],
        "rows": [(name, [_text(usage.get(name)) for usage in by_task]) for name in blocks],
        "svg": _map(group.label, by_task[-1], key) if draw and by_task[-1] else "",
    }


def _text(shares: list[float] | None) -> str:
    """Entries that any image chose, all entries, and how many images chose the most frequent one."""
    if not shares:
        return ""
    return f"{sum(share > 0 for share in shares)}/{len(shares)} ({100 * max(shares):.0f} %)"


def _map(label: str, usage: dict[str, list[float]], key: str) -> str:
    width = max(len(shares) for shares in usage.values())
    told = "; ".join(f"{name} {_text(shares)}" for name, shares in usage.items())
    return charts.heat_map(
        [[*shares, *[None] * (width - len(shares))] for shares in usage.values()],
        key=key, rows=list(usage), columns=[str(entry + 1) for entry in range(width)], xlabel="entry", ylabel="",
        alt=f"Heat map of the share of images that choose each prompt, for {label}. Chosen, all, most: {told}.",
    )  # fmt: skip
