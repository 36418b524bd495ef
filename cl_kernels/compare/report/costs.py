"""What each arm costs, and accuracy against it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import numbers as n
from .answer import share_axis
from .arms import Arms, Results
from .blocks import Block, Chart, Charts, Note, Row, Section, Table, Text
from .svg import Axis, Mark, Series, draw, swatch

__all__ = ["costs", "log_axis"]

# title, field, how it is written; lower is better for all but those in _HIGHER
_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("Trainable parameters", "trainable_parameters", n.count),
    ("Stored per task", "stored_bytes", n.size),
    ("Time per epoch", "seconds_per_epoch", n.seconds),
    ("A training step (ms)", "step_ms", n.number),
    ("One training", "seconds_of_run", n.seconds),
    ("Time to best", "seconds_to_best", n.seconds),
    ("Peak memory", "peak_bytes", n.size),
    ("Latency, one image (ms)", "latency_ms", n.number),
    ("Images per second", "images_per_second", n.number),
    ("Multiply-adds per image", "macs", n.count),
)
_HIGHER = {"images_per_second"}


def costs(results: Results, arms: Arms) -> list[Section]:
    """The table of costs and the charts of accuracy against cost."""
    rows = [_with_run(one, results, arms) for one in results.get("cost") or [] if one.get("arm") is not None]
    if not rows:
        note = Note("Costs were not measured; what is missing at the end of this page says why.")
        return [Section("cost", "What each arm costs", [note])]
    return [
        Section("cost", "What each arm costs", [*_tables(rows, arms)]),
        Section("tradeoff", "Accuracy against cost", _charts(rows, arms)),
    ]


def _with_run(one: Mapping[str, Any], results: Results, arms: Arms) -> Mapping[str, Any]:
    """The entry with the median seconds of a whole training at the largest size."""
    largest = arms.sizes[-1] if arms.sizes else 0
    mine = [run for run in results.get("runs") or [] if run.get("arm") == one["arm"] and run.get("size") == largest]
    values = [value for run in mine if (value := n.value_of(run, "seconds")) is not None]
    return {**one, "seconds_of_run": statistics.median(values) if values else None}


def log_axis(values: Sequence[float], title: str, text: Callable[[float], str]) -> Axis:
    """A logarithmic axis that holds all values, with ticks at powers of ten, and at 2 and 5 where they are few."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low) - 0.05), math.ceil(math.log10(high) + 0.05)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max((tick for tick in ticks if tick <= low / 1.05), default=ticks[0])
    end = min((tick for tick in ticks if tick >= high * 1.05), default=ticks[-1])
    return Axis(title, start, end, [(tick, text(tick)) for tick in ticks if start <= tick <= end], log=True)


def _tables(rows: Sequence[Mapping[str, Any]], arms: Arms) -> list[Block]:
    columns = [c for c in _COLUMNS if any(n.value_of(one, c[1]) is not None for one in rows)]
    best = {name: _best([n.value_of(one, name) for one in rows], higher=name in _HIGHER) for _, name, _ in columns}
    body = [
        Row(
            arms.title(one["arm"]),
            [text(n.value_of(one, name)) for _, name, text in columns],
            frozenset(i for i, (_, name, _) in enumerate(columns) if n.value_of(one, name) == best[name] is not None),
        )
        for one in rows
    ]
    blocks: list[Block] = [
        Text(
            "Measured on this machine, as medians; steps and latency after warm-up. One training is with the most "
            "images, memory the peak while training. “Stored per task” is what must be kept for one task beside the "
            "shared backbone: prompts and a head, or a whole copy of the network."
        ),
        Table(
            "Cost of each arm; the lowest of a column in bold (images per second: the highest)",
            "Arm",
            [c[0] for c in columns],
            body,
        ),
    ]
    if any(one.get("task_bytes") for one in rows):
        tasks = sorted({int(count) for one in rows for count in one.get("task_bytes") or {}})
        stored = [
            Row(arms.title(one["arm"]), [n.size(n.value_of(one, "task_bytes", str(count))) for count in tasks])
            for one in rows
            if one.get("task_bytes")
        ]
        titles = [f"{n.count(count)} task{'' if count == 1 else 's'}" for count in tasks]
        blocks += [
            Text("With several tasks on one backbone, what is stored grows with each:"),
            Table("Stored in all, backbone included, for this many tasks", "Arm", titles, stored),
        ]
    return blocks


def _charts(rows: Sequence[Mapping[str, Any]], arms: Arms) -> list[Block]:
    size = arms.sizes[-1] if arms.sizes else 0
    kinds: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = (
        ("time", "seconds of one training", "seconds_of_run", n.seconds),
        ("bytes", "bytes stored per task", "stored_bytes", n.size),
    )
    charts = [
        chart
        for key, words, name, text in kinds
        if (chart := _chart(rows, arms, size, key=key, words=words, name=name, text=text)) is not None
    ]
    if not charts:
        return [Note("There is no arm with both an accuracy at the full size and a measured cost.")]
    words = f"Test accuracy with {n.count(size)} training images, the most that were trained on. Up and left is better."
    return [Text(words), Charts(charts)]


def _chart(
    rows: Sequence[Mapping[str, Any]],
    arms: Arms,
    size: int,
    *,
    key: str,
    words: str,
    name: str,
    text: Callable[[float | None], str],
) -> Chart | None:
    series, lines = [], []
    for one in rows:
        arm = str(one["arm"])
        cost, found = n.value_of(one, name), arms.accuracy(arm, size)
        if cost is None or cost <= 0 or found is None:
            continue
        mean, low, high = (n.value_of(found, end) for end in ("mean", "low", "high"))
        assert mean is not None  # accuracy() returns only what has a mean
        told = n.spread(n.percent(mean), n.percent(low), n.percent(high))
        ends = [None if v is None else 100 * v for v in (low, high)]
        mark = Mark(cost, 100 * mean, f"{arms.title(arm)}: {told} %, {text(cost)}", ends[0], ends[1])
        series.append(Series(arms.title(arm), arms.slot(arm), [mark], line=False))
        lines.append(Row(arms.title(arm), [text(cost), told]))
    if not series:
        return None
    held = [v for one in series for m in one.marks for v in (m.low, m.y, m.high) if v is not None]
    title = words[0].upper() + words[1:]
    caption = f"Accuracy (%) against {words}, logarithmic"
    told = "; ".join(mark.told for one in series for mark in one.marks)
    return Chart(
        caption,
        draw(
            series, x=log_axis([one.marks[0].x for one in series], title, _tick_text(text)),
            y=share_axis(held, "Accuracy (%)"), key=f"{key}-chart", title=f"Scatter plot. {caption}. {told}.",
        ),
        [swatch(one) for one in series],
        Table(f"Accuracy (%) and {words}", "Arm", [title, "Accuracy (%)"], lines, fold="The numbers behind this chart"),
    )  # fmt: skip


def _tick_text(text: Callable[[float | None], str]) -> Callable[[float], str]:
    """Powers of ten without zeros that say nothing: 10 kB, not 10.0 kB; seconds as a number, never as minutes."""
    if text is n.seconds:
        return lambda value: f"{value:g}"
    return lambda value: re.sub(r"\.0+(?= )", "", text(value))


def _best(values: Sequence[float | None], *, higher: bool) -> float | None:
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return None
    return max(known) if higher else min(known)
