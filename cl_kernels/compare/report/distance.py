"""How far the images are from those the backbone was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import numbers as n
from .blocks import Block, Chart, Items, Note, Row, Table, Text
from .costs import log_axis
from .svg import Mark, dots

__all__ = ["distance"]

_YOURS = "your images"


def distance(found: Mapping[str, Any]) -> list[Block]:
    """The distances, each with what it rests on, on a ruler of known data sets."""
    missing = [n.sentence(one) for one in found.get("missing") or []]
    if n.value_of(found, "frechet", "value") is None:
        return [Note(" ".join(missing) or "No distance was measured; “What is missing, and why” says why.")]
    reference: Mapping[str, Any] = found.get("reference") or {}
    blocks: list[Block] = [
        Text(
            f"In the backbone's own features, {n.count(n.value_of(found, 'n'))} training images against as many of "
            f"{reference.get('name') or 'the reference'} ({n.count(n.value_of(reference, 'n'))} images)."
        ),
        _table(found),
    ]
    ruler = _ruler(found)
    if ruler is not None:
        blocks.append(ruler)
    notes = [n.sentence(one) for one in found.get("notes") or []]
    return [*blocks, *([Items(notes + missing)] if notes or missing else [])]


def _table(found: Mapping[str, Any]) -> Table:
    frechet = found["frechet"]
    chance = _share(n.value_of(frechet, "chance_relative"))
    rows = [
        Row(
            "Frechet distance, share of the reference's variance",
            [_share(n.value_of(frechet, "relative")), f"two samples of one law: {chance}"],
        )
    ]
    endless = n.value_of(frechet, "line", "intercept_relative")
    if endless is not None:
        rest = _share(n.value_of(frechet, "line", "residual_relative"))
        rows.append(
            Row("The same for endless data, by the line in 1/n", [_share(endless), f"the line misses by {rest}"])
        )
    kid = found.get("kid") or {}
    if n.value_of(kid, "value") is not None:
        held = n.interval(*(n.number(n.value_of(kid, end)) for end in ("low", "high")))
        rows.append(Row("Kernel distance (KID)", [n.number(kid["value"]), f"95 % interval {held}; 0: one law"]))
    proxy = found.get("proxy_a") or {}
    if n.value_of(proxy, "value") is not None:
        error = n.percent(n.value_of(proxy, "error"))
        words = f"a classifier confuses the two in {error} %; 0: cannot be told apart, 2: always"
        rows.append(Row("Proxy-A distance", [n.number(proxy["value"]), words]))
    return Table("Distances, and what each is read against", "Distance", ["Value", "Read against"], rows, words=True)


def _ruler(found: Mapping[str, Any]) -> Chart | None:
    """Frechet distances, relative to the reference's variance, of known sets and of the user's images."""
    mine = n.value_of(found, "frechet", "relative")
    marks = [
        (str(one["name"]), value, one)
        for one in found.get("ruler") or []
        if (value := n.value_of(one, "frechet_relative")) is not None and value > 0
    ]
    if mine is None or mine <= 0 or not marks:
        return None
    places: list[tuple[str, float, Mapping[str, Any]]] = sorted(
        [*marks, (_YOURS, mine, _own(found))], key=lambda one: one[1]
    )
    chance = n.value_of(found, "frechet", "chance_relative")
    held = [value for _, value, _ in places] + ([chance] if chance is not None and chance > 0 else [])
    axis = log_axis(held, "Share of the reference's variance, logarithmic (%)", lambda v: n.number(100 * v, 2))
    caption = "Frechet distance to the pre-training images: yours among known sets, at the same n"
    told = [(name, Mark(value, 0.0, f"{name}: {_share(value)}"), name == _YOURS) for name, value, _ in places]
    return Chart(
        caption,
        dots(told, x=axis, key="ruler-chart", at=chance, title=f"Dot plot. {caption}. {_list(told)}."),
        [],
        Table(
            caption, "Images", ["Frechet", "For endless data", "KID", "Proxy-A"],
            [Row(name, _cells(value, one)) for name, value, one in places], fold="The numbers behind this chart",
        ),
        note="" if chance is None else f"Dashed line: two samples of one law, {_share(chance)}.",
    )  # fmt: skip


def _own(found: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        "frechet_endless": n.value_of(found, "frechet", "line", "intercept_relative"),
        "kid": n.value_of(found, "kid", "value"),
        "proxy_a": n.value_of(found, "proxy_a", "value"),
    }


def _cells(value: float, one: Mapping[str, Any]) -> list[str]:
    rest = [n.number(n.value_of(one, name)) for name in ("kid", "proxy_a")]
    return [_share(value), _share(n.value_of(one, "frechet_endless")), *rest]


def _share(value: float | None) -> str:
    return n.NONE if value is None else f"{n.number(100 * value)} %"


def _list(told: Sequence[tuple[str, Mark, bool]]) -> str:
    return "; ".join(mark.told for _, mark, _ in told)
