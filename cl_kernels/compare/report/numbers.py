"""Numbers as a reader wants them: few digits, units, true minus signs, intervals in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "NONE",
    "count",
    "interval",
    "number",
    "percent",
    "points",
    "seconds",
    "sentence",
    "size",
    "spread",
    "value_of",
]

NONE = "–"


def value_of(source: Mapping[str, Any] | None, *path: str) -> float | None:
    """The finite number at `path` in nested mappings, or None."""
    value: Any = source
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent from 0.0001 to a million: 0.0123, 4.57, 1,230."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    value = float(f"{value:.{digits - 1}e}")  # rounded first: 9.999 has a digit less before the point than 10.0
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number: 12,500."""
    return NONE if value is None else f"{round(value):,}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent with one decimal, without the sign: 81.2."""
    return NONE if share is None else f"{100 * share:.1f}".replace("-", "−")


def points(gap: float | None) -> str:
    """A difference of two shares in points, always with its sign: +4.2, −0.3, 0.0."""
    if gap is None:
        return NONE
    text = f"{100 * gap:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "−")


def interval(low: str, high: str) -> str:
    """`79.9 to 82.6`; a dash where an end is missing."""
    return NONE if NONE in (low, high) else f"{low} to {high}"


def spread(mean: str, low: str, high: str) -> str:
    """`81.2 (79.9 to 82.6)`; the mean alone where there is no interval."""
    return mean if NONE in (mean, low, high) or low == high == mean else f"{mean} ({low} to {high})"


def seconds(value: float | None) -> str:
    """0.35 s, 12 s, 2 min 5 s, 1 h 4 min."""
    if value is None:
        return NONE
    if value < 60:
        return f"{number(value, 2)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(value: float | None) -> str:
    """Bytes in decimal units with three digits: 12.3 kB, 1.24 MB."""
    if value is None:
        return NONE
    if abs(value) < 999.5:
        return f"{round(value)} B"
    for unit in ("kB", "MB"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{number(value)} {unit}"
    return f"{number(value / 1000)} GB"


def sentence(text: Any) -> str:
    """A remark as a sentence: a capital letter and a full stop; the rest as it is."""
    words = str(text).strip()
    return words[:1].upper() + words[1:].rstrip(".") + "." if words else ""
