"""Why the arms differ: loss curves, overfitting, drift of the features, where prompts are attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import numbers as n
from .arms import Arms, Results
from .blocks import Block, Chart, Charts, Note, Row, Section, Table, Text
from .svg import Axis, Mark, Series, draw, linear_ticks, swatch, tick_labels

__all__ = ["diagnosis"]


def diagnosis(results: Results, arms: Arms) -> Section:
    """Loss curves at the full size, and one line an arm about what happened to it."""
    title = "What happened during training"
    blocks: list[Block] = []
    runs = [run for run in results.get("runs") or [] if run.get("curve")]
    largest = max((int(run["size"]) for run in runs), default=0)
    at_largest = [run for run in runs if int(run["size"]) == largest]
    kinds = (("train", "Training loss"), ("validation", "Validation loss"), ("test", "Test loss"))
    charts = [chart for kind, words in kinds if (chart := _losses(at_largest, arms, kind, words, largest)) is not None]
    if charts:
        blocks += [
            Text(
                f"Means over the draws with {n.count(largest)} images. A test loss that rises while the training loss "
                "falls is overfitting; it need not cost accuracy. Test losses were worked out after all training."
            ),
            Charts(charts),
        ]
    rows = list(results.get("diagnosis") or [])
    if rows:
        blocks.append(_table(rows, arms))
    mass = _mass(rows, arms)
    if mass is not None:
        blocks += [Text("How much of the image tokens' attention goes to prompts, block by block:"), mass]
    return Section("diagnosis", title, blocks or [Note("No training curves were recorded.")])


def _loss_of(run: Mapping[str, Any], kind: str) -> list[tuple[int, float]]:
    """(epoch, loss) where one was taken."""
    tests = run.get("test_loss_curve") or []
    found = []
    for index, step in enumerate(run["curve"]):
        held = {"loss": tests[index] if index < len(tests) else None} if kind == "test" else step
        value = n.value_of(held, "loss" if kind == "test" else f"{kind}_loss")
        if value is not None:
            found.append((int(step["epoch"]), value))
    return found


def _losses(runs: Sequence[Mapping[str, Any]], arms: Arms, kind: str, words: str, size: int) -> Chart | None:
    series, table = [], []
    for name in arms.names:
        by_epoch: dict[int, list[float]] = {}
        for run in runs:
            for epoch, value in _loss_of(run, kind) if run["arm"] == name else []:
                by_epoch.setdefault(epoch, []).append(value)
        means = {epoch: sum(values) / len(values) for epoch, values in sorted(by_epoch.items())}
        if not means:
            continue
        marks = [
            Mark(float(epoch), value, f"{arms.title(name)}, epoch {epoch}: {n.number(value)}")
            for epoch, value in means.items()
        ]
        series.append(Series(arms.title(name), arms.slot(name), marks, strong=name in arms.compared()))
        lowest = min(means, key=lambda epoch: means[epoch])
        last = max(means)
        table.append(Row(arms.title(name), [n.number(means[lowest]), str(lowest), n.number(means[last]), str(last)]))
    if not series:
        return None
    caption = f"{words} by epoch, {n.count(size)} images"
    held = [mark.y for one in series for mark in one.marks]
    epochs = [mark.x for one in series for mark in one.marks]
    told = "; ".join(f"{one.label} ends at {n.number(one.marks[-1].y)}" for one in series)
    return Chart(
        caption,
        draw(
            series, x=_epochs(epochs), y=_linear(held, words), key=f"{kind}-loss-chart",
            title=f"Line chart. {caption}. {told}.",
        ),
        [swatch(one) for one in series],
        Table(f"{words}: its lowest and its last value", "Arm", ["Lowest", "At epoch", "Last", "At epoch"], table,
              fold="The numbers behind this chart"),
    )  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]], arms: Arms) -> Table:
    body = []
    for row in rows:
        overfit, z = row.get("overfit"), n.value_of(row, "overfit_z")
        flag = n.NONE if overfit is None else ("yes" if overfit else "no")
        cells = [
            flag + (f" ({n.number(z, 2)} standard errors)" if z is not None else ""),
            n.points(n.value_of(row, "generalisation_gap")),
            n.number(n.value_of(row, "drift", "cka")),
            n.number(n.value_of(row, "drift", "cosine")),
        ]
        body.append(Row(arms.title(row["arm"]), cells))
    caption = (
        "Overfit: the last test loss is more than two standard errors above its lowest. Gap: training minus test "
        "accuracy, in points. CKA and cosine compare the features with those of the frozen backbone: 1 is unchanged."
    )
    return Table(caption, "Arm", ["Overfit", "Gap", "Features: CKA", "Features: cosine"], body)


def _mass(rows: Sequence[Mapping[str, Any]], arms: Arms) -> Chart | None:
    series, table = [], []
    for row in rows:
        name = str(row["arm"])
        shares = [n.value_of({"share": share}, "share") for share in row.get("prompt_mass") or []]
        marks = [
            Mark(float(block), 100 * share, f"{arms.title(name)}, block {block}: {n.percent(share)} %")
            for block, share in enumerate(shares)
            if share is not None
        ]
        if not marks:
            continue
        series.append(Series(arms.title(name), arms.slot(name), marks))
        table.append(Row(arms.title(name), [n.percent(share) for share in shares]))
    if not series:
        return None
    longest = max(len(row.cells) for row in table)
    held = [0.0, *(mark.y for one in series for mark in one.marks)]
    caption = "Attention of the image tokens on prompts (%) by block"
    told = "; ".join(f"{one.label}: {', '.join(f'{mark.y:.0f}' for mark in one.marks)}" for one in series)
    return Chart(
        caption,
        draw(series, x=_whole(range(longest), "Block"), y=_linear(held, "Attention on prompts (%)"),
             key="mass-chart", title=f"Line chart. {caption}. {told}."),
        [swatch(one) for one in series],
        Table(caption, "Arm", [str(block) for block in range(longest)], table, fold="The numbers behind this chart"),
    )  # fmt: skip


def _linear(values: Sequence[float], title: str) -> Axis:
    ticks = linear_ticks(min(values), max(values), most=5)
    return Axis(title, ticks[0], ticks[-1], tick_labels(ticks))


def _epochs(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    ticks = [t for t in linear_ticks(low, high, most=8) if low <= t <= high and t == round(t)]
    return Axis("Epoch", low, high, [(t, f"{t:g}") for t in ticks])


def _whole(values: range, title: str) -> Axis:
    """An axis of whole numbers, one tick each."""
    low, high = float(values[0]), float(values[-1])
    return Axis(title, low - 0.3, high + 0.3, [(float(v), str(v)) for v in values])
