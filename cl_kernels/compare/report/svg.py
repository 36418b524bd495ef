"""Line charts and scatter plots as inline SVG: no script needed to read them, one focusable mark a value.

The drawing is 420 units wide, about a phone's page, and grows with the page; the style sheet sets the size of the
letters by the page's width, so that they stay legible at both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .blocks import Key

__all__ = ["INK", "Axis", "Mark", "Series", "Span", "dots", "draw", "linear_ticks", "swatch", "tick_labels"]

WIDTH, HEIGHT = 420.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 408.0, 26.0, 246.0
_LETTER = 8.2  # units a letter of a tick's label takes on the narrowest page
_MANY = 24  # marks of a line; with more, every so many carry a value

# Outlines about the origin, of nearly equal area.
SHAPES = {
    "circle": '<circle r="4.2"/>',
    "square": '<path d="M-3.8-3.8H3.8V3.8H-3.8Z"/>',
    "triangle": '<path d="M0-5 4.8 3.6H-4.8Z"/>',
    "diamond": '<path d="M0-5.4 5.4 0 0 5.4-5.4 0Z"/>',
    "wedge": '<path d="M0 5 4.8-3.6H-4.8Z"/>',
    "plus": '<path d="M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z"/>',
    "cross": '<path transform="rotate(45)" d="M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z"/>',
    "hexagon": '<path d="M-4.8 0-2.4-4.2H2.4L4.8 0 2.4 4.2H-2.4Z"/>',
}
_NAMES = tuple(SHAPES)
INK = -1  # the slot of what is no arm
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks as (value, label)."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, from 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Mark:
    """A value, its interval if it has one, and the words shown for it. `hollow`: predicted, not measured."""

    x: float
    y: float
    told: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Marks in the colour and shape of number `slot`, or in the colour of the text for INK.

    `strong` draws it thicker, `line` joins the marks, `band` shades the intervals (they are bars otherwise)."""

    label: str
    slot: int
    marks: Sequence[Mark]
    strong: bool = False
    line: bool = True
    band: bool = True
    dash: int = 0


@dataclass(frozen=True)
class Span:
    """A line across the chart at a value of x (`vertical`) or y, with the range around it shaded."""

    at: float | None
    vertical: bool
    low: float | None = None
    high: float | None = None
    label: str = ""
    lower: str = ""


def draw(series: Sequence[Series], *, x: Axis, y: Axis, key: str, title: str, spans: Sequence[Span] = ()) -> str:
    """The chart as `<svg>`: a group named by `title`, whose marks are images with their words as names and can be
    focused. `key` makes ids unique on the page."""
    parts = [
        _opening(key, title, HEIGHT),
        f'<defs><clipPath id="{key}-clip"><rect x="{LEFT:g}" y="{TOP - 6:g}" width="{RIGHT - LEFT:g}" '
        f'height="{BOTTOM - TOP + 12:g}"/></clipPath></defs>',
        _axes(x, y),
        f'<g clip-path="url(#{key}-clip)" aria-hidden="true">',
        *(_span(span, x, y) for span in spans),
        *(_band(one, x, y) for one in series if one.band and one.line),
        *(_line(one, x, y) for one in series if one.line),
        "</g>",
        *(_mark(one, mark, x, y) for one in series for mark in _carried(one)),
        *(_labels(span, x, y) for span in spans),
        "</svg>",
    ]
    return "".join(parts)


def dots(rows: Sequence[tuple[str, Mark, bool]], *, x: Axis, key: str, title: str, at: float | None = None) -> str:
    """Values on one scale below each other: rows of (name, mark, strong); `at` is a line across all."""
    step, names = 26.0, 172.0
    bottom = TOP + step * len(rows)

    def place(value: float) -> float:
        return names + x.place(value) * (RIGHT - 8 - names)

    parts = [_opening(key, title, bottom + 44), '<g class="axes" aria-hidden="true">']
    for value, label in _fitting(x, place):
        parts.append(f'<path class="grid" d="M{value:.1f} {TOP:g}V{bottom:g}"/>')
        parts.append(f'<text x="{value:.1f}" y="{bottom + 17:g}" text-anchor="middle">{escape(label)}</text>')
    if at is not None and x.low <= at <= x.high:
        parts.append(f'<path class="mark" stroke-dasharray="4 3" d="M{place(at):.1f} {TOP:g}V{bottom:g}"/>')
    parts.append(f'<text x="{RIGHT:g}" y="{bottom + 38:g}" text-anchor="end">{escape(x.title)}</text></g>')
    for index, (name, mark, strong) in enumerate(rows):
        across, down = place(mark.x), TOP + step * (index + 0.5)
        short, style = (name if len(name) <= 25 else name[:24] + "…"), ' class="yours"' if strong else ""
        parts.append(f'<g aria-hidden="true"{style}><text x="2" y="{down:.1f}" dy=".34em">{escape(short)}</text></g>')
        parts.append(_point(mark, "ink" if strong else "c5", across, down, SHAPES["diamond" if strong else "circle"]))
    return "".join([*parts, "</svg>"])


def swatch(one: Series) -> Key:
    """The legend's entry of a series."""
    line = f'<path class="line" stroke-dasharray="{_DASHES[one.dash]}" d="M1 8H35"/>' if one.line else ""
    hollow = ' class="hollow"' if one.marks and all(mark.hollow for mark in one.marks) else ""
    inside = f'<g{hollow} transform="translate(18 8)">{_shape(one.slot)}</g>'
    shape = "" if len(one.marks) > _MANY and one.line else inside
    style = _colour(one) + (" strong" if one.strong else "")
    return Key(f'<svg class="key {style}" viewBox="0 0 36 16" aria-hidden="true">{line}{shape}</svg>', one.label)


def linear_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers from below `low` to above `high`, at most `most` + 1 of them."""
    width = (high - low) or abs(high) or 1.0
    raw = width / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last == first:
        last += 1
    return [round(index * step, 12) for index in range(first, last + 1)]


def _opening(key: str, title: str, height: float) -> str:
    return (
        f'<svg class="chart" id="{key}" viewBox="0 0 {WIDTH:g} {height:g}" role="group" '
        f'aria-labelledby="{key}-title"><title id="{key}-title">{escape(title)}</title>'
    )


def tick_labels(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """The ticks with labels of equal decimals, as few as tell them apart."""
    places = next((d for d in range(6) if all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 6)
    return [(t, f"{t:.{places}f}".replace("-", "−")) for t in ticks]


def _xy(x: Axis, y: Axis, at: float, value: float) -> tuple[float, float]:
    return LEFT + x.place(at) * (RIGHT - LEFT), BOTTOM - y.place(value) * (BOTTOM - TOP)


def _axes(x: Axis, y: Axis) -> str:
    parts = ['<g class="axes" aria-hidden="true">']
    for value, label in y.ticks:
        _, at = _xy(x, y, x.low, value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{RIGHT:g}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{at:.1f}" dy=".34em" text-anchor="end">{escape(label)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>')
    for at, label in _fitting(x, lambda value: LEFT + x.place(value) * (RIGHT - LEFT)):
        half = _LETTER * len(label) / 2
        place, anchor = (at + 6, "end") if at > RIGHT - half + 10 else (at, "middle")
        if at < LEFT + half:  # the lowest label of y stands at the left
            place, anchor = at - 2, "start"
        parts.append(f'<path class="axis" d="M{at:.1f} {BOTTOM:g}v4"/>')
        parts.append(f'<text x="{place:.1f}" y="{BOTTOM + 17:g}" text-anchor="{anchor}">{escape(label)}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 6:g}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(f'<text x="2" y="12">{escape(y.title)}</text></g>')
    return "".join(parts)


def _fitting(x: Axis, place: Callable[[float], float]) -> list[tuple[float, str]]:
    """The labels of x that do not run into each other; the last is kept before the first, that before others."""
    placed = [(place(value), label) for value, label in x.ticks]
    order = [*placed[-1:], *placed[:1], *placed[1:-1]] if len(placed) > 1 else placed
    kept: list[tuple[float, str]] = []
    for at, label in order:
        if all(abs(at - other) > _LETTER * (len(label) + len(text)) / 2 + 6 for other, text in kept):
            kept.append((at, label))
    return sorted(kept)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _line(one: Series, x: Axis, y: Axis) -> str:
    if len(one.marks) < 2:
        return ""
    dash = f' stroke-dasharray="{_DASHES[one.dash]}"' if one.dash else ""
    strong = " strong" if one.strong else ""
    places = _path([_xy(x, y, mark.x, mark.y) for mark in one.marks])
    return f'<path class="line {_colour(one)}{strong}"{dash} d="{places}"/>'


def _band(one: Series, x: Axis, y: Axis) -> str:
    held = [(m.x, m.low, m.high) for m in one.marks if m.low is not None and m.high is not None]
    if len(held) < 2:
        return ""
    upper = [_xy(x, y, at, high) for at, _, high in held]
    lower = [_xy(x, y, at, low) for at, low, _ in reversed(held)]
    strong = " strong" if one.strong else ""
    return f'<path class="band {_colour(one)}{strong}" d="{_path([*upper, *lower])}Z"/>'


def _span(span: Span, x: Axis, y: Axis) -> str:
    parts = []
    if span.vertical and span.low is not None and span.high is not None:
        start, _ = _xy(x, y, min(max(span.low, x.low), x.high), y.low)
        end, _ = _xy(x, y, max(min(span.high, x.high), x.low), y.low)
        across, down = max(end - start, 1), BOTTOM - TOP
        parts.append(f'<rect class="zone" x="{start:.1f}" y="{TOP:g}" width="{across:.1f}" height="{down:g}"/>')
    if span.at is not None and span.vertical and x.low <= span.at <= x.high:
        at, _ = _xy(x, y, span.at, y.low)
        parts.append(f'<path class="mark" stroke-dasharray="4 3" d="M{at:.1f} {TOP:g}V{BOTTOM:g}"/>')
    if span.at is not None and not span.vertical:
        _, at = _xy(x, y, x.low, span.at)
        parts.append(f'<path class="mark" d="M{LEFT:g} {at:.1f}H{RIGHT:g}"/>')
    return "".join(parts)


def _labels(span: Span, x: Axis, y: Axis) -> str:
    """The words above and below a horizontal line: what each side means."""
    if span.vertical or span.at is None:
        return ""
    _, at = _xy(x, y, x.low, span.at)
    parts = ['<g class="side" aria-hidden="true">']
    if span.label and at - TOP > 18:
        parts.append(f'<text x="{RIGHT - 4:g}" y="{TOP + 10:g}" text-anchor="end">{escape(span.label)}</text>')
    if span.lower and BOTTOM - at > 18:
        parts.append(f'<text x="{RIGHT - 4:g}" y="{BOTTOM - 6:g}" text-anchor="end">{escape(span.lower)}</text>')
    return "".join([*parts, "</g>"])


def _carried(one: Series) -> Sequence[Mark]:
    """The marks that carry a value: all, or every so many of a long line, its last among them."""
    every = math.ceil(len(one.marks) / _MANY)
    return one.marks if every == 1 else list(reversed(one.marks[::-1][::every]))


def _mark(one: Series, mark: Mark, x: Axis, y: Axis) -> str:
    at, value = _xy(x, y, mark.x, mark.y)
    bars, hollow = "", " hollow" if mark.hollow else ""
    if mark.low is not None and mark.high is not None and not (one.band and one.line and not mark.hollow):
        top, bottom = _xy(x, y, mark.x, mark.high)[1], _xy(x, y, mark.x, mark.low)[1]
        ends = "".join(f"M-3 {end - value:.1f}h6" for end in (top, bottom))
        bars = f'<path class="bar" d="M0 {top - value:.1f}V{bottom - value:.1f}{ends}"/>'
    shape = _shape(one.slot) if len(one.marks) <= _MANY or not one.line else '<circle r="2"/>'
    return _point(mark, _colour(one) + hollow, at, value, bars + shape)


def _point(mark: Mark, style: str, across: float, down: float, inside: str) -> str:
    """A mark that can be pointed at and focused, named by its words."""
    told = escape(mark.told)
    return (
        f'<g class="pt {style}" tabindex="0" role="img" aria-label="{told}" data-x="{mark.x!r}" data-y="{mark.y!r}" '
        f'transform="translate({across:.1f} {down:.1f})"><title>{told}</title><circle class="hit" r="9"/>{inside}</g>'
    )


def _shape(slot: int) -> str:
    return SHAPES[_NAMES[max(slot, 0) % len(_NAMES)]]


def _colour(one: Series) -> str:
    return "ink" if one.slot == INK else f"c{one.slot % len(_NAMES)}"
