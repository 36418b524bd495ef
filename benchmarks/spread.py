"""From blocks to numbers: median, quartiles, and a spread that a repetition should stay within.

A pass is one process: its blocks share one layout of memory and a few seconds of the machine's weather, so they agree
with each other better than with a repetition. Therefore a suite takes two passes, minutes apart, in processes of their
own, and the spread of a row is the largest of

* half the distance of the quartiles of its blocks (what varies within seconds),
* the distance of its passes' medians (what varies between processes),
* `DRIFT_QUANTILE` of that distance over all rows of the run (two passes say little about one row, but hundreds of rows
  say how far passes lie apart on this machine today).

With one pass the last two are unknown and `ONE_PASS` stands for them. All are relative to the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

__all__ = ["DRIFT_QUANTILE", "ONE_PASS", "agree", "drift", "merged", "pooled", "summarised"]

ONE_PASS: Final = 0.10
DRIFT_QUANTILE: Final = 0.9
TIMES = ("min_s", "median_s", "p25_s", "p75_s", "spread", "floor_percent", "times_ours", "times_ours_spread")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summarised(result: dict[str, Any], drift: float | None = None) -> dict[str, Any]:
    """The result with times computed from its rows' blocks. `drift`: how far passes lie apart in the whole run."""
    ours = next((row for row in result["rows"] if row["variant"] == "ours" and "blocks" in row), None)
    rows = []
    for row in result["rows"]:
        if "blocks" not in row:
            rows.append(row)
            continue
        every = [value for blocks in row["blocks"] for value in blocks]
        low, middle, high = quartiles(every)
        passes = [statistics.median(blocks) for blocks in row["blocks"]]
        between = ONE_PASS if len(passes) == 1 else (max(passes) - min(passes)) / middle
        timed = {
            "min_s": min(every),
            "median_s": middle,
            "p25_s": low,
            "p75_s": high,
            "spread": max((high - low) / 2 / middle, between, drift or 0.0),
            "floor_percent": 100 * result["floor_s"] / middle if result["floor_s"] else None,
        }
        rows.append({key: value for key, value in row.items() if key not in TIMES} | timed)
    found = next((row for row in rows if row["variant"] == "ours"), None) if ours else None
    for row in rows:
        if "median_s" in row:
            row["times_ours"] = row["median_s"] / found["median_s"] if found else None
    return {**result, "rows": rows}


def merged(passes: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of several passes as one: blocks side by side; a variant that failed in any pass has failed.

    A case that the first pass did not come to counts with what later ones found.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in (result for results in passes for result in results):
        found.setdefault((result.get("room", ""), result["case"]), []).append(result)
    whole = []
    for first, *others in found.values():
        known = [{row["variant"]: row for row in other["rows"]} for other in others]
        rows = []
        for row in first["rows"]:
            there = [rows_of[row["variant"]] for rows_of in known if row["variant"] in rows_of]
            failed = next((one for one in (row, *there) if "failed" in one), None)
            blocks = [block for one in (row, *there) for block in one.get("blocks", [])]
            rows.append(
                {"variant": row["variant"], "failed": failed["failed"]} if failed else {**row, "blocks": blocks}
            )
        seconds = first["seconds"] + sum(other["seconds"] for other in others)
        whole.append({**first, "seconds": round(seconds, 2), "rows": rows})
    return pooled(whole)


def drift(results: Iterable[dict[str, Any]]) -> float | None:
    """`DRIFT_QUANTILE` of the distances between the passes of each row; None where no row has two."""
    found = []
    for result in results:
        for row in result["rows"]:
            passes = [statistics.median(blocks) for blocks in row.get("blocks", [])]
            if len(passes) > 1:
                found.append((max(passes) - min(passes)) / statistics.median(passes))
    if not found:
        return None
    return sorted(found)[min(len(found) - 1, int(DRIFT_QUANTILE * len(found)))]


def pooled(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every result summarised with the drift of all of them together."""
    whole = drift(results)
    return [summarised(result, whole) for result in results]


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two rows' medians differ by no more than their spreads together."""
    allowed = a["spread"] * a["median_s"] + b["spread"] * b["median_s"]
    return bool(abs(a["median_s"] - b["median_s"]) <= allowed)
