"""The figures of docs/results.md, drawn by the report's own charts: at most eight lines, six heat maps, all costs."""

from __future__ import annotations

from collections.abc import Sequence

from results_data import Book

from cl_kernels.cli.report.summary import Section
from cl_kernels.cli.report.versus import figures, slug

LINES = ("class-mean", "linear", "joint, weights", "sequential", "nsp2", "full", "null-space", "lorac")
MAPS = ("linear", "sequential", "nsp2", "full", "null-space", "lorac")
WHAT = {
    "accuracy": "accuracy over the tasks",
    "forgetting": "forgetting over the tasks",
    "cost": "accuracy against time",
}


def drawn(book: Book) -> dict[str, str]:
    """Every SVG by its file name."""
    found: dict[str, str] = {}
    for section in book.reported:
        found |= _few(section, LINES, ("accuracy", "forgetting"))
        found |= figures(section, key(section), kinds=("cost",))
    return found if book.main is None else found | _few(book.main, MAPS, ("tasks",))


def key(section: Section) -> str:
    return f"results-{slug(section.title).lower()}"


def _few(section: Section, labels: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """The charts of the methods with these labels."""
    groups = [group for group in section.groups if group.label in labels]
    return figures(Section(section.title, groups), key(section), kinds=kinds) if groups else {}


def shown(book: Book, section: Section) -> str:
    """The lines of the page that show a stream's figures: names from what is there, not from what was drawn now."""
    kinds = ["accuracy", "forgetting"] if section.groups[0].tasks > 1 else []
    if not any(group.label in LINES for group in section.groups):
        kinds = []
    kinds += ["cost"] if len(section.groups) > 1 else []
    lines = [f"![{_alt(section, kind)}](figures/{key(section)}-{kind}.svg)" for kind in kinds]
    if section is book.main:
        there = [label for label in MAPS if any(group.label == label for group in section.groups)]
        lines += ["", "Accuracy on each task (across) after each task (down):", ""]
        lines += [f"![{_heat(section, label)}](figures/{key(section)}-tasks-{slug(label)}.svg)" for label in there]
    return "\n".join(lines)


def _alt(section: Section, kind: str) -> str:
    return f"{section.title}: {WHAT[kind]}, the numbers at the end are those of the table"


def _heat(section: Section, label: str) -> str:
    return f"{section.title}: heat map of {label}"
