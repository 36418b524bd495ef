"""Two runs of the benchmarks against each other: the same machine only, and a change only where the spread lets it.

"Ours" counts as slower when its median has grown by more than the threshold and by more than both spreads explain, and
when it has also grown beside the baselines of the same run: a machine that is slower today slows both.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from cl_kernels.benchmarks import records, spread

__all__ = ["Change", "cases", "changes", "differences", "shown", "threshold"]


@dataclass(frozen=True)
class Change:
    """One variant of one case, then and now: ratio of medians, and of medians beside the baselines."""

    room: str
    case: str
    variant: str
    before_s: float
    now_s: float
    ratio: float
    beside: float | None
    explained: bool
    slower: bool


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In what the machines of two environments differ, as far as times depend on it."""
    names = {"device": "GPU", "cpu": "CPU model"}
    return [
        f"{names.get(name, name)}: {old.get(name)} then, {new.get(name)} now"
        for name in records.MACHINE
        if old.get(name) != new.get(name)
    ]


def threshold(text: str) -> float:
    """5%, 0.05 and 5 % as 0.05. Raises `ValueError` for what is no share, and for 5, which may mean either of two."""
    body = text.strip()
    try:
        value = float(body.removesuffix("%")) / (100 if body.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < (float("inf") if body.endswith("%") else 1):
        raise ValueError(f"--fail-above: expected a share such as 5% or 0.05, got {text!r}")
    return value


def changes(old: dict[str, Any], new: dict[str, Any], above: float) -> list[Change]:
    """Every variant that both reports have times of, in the order of the new one."""
    before = {(result["room"], result["case"]): _timed(result) for result in old["results"]}
    found = []
    for result in new["results"]:
        then, now = before.get((result["room"], result["case"]), {}), _timed(result)
        both = [name for name in now if name in then]
        grown = {name: now[name]["median_s"] / then[name]["median_s"] for name in both}
        others = [grown[name] for name in both if not name.startswith("ours")]
        machine = statistics.median(others) if others else None
        for name in both:
            beside = grown[name] / machine if machine else None
            explained = spread.agree(then[name], now[name])
            worse = grown[name] > 1 + above and not explained and (beside is None or beside > 1 + above)
            found.append(
                Change(
                    result["room"], result["case"], name, then[name]["median_s"], now[name]["median_s"], grown[name],
                    beside, explained, slower=worse and name.startswith("ours"),
                )
            )  # fmt: skip
    return found


def cases(report: dict[str, Any]) -> set[str]:
    """Every case that the report has times of, called as in its `not_run`."""
    return {f"{result['room']}: {result['case']}" for result in report["results"]}


def _timed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in result["rows"] if "median_s" in row}


def shown(found: list[Change], old: dict[str, Any], new: dict[str, Any]) -> str:
    """Lines for the terminal: what is slower, what is quicker, how much agrees, what is missing."""
    lines = [""]
    for change in found:
        if change.slower or (not change.explained and change.variant.startswith("ours")):
            beside = f", {change.beside:.2f} beside the baselines" if change.beside is not None else ""
            word = "SLOWER" if change.slower else "differs"
            times = f"{records.unit(change.before_s)} -> {records.unit(change.now_s)}"
            lines.append(
                f"{word}: {change.room}: {change.case}: {change.variant}: {times}, {change.ratio:.2f}x{beside}"
            )
    same = sum(change.explained for change in found)
    lines.append(f"{len(found)} rows compared, {same} agree within their spreads")
    there = {(result["room"], result["case"]) for result in new["results"]}
    gone = [result for result in old["results"] if (result["room"], result["case"]) not in there]
    if gone:
        lines.append(f"{len(gone)} cases of the old report were not run, such as {gone[0]['room']}: {gone[0]['case']}")
    return "\n".join(lines) + "\n"
