"""Charts as inline SVG, drawn by matplotlib: no script, no file beside the page, text in its colour."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .summary import Matrix, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people with any of the common colour blindnesses, without black and yellow,
# which vanish on a dark or a light page. Line styles and markers repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)))

# Drawn in this colour and replaced by currentColor afterwards, so that text and axes follow the light or dark page.
_INK = "#010203"

_WIDEST = 11.0  # inches of cells side by side, about a page's width
_LEGIBLE = 5.0  # points
_NAMES = 17  # of a legend's column, as many as the height of a chart holds


def available() -> bool:
    """Whether matplotlib is installed; nothing is imported."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(
    series: Mapping[str, Sequence[Spread | None]],
    *,
    ylabel: str,
    alt: str,
    key: str,
    percent: bool = True,
    bottom: float | None = None,
    xlabel: str = "after task",
    ticks: Sequence[str] | None = None,
) -> str:
    """Lines over tasks, one for each method, with a band of one standard deviation over seeds.

    `xlabel` and `ticks` (one a point) say what else than tasks the points are.
    """
    figure, axes = _figure(6.8, 3.9)
    for index, (label, spreads) in enumerate(series.items()):
        points = [(i + 1, s) for i, s in enumerate(spreads) if s is not None]
        scale = 100.0 if percent else 1.0
        x = [i for i, _ in points]
        y = [s.mean * scale for _, s in points]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            x, y, color=colour, label=label, marker=MARKERS[index % len(MARKERS)], markersize=5, linewidth=1.8,
            linestyle=DASHES[(index // len(COLOURS) + index % len(COLOURS)) % len(DASHES)],
        )  # fmt: skip
        if any(s.deviation for _, s in points):
            half = [(s.deviation or 0.0) * scale for _, s in points]
            low = [m - d for m, d in zip(y, half, strict=True)]
            high = [m + d for m, d in zip(y, half, strict=True)]
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    longest = max((len(s) for s in series.values()), default=1)
    shown = range(1, longest + 1, math.ceil(longest / 15))
    axes.set_xticks(shown, [str(i) if ticks is None else ticks[i - 1] for i in shown])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.8)
    if len(series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=_INK, handlelength=3.2)
    return _svg(figure, key, alt)


def scatter(
    points: Mapping[str, tuple[Spread, Spread]], *, xlabel: str, ylabel: str, alt: str, key: str, percent: bool = True
) -> str:
    """One point a method at its means, with bars of one standard deviation over seeds; x is logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _figure(6.8, 3.9)
    scale = 100.0 if percent else 1.0
    for index, (label, (x, y)) in enumerate(points.items()):
        axes.errorbar(
            [x.mean], [y.mean * scale], xerr=[x.deviation or 0.0], yerr=[(y.deviation or 0.0) * scale], label=label,
            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], markersize=6, linewidth=1.2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
    columns = math.ceil(len(points) / _NAMES)
    figure.set_figwidth(6.8 + 2.0 * (columns - 1))
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=_INK, handlelength=1.2, ncols=columns
    )
    return _svg(figure, key, alt)


def standalone(svg: str, *, ink: str = "#222222") -> str:
    """An inline chart as a file of its own: with its namespace, on white, and its text in one colour.

    It has a third of the bytes of the inline one: coordinates to a hundredth of a point, fonts and styles said once,
    only the ids that something refers to.
    """
    font = re.search(r"font-family: [^;\"]*", svg)
    names = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    style = f'style="background: #ffffff; color: {ink}; '
    if font is not None:
        svg = re.sub(re.escape(font[0]) + "(; )?", "", svg)
        style += f"{font[0]}; "
    body = svg.replace("<svg ", names, 1).replace('style="', style, 1)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    reference = r'(href="#|url\(#|aria-labelledby=")([^")]+)'
    short = {name: f"i{number}" for number, (_, name) in enumerate(re.findall(reference, body))}
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{short[found[1]]}"' if found[1] in short else "", body)
    body = re.sub(reference, lambda found: found[1] + short[found[2]], body)
    body = re.sub(
        r' d="[^"]*"', lambda found: re.sub(r"\s*([A-Za-z])\s+", r"\1", found[0][4:-1]).join((' d="', '"')), body
    )
    body, groups = re.sub(r">\s+<", "><", body), 1
    while groups:  # without an id these say nothing
        body, groups = re.subn(r"<g>((?:(?!</?g[ >]).)*)</g>", r"\1", body, flags=re.DOTALL)
    often = [style for style, count in Counter(re.findall(r' style="([^"]*)"', body)).items() if count > 2]
    for number, said in enumerate(often):
        body = body.replace(f' style="{said}"', f' class="c{number}"')
    rules = "".join(f".c{number} {{ {said} }}" for number, said in enumerate(often))
    return body.replace("</title>", f"</title><style>{rules}</style>", 1) + "\n"


def heat_map(
    matrix: Matrix, *, alt: str, key: str, rows: Sequence[str], columns: Sequence[str], xlabel: str, ylabel: str,
    labels: Sequence[Sequence[str]] | None = None, low: float = 0.0, high: float = 1.0,
    cell: tuple[float, float] = (0.56, 0.36),
) -> str:  # fmt: skip
    """Cells coloured from `low` to `high`; cells of None stay empty. Numbers are written in while they are legible;
    the tables of the page have them all.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    values = np.array([[np.nan if v is None else v for v in row] for row in matrix], dtype=float)
    height, width = values.shape
    texts = labels or [["" if v is None else f"{100 * v:.0f}" for v in row] for row in matrix]
    across, down = min(cell[0], _WIDEST / width), min(cell[1], _WIDEST / height)  # inches a cell
    longest = max(len(t) for row in texts for t in row)
    size = min(9.0, 72 * across / (0.62 * longest + 0.8), 72 * down * 0.6)
    figure, axes = _figure(0.75 + 0.075 * max(len(r) for r in rows) + across * width, 0.7 + down * height)
    shades, norm = colormaps["viridis"], Normalize(low, high)
    for i in range(height):
        for j in range(width):
            if np.isnan(values[i, j]):
                continue
            red, green, blue, _ = shades(norm(values[i, j]))
            # WCAG's relative luminance, near enough: black on light cells, white on dark ones
            dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
            axes.add_patch(Rectangle((j, i), 1, 1, color=(red, green, blue), linewidth=0))
            if size >= _LEGIBLE:
                ink = "#ffffff" if dark else "#000000"
                axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center", color=ink, fontsize=size)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    every, other = math.ceil(0.28 / across), math.ceil(0.13 / down)
    axes.set_xticks([j + 0.5 for j in range(0, width, every)], list(columns)[::every])
    axes.set_yticks([i + 0.5 for i in range(0, height, other)], list(rows)[::other])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _svg(figure, key, alt)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no window system, safe in any thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    figure.patch.set_alpha(0.0)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Figure, key: str, alt: str) -> str:
    """The figure as an `<svg role="img">` whose ids start with `key`, so that many fit on one page."""
    import html

    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif", "font.size": 10}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = text.replace(_INK, "currentColor")
    # a <style> inside an inline SVG rules the whole page; the two properties it sets are inherited and go on the root
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', Verdana, sans-serif", text)
    title = f'<title id="{key}-title">{html.escape(alt)}</title>'
    root = f'<svg role="img" aria-labelledby="{key}-title" style="stroke-linejoin: round; stroke-linecap: butt" '
    return text.replace("<svg ", root, 1).replace(">", ">" + title, 1).strip()
