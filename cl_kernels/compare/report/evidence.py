"""The evidence beside the sweep: the data card, probes without training, the distance to pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import numbers as n
from .answer import share_axis
from .arms import Results
from .blocks import Block, Chart, Heading, Items, Note, Row, Section, Table, Text
from .distance import distance
from .svg import INK, Axis, Mark, Series, draw, swatch

__all__ = ["evidence"]

_CERTAIN = 1.96  # standard errors of a 95 % interval


def evidence(results: Results) -> Section:
    """Data card, probes and distance."""
    blocks: list[Block] = [
        Heading("The data"), *_card(results.get("data") or {}),
        Heading("What the frozen backbone knows already"), *_probes(results.get("probes") or {}),
        Heading("Distance to the pre-training images"), *distance(results.get("distance") or {}),
    ]  # fmt: skip
    return Section("evidence", "Evidence about the data", blocks)


def _card(card: Mapping[str, Any]) -> list[Block]:
    if not card:
        return [Note("There is no data card.")]
    train, test = card.get("train") or {}, card.get("test") or {}
    pairs = [
        ("Training images", n.count(n.value_of(train, "n"))),
        ("Test images", n.count(n.value_of(test, "n"))),
        ("Where the test images come from", str(card.get("test_from") or n.NONE)),
        ("Classes", n.count(n.value_of(card, "classes"))),
        ("Largest class by smallest", n.number(n.value_of(card, "imbalance"))),
        ("Image sizes as stored", _sizes(train.get("sizes") or {})),
        ("Test images that are also training images", n.count(n.value_of(card, "duplicates", "across"))),
        ("Copies inside the training images", n.count(n.value_of(card, "duplicates", "inside_train"))),
        ("Broken images left out", n.count(n.value_of(card, "skipped"))),
        ("Kind of classes, by their names", _kind(card.get("label_type"))),
    ]
    blocks: list[Block] = []
    warnings = [n.sentence(one) for one in card.get("warnings") or []]
    if warnings:
        blocks.append(Note("To mind: " + " ".join(warnings)))
    rows = [Row(name, [value]) for name, value in pairs if value != n.NONE]
    blocks.append(Table("The data card", "What", ["Value"], rows, words=True))
    names = [str(name) for name in card.get("class_names") or []]
    counts = train.get("counts") or []
    if names and len(counts) == len(names):
        held = test.get("counts") or [None] * len(names)
        each = [Row(name, [n.count(a), n.count(b)]) for name, a, b in zip(names, counts, held, strict=False)]
        blocks.append(
            Table("Images by class", "Class", ["Training", "Test"], each, fold=f"Images of the {len(names)} classes")
        )
    return blocks


def _sizes(sizes: Mapping[str, Any]) -> str:
    def told(size: Any) -> str:
        return " × ".join(str(side) for side in size)

    if not sizes.get("commonest"):
        return n.NONE
    if sizes.get("distinct") == 1:
        return told(sizes["commonest"])
    return f"{told(sizes['smallest'])} to {told(sizes['largest'])}, most often {told(sizes['commonest'])}"


def _kind(label_type: Any) -> str:
    if not isinstance(label_type, Mapping):
        return str(label_type or n.NONE)
    return f"{label_type.get('guess')}: {label_type.get('reason')}"


def _probes(probes: Mapping[str, Any]) -> list[Block]:
    if not probes:
        return [Note("No probes were run.")]
    found: list[tuple[str, Mapping[str, Any] | None]] = [("Linear probe", probes.get("linear"))]
    found += [(f"{k} nearest neighbours", entry) for k, entry in (probes.get("knn") or {}).items()]
    found += [("Nearest class mean", probes.get("class_mean"))]
    rows = [Row(name, _accuracy(entry)) for name, entry in found if n.value_of(entry, "accuracy") is not None]
    rows.append(Row("Always the commonest class", [n.percent(n.value_of(probes, "majority")), n.NONE]))
    logme = n.value_of(probes, "logme", "value")
    blocks: list[Block] = [
        Text(
            f"Probes on the frozen features of {n.count(n.value_of(probes, 'n'))} training images, each predicted from "
            f"the others ({n.count(n.value_of(probes, 'folds'))} folds); the test images had no part."
            + (f" LogME, which needs no training: {n.number(logme)} (higher fits better)." if logme is not None else "")
        ),
        Table("Accuracy (%) without training the backbone", "Probe", ["Accuracy", "95 % interval"], rows),
    ]
    curve = [one for one in probes.get("layers") or [] if n.value_of(one, "accuracy") is not None]
    if len(curve) > 1:
        blocks.append(_layers(curve))
    if probes.get("missing"):
        blocks.append(Items([n.sentence(one) for one in probes["missing"]]))
    return blocks


def _accuracy(entry: Mapping[str, Any] | None) -> list[str]:
    mean, low, high = _interval(entry or {})
    return [n.percent(mean), n.interval(n.percent(low), n.percent(high))]


def _interval(entry: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    mean, error = n.value_of(entry, "accuracy"), n.value_of(entry, "se")
    if mean is None or error is None:
        return mean, None, None
    return mean, max(0.0, mean - _CERTAIN * error), min(1.0, mean + _CERTAIN * error)


def _layers(curve: Sequence[Mapping[str, Any]]) -> Chart:
    marks, rows = [], []
    for one in curve:
        mean, low, high = _interval(one)
        assert mean is not None  # the caller kept only entries with an accuracy
        told = n.spread(n.percent(mean), n.percent(low), n.percent(high))
        lower, upper = (None if end is None else 100 * end for end in (low, high))
        marks.append(Mark(float(one["layer"]), 100 * mean, f"After block {one['layer']}: {told} %", lower, upper))
        rows.append(Row(str(one["layer"]), _accuracy(one)))
    series = Series("linear probe, 95 % interval", INK, marks, strong=True)
    held = [v for mark in marks for v in (mark.low, mark.y, mark.high) if v is not None]
    low, high = marks[0].x, marks[-1].x
    axis = Axis("Block of the backbone", low - 0.3, high + 0.3, [(mark.x, f"{mark.x:g}") for mark in marks])
    caption = "Linear probe accuracy (%) on the features after each block"
    return Chart(
        caption,
        draw([series], x=axis, y=share_axis(held, "Accuracy (%)"), key="layers-chart",
             title=f"Line chart. {caption}. {'; '.join(mark.told for mark in marks)}."),
        [swatch(series)],
        Table(caption, "Block", ["Accuracy", "95 % interval"], rows, fold="The numbers behind this chart"),
    )  # fmt: skip
