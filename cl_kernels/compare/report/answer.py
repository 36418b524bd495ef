"""The answer and what it rests on: the verdict, accuracy against data size, the gap and its crossing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import numbers as n
from .arms import Arms, verdict_words
from .blocks import Block, Chart, Items, Note, Row, Section, Table, Text, Tile, Tiles
from .svg import INK, Axis, Mark, Series, Span, draw, linear_ticks, swatch, tick_labels

__all__ = ["accuracy", "confidence", "gap", "later", "reasons"]

PLACES = ("1x", "2x", "5x")


def confidence(arms: Arms) -> str:
    """How sure the verdict is: the interval it rests on, and how many re-draws agree, or why they were not enough."""
    decision, now = arms.decision, _at(arms, "1x")
    if decision.get("verdict") == "other":
        return _ahead_of_both(arms)
    low, high = n.value_of(now, "low"), n.value_of(now, "high")
    if low is None or high is None:
        return "How sure: no interval could be computed; see what is missing, at the end."
    held = f"How sure: the {arms.level} interval, {n.interval(n.points(low), n.points(high))} points,"
    tie: Mapping[str, Any] = decision.get("tie") or {}
    if low <= 0 <= high:
        chosen = "; your preference decided" if tie.get("broken") else ""
        return f"{held} includes no difference at all{chosen}."
    agreeing, redraws = (n.count(v) for v in (n.value_of(now, "agreeing"), n.value_of(decision, "rule", "redraws")))
    if decision.get("verdict") in ("prompts", "full"):
        agree = f"; {agreeing} of {redraws} re-draws name the same winner" if n.NONE not in (agreeing, redraws) else ""
        return f"{held} leaves out no difference{agree}."
    why = "the rest of the rule for a verdict is not met"
    if decision.get("underfit"):
        why = "full fine-tuning had not fitted its own training images yet"
    return f"{held} leaves out no difference, but no verdict is given: {why}."


def _ahead_of_both(arms: Arms) -> str:
    against: Mapping[str, Any] = (arms.decision.get("other") or {}).get("against") or {}
    told = []
    for name, words in (("prompts", "prompts"), ("full", "full fine-tuning")):
        low, high = (n.points(n.value_of(against, name, end)) for end in ("low", "high"))
        if n.NONE not in (low, high):
            told.append(f"{n.interval(low, high)} points ahead of {words}")
    if not told:
        return "How sure: no interval could be computed; see what is missing, at the end."
    return f"How sure: {' and '.join(told)} ({arms.level} intervals)."


def reasons(arms: Arms) -> list[Block]:
    """The plain reasons below the verdict."""
    given = [n.sentence(reason) for reason in arms.decision.get("reasons") or []]
    return [Items(given)] if given else []


def accuracy(arms: Arms) -> Section:
    """Accuracy against data size, every arm with its band."""
    title = "Accuracy against data size"
    shown = [name for name in arms.names if arms.measured(name)]
    if not shown:
        return Section(
            "accuracy", title, [Note("No arm finished a run at any size, so there is nothing to draw here.")]
        )
    strong = arms.compared()
    series = [
        Series(arms.title(name), arms.slot(name), _accuracy_marks(arms, name), strong=name in strong) for name in shown
    ]
    held = [
        value for one in series for mark in one.marks for value in (mark.low, mark.y, mark.high) if value is not None
    ]
    caption = f"Test accuracy (%) by number of training images; bands: {arms.level} intervals"
    chart = Chart(
        caption,
        draw(
            series, x=size_axis(arms.sizes), y=share_axis(held, "Accuracy (%)"), key="accuracy-chart",
            title=f"Line chart. {caption}. {_told(arms, shown)}",
        ),
        [swatch(one) for one in series],
        _accuracy_table(arms, shown),
    )  # fmt: skip
    blocks: list[Block] = [
        Text(
            "Every arm was trained on the same images at each size, and tested on the same test images. Where two "
            "bands overlap widely, the two arms cannot be told apart at that size."
        ),
        chart,
    ]
    left_out = [arms.title(name) for name in arms.names if name not in shown]
    if left_out:
        blocks.append(Note(f"Not drawn, because no run finished: {', '.join(left_out)}."))
    return Section("accuracy", title, blocks)


def gap(arms: Arms) -> Section:
    """Prompts minus full fine-tuning by size, with the crossing."""
    title = "Prompts minus full fine-tuning"
    found = sorted(arms.decision.get("gaps") or [], key=lambda one: one["size"])
    crossing = arms.decision.get("crossing") or {}
    if not found:
        return Section("gap", title, [Note("The gap could not be measured: one of the two has no finished run.")])
    measured = [
        Mark(
            float(one["size"]), 100 * one["mean"], f"{n.count(one['size'])} images: {_gap_words(one, 'mean')}",
            _scaled(one, "low"), _scaled(one, "high"),
        )
        for one in found
    ]  # fmt: skip
    expected = [
        Mark(
            float(one["size"]), 100 * one["gap"], f"{n.count(one['size'])} images, fitted: {_gap_words(one, 'gap')}",
            _scaled(one, "low"), _scaled(one, "high"), hollow=True,
        )
        for place in PLACES
        if (one := _at(arms, place)) and one.get("extrapolated") and n.value_of(one, "gap") is not None
    ]  # fmt: skip
    series = [Series(f"measured, {arms.level} interval", INK, measured, strong=True)]
    if expected:
        series.append(Series("expected with more data, by the fit", INK, expected, line=False))
    held = [v for one in series for mark in one.marks for v in (mark.low, mark.y, mark.high) if v is not None]
    ticks = linear_ticks(min(0.0, *held), max(0.0, *held))
    zero = Span(0.0, False, label="prompts ahead ↑", lower="full fine-tuning ahead ↓")
    cross = Span(n.value_of(crossing, "size"), True, n.value_of(crossing, "low"), n.value_of(crossing, "high"))
    drawn = [zero, *([cross] if cross.at is not None else [])]
    caption = "Accuracy of prompts minus full fine-tuning (points) by number of training images"
    chart = Chart(
        caption,
        draw(
            series, x=size_axis([*arms.sizes, *(int(mark.x) for mark in expected)]), key="gap-chart", spans=drawn,
            y=Axis("Gap (points)", ticks[0], ticks[-1], tick_labels(ticks)),
            title=f"Line chart. {caption}. {'; '.join(mark.told for mark in [*measured, *expected])}.",
        ),
        [swatch(one) for one in series],
        _gap_table(arms, found),
        note="Dashed line and shaded range: where the two are expected to cross." if cross.at is not None else "",
    )  # fmt: skip
    return Section("gap", title, [Text(_crossing(crossing)), chart])


def later(arms: Arms) -> Section:
    """The verdict with the data there is, with twice and with five times as much."""
    tiles = []
    for place in PLACES:
        one = _at(arms, place)
        if not one:
            continue
        words = verdict_words(one.get("verdict"), one.get("arm") or arms.decision.get("arm"), arms)
        images = n.count(n.value_of(one, "size"))
        title = f"Now: {images} images" if place == "1x" else f"With {place[:-1]} times as many: {images} images"
        basis = "expected by the fit in the logarithm of the size" if one.get("extrapolated") else "measured"
        tiles.append(Tile(title, words, f"{_gap_words(one, 'gap')}; {basis}", tone=str(one.get("verdict") or "")))
    key, title = "later", "The verdict now and with more data"
    if not tiles:
        return Section(key, title, [Note("There is no verdict at any size: see what is missing, at the end.")])
    return Section(
        key,
        title,
        [
            Text("Gaps are prompts minus full fine-tuning: above zero, prompts are ahead."),
            Tiles(tiles),
        ],
    )


def size_axis(sizes: Sequence[int]) -> Axis:
    """Training images on a logarithmic axis with a tick at each size."""
    held = sorted(set(sizes))
    low, high = float(held[0]), float(held[-1])
    if low == high:
        low, high = low / 2, high * 2
    room = (high / low) ** 0.03
    return Axis(
        "Training images (logarithmic)", low / room, high * room, [(float(s), n.count(s)) for s in held], log=True
    )


def share_axis(values: Sequence[float], title: str) -> Axis:
    """An axis for per cent that holds all values and stays within 0 and 100."""
    ticks = [tick for tick in linear_ticks(min(values), max(values)) if -1e-9 <= tick <= 100 + 1e-9]
    return Axis(title, ticks[0], ticks[-1], tick_labels(ticks))


def _accuracy_marks(arms: Arms, name: str) -> list[Mark]:
    marks = []
    for size in arms.measured(name):
        found = arms.accuracy(name, size)
        assert found is not None  # measured() lists only sizes with an accuracy
        told = n.spread(*(n.percent(n.value_of(found, end)) for end in ("mean", "low", "high")))
        words = f"{arms.title(name)}, {n.count(size)} images: {told} %"
        marks.append(Mark(float(size), 100 * found["mean"], words, _scaled(found, "low"), _scaled(found, "high")))
    return marks


def _accuracy_table(arms: Arms, shown: Sequence[str]) -> Table:
    rows = []
    best = {column: arms.best(size) for column, size in enumerate(arms.sizes)}
    for name in shown:
        found = [arms.accuracy(name, size) or {} for size in arms.sizes]
        cells = [n.spread(*(n.percent(n.value_of(one, end)) for end in ("mean", "low", "high"))) for one in found]
        rows.append(Row(arms.title(name), cells, frozenset(c for c, first in best.items() if first == name)))
    return Table(
        f"Test accuracy (%) with its {arms.level} interval, by number of training images; the highest in bold",
        "Arm", [n.count(size) for size in arms.sizes], rows, fold="The numbers behind this chart",
    )  # fmt: skip


def _gap_table(arms: Arms, found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [Row(n.count(one["size"]), [*_gap_cells(one, "mean"), "measured"]) for one in found]
    rows += [
        Row(n.count(one["size"]), [*_gap_cells(one, "gap"), "by the fit"])
        for place in PLACES
        if (one := _at(arms, place)) and one.get("extrapolated")
    ]
    return Table(
        "Prompts minus full fine-tuning, in points", "Training images", ["Gap", f"{arms.level} interval", "From"], rows,
        fold="The numbers behind this chart",
    )  # fmt: skip


def _gap_cells(one: Mapping[str, Any], name: str) -> list[str]:
    low, high = (n.points(n.value_of(one, end)) for end in ("low", "high"))
    return [n.points(n.value_of(one, name)), n.interval(low, high)]


def _gap_words(one: Mapping[str, Any], name: str) -> str:
    gap, interval = _gap_cells(one, name)
    return "no gap known" if gap == n.NONE else f"{gap} points" + (f" ({interval})" if interval != n.NONE else "")


def _crossing(crossing: Mapping[str, Any]) -> str:
    given = crossing.get("text")
    if isinstance(given, str) and given:
        return n.sentence(given)
    at, low, high = (n.value_of(crossing, end) for end in ("size", "low", "high"))
    if at is None:
        return "The two do not cross in the range that was looked at."
    return f"The two cross at about {n.count(at)} images (90 % interval {n.interval(n.count(low), n.count(high))})."


def _at(arms: Arms, place: str) -> Mapping[str, Any]:
    return (arms.decision.get("at") or {}).get(place) or {}


def _scaled(one: Mapping[str, Any], name: str) -> float | None:
    value = n.value_of(one, name)
    return None if value is None else 100 * value


def _told(arms: Arms, shown: Sequence[str]) -> str:
    """The chart in words: every arm at the largest size it was run at."""
    told = []
    for name in shown:
        size = arms.measured(name)[-1]
        found = arms.accuracy(name, size) or {}
        told.append(f"{arms.title(name)} {n.percent(n.value_of(found, 'mean'))} % with {n.count(size)} images")
    return "; ".join(told) + "."
