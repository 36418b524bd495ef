"""The verdict: paired bootstrap over test images and draws of the training set, a line in log n, and plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cl_kernels.compare.bootstrap import LEVEL, Bootstrap, Floats, Gaps, Line, Outcomes

__all__ = ["Outcomes", "decide", "verdict_at"]

DRAWS = 2000
SMALLEST = 0.005  # gap that is worth a verdict: half a point
AGREE, REDRAWS = 18, 20  # PB16
PROMPTS, FULL, OTHER, CLOSE = "prompts", "full", "other", "too-close"


def verdict_at(mean: float, draws: Floats, level: float = LEVEL) -> tuple[str, float, float]:
    """(verdict, low, high) of one gap prompts - full: its interval must leave out 0, and it must be half a point."""
    low, high = (float(value) for value in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    if low > 0 and mean >= SMALLEST:
        return PROMPTS, low, high
    if high < 0 and mean <= -SMALLEST:
        return FULL, low, high
    return CLOSE, low, high


def decide(outcomes: Outcomes, images: int, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """The section "decision" of results.json without its words: verdicts at n, 2n and 5n, gaps, crossing, accuracies.

    A verdict at `images` (all there are) is of the measured gap where they were trained on, of the line in log n
    otherwise and beyond, where three sizes or more support it and a line that levels off says the same. PB16: of 20
    re-draws of images and draws at least 18 must name the same, else it is "too-close". "other": the arm that
    validation chose among the rest beats prompts and full, each with its interval.
    Cost: O(draws * sizes * (images + draws of the training set))."""
    generator = np.random.default_rng(seed)
    bootstrap = Bootstrap(outcomes, draws, generator)
    hits, sizes = outcomes.hits, outcomes.sizes
    gaps = bootstrap.gaps(hits[outcomes.prompts], hits[outcomes.full])
    line, flat = Line(sizes, gaps), Line(sizes, gaps, levels_off=True)
    at = {}
    for times in (1, 2, 5):
        name, size = f"{times}x", images * times
        measured = size in sizes
        mean, column = (
            (float(gaps.mean[sizes.index(size)]), gaps.draws[:, sizes.index(size)]) if measured else line.at(size)
        )
        verdict, low, high = verdict_at(mean, column)
        agreeing = _agreement(column[:REDRAWS], verdict)
        if agreeing < AGREE or (not measured and len(sizes) < 3):  # a line through two points cannot miss them
            verdict = CLOSE
        if not measured and verdict_at(*flat.at(size))[0] != verdict:  # gaps that shrink need not change sides
            verdict = CLOSE
        if times == 1 and not measured and verdict_at(float(gaps.mean[-1]), gaps.draws[:, -1])[0] != verdict:
            verdict = CLOSE  # what one has is not decided by the line alone, against what was measured nearest to it
        at[name] = {
            "size": size, "verdict": verdict, "gap": mean, "low": low, "high": high,
            "extrapolated": not measured, "agreeing": agreeing,
        }  # fmt: skip
    top = sizes[-1]
    other = _other(outcomes, bootstrap, sizes.index(top), images)
    verdict = str(at["1x"]["verdict"])
    arm = {PROMPTS: outcomes.prompts, FULL: outcomes.full}.get(verdict)
    if other is not None and other["wins"]:
        verdict, arm = OTHER, outcomes.other
        at["1x"]["verdict"] = OTHER
    return {
        "verdict": verdict,
        "arm": arm,
        "prompts_arm": outcomes.prompts,
        "at": at,
        "gaps": [
            {"size": size, "mean": float(gaps.mean[place]), **_band(gaps, place)} for place, size in enumerate(sizes)
        ],
        "crossing": _crossing(line, sizes, images),
        "line": {"level": line.level, "slope": line.slope, "centre": math.exp(line.centre), "misfit": line.misfit},
        "accuracy": _accuracies(outcomes, bootstrap),
        "other": other,
        "rule": {"level": LEVEL, "smallest": SMALLEST, "redraws": REDRAWS, "agree": AGREE, "draws": draws},
    }


def _agreement(draws: Floats, verdict: str) -> int:
    """How many re-draws name the same winner; all of them where none is named."""
    if verdict == CLOSE:
        return len(draws)
    return int((draws > 0).sum() if verdict == PROMPTS else (draws < 0).sum())


def _band(gaps: Gaps, place: int) -> dict[str, float]:
    low, high = gaps.interval(place)
    return {"low": low, "high": high}


def _other(outcomes: Outcomes, bootstrap: Bootstrap, place: int, images: int) -> dict[str, Any] | None:
    """How the best other arm stands at the largest size against prompts and against full.

    Where that is below `images`, it wins only if both lines of either gap keep it ahead there."""
    if outcomes.other is None:
        return None
    hits, found, sizes = outcomes.hits, {}, outcomes.sizes
    ahead = sizes[place] == images or len(sizes) >= 3
    for name, rival in ((PROMPTS, outcomes.prompts), (FULL, outcomes.full)):
        gaps = bootstrap.gaps(hits[outcomes.other], hits[rival])
        low, high = gaps.interval(place)
        mean = float(gaps.mean[place])
        agreeing = int((gaps.draws[:REDRAWS, place] > 0).sum())
        found[name] = {"gap": mean, "low": low, "high": high, "agreeing": agreeing}
        for levels_off in (False, True) if sizes[place] != images else ():
            ahead &= verdict_at(*Line(sizes, gaps, levels_off=levels_off).at(images))[0] == PROMPTS
    wins = all(entry["low"] > 0 and entry["gap"] >= SMALLEST and entry["agreeing"] >= AGREE for entry in found.values())
    return {"arm": outcomes.other, "wins": wins and ahead, "against": found}


def _accuracies(outcomes: Outcomes, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Mean accuracy and its interval of every arm at every size."""
    table = []
    for arm, by_size in outcomes.hits.items():
        zero = {size: np.zeros_like(values) for size, values in by_size.items()}
        levels = bootstrap.gaps(by_size, zero)
        for place, size in enumerate(bootstrap.sizes):
            low, high = levels.interval(place)
            low, high = max(0.0, low), min(1.0, high)
            table.append({"arm": arm, "size": size, "mean": float(levels.mean[place]), "low": low, "high": high})
    return table


def _crossing(line: Line, sizes: Sequence[int], images: int) -> dict[str, Any]:
    """Where the line in log n changes sign between half the smallest size and 4 n, with a 90 % interval."""
    first, last = math.log(sizes[0] / 2), math.log(4 * images)

    def root(level: Any, slope: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            place = line.centre - level / slope
        return np.where(np.isfinite(place) & (place >= first) & (place <= last), place, np.nan)

    own = float(root(np.float64(line.level), np.float64(line.slope)))
    wide = [
        mean + (values - mean) * line.misfit for mean, values in ((line.level, line.levels), (line.slope, line.slopes))
    ]
    roots = root(*wide)
    share = float(np.isfinite(roots).mean())
    if not math.isfinite(own) or share < 0.5:
        ahead = "prompts" if line.level + line.slope * (last - line.centre) > 0 else "full fine-tuning"
        doubt = f"; {share:.0%} of the re-draws have one" if share >= 0.05 else ""
        text = f"no crossing up to {4 * images} images: the line stays on the side of {ahead} there{doubt}"
        return {"size": None, "low": None, "high": None, "share": share, "text": text}
    found = np.exp(roots[np.isfinite(roots)])
    low, high = (round(float(value)) for value in np.quantile(found, [0.05, 0.95]))
    size = round(math.exp(own))
    above = "prompts" if line.slope > 0 else "full fine-tuning"
    beyond = f", beyond the {images} images there are, if the gap does not level off" if size > images else ""
    text = f"{above} ahead from about {size} images on (90 % of the re-draws: {low} to {high}){beyond}"
    return {"size": size, "low": low, "high": high, "share": share, "text": text}
