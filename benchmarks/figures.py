"""Charts of the benchmarks, where matplotlib is installed; the numbers are written without it too."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["available", "bars", "curves"]

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind
MARKS: Final = "os^Dv<"


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), dpi=120, layout="constrained")
    return figure, figure.subplots()


def curves(
    path: Path,
    title: str,
    axis: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    floor: Sequence[Any],
) -> None:
    """Milliseconds against size, both logarithmic: a line a variant, the floor dashed."""
    figure, axes = _axes()
    for index, (name, seconds) in enumerate(lines.items()):
        points = [(at, 1e3 * value) for at, value in zip(x, seconds, strict=True) if value is not None]
        style = {"color": COLOURS[index % 6], "marker": MARKS[index % 6], "ls": "-" if index < 6 else ":"}
        axes.plot(*zip(*points, strict=True), ms=4, lw=1.5, label=name, **style)
    points = [(at, 1e3 * value) for at, value in zip(x, floor, strict=True) if value]
    if points:
        axes.plot(*zip(*points, strict=True), color="#555555", ls="--", lw=1, label="floor")
    axes.set(xscale="log", yscale="log", title=title, xlabel=axis, ylabel="ms a call")
    axes.set_xticks(list(x), [f"{at:g}" for at in x])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def bars(path: Path, title: str, stacks: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for each way, its parts stacked, in milliseconds of a training step."""
    figure, axes = _axes()
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    below = [0.0] * len(stacks)
    for index, part in enumerate(parts):
        heights = [1e3 * stack.get(part, 0.0) for stack in stacks.values()]
        axes.bar(list(stacks), heights, bottom=below, color=COLOURS[index % 6], label=part, width=0.6)
        below = [low + high for low, high in zip(below, heights, strict=True)]
    axes.set(title=title, ylabel="ms a training step")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
