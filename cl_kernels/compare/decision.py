"""The verdict: paired bootstrap over test images and draws of the training set, a line in log n, and plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Outcomes", "decide", "verdict_at"]

Floats = npt.NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95  # of the interval that a verdict needs
SMALLEST = 0.005  # gap that is worth a verdict: half a point
AGREE, REDRAWS = 18, 20  # PB16
PROMPTS, FULL, OTHER, CLOSE = "prompts", "full", "other", "too-close"


@dataclass(frozen=True)
class Outcomes:
    """Right (1) or wrong (0) of every arm: `hits[arm][size]` is [draws, test images]; draws of the same number train
    on the same images in every arm. `chosen`: the prompt arm and the other arm that validation chose."""

    hits: Mapping[str, Mapping[int, Floats]]
    prompts: str
    full: str = "full"
    other: str | None = None

    @property
    def sizes(self) -> list[int]:
        """Ascending."""
        return sorted(self.hits[self.full])


@dataclass(frozen=True)
class _Gaps:
    """Bootstrap of gap(n) for one pair of arms: `mean` [sizes], `draws` [bootstrap, sizes]."""

    mean: Floats
    draws: Floats

    def interval(self, column: int, level: float = LEVEL) -> tuple[float, float]:
        low, high = np.quantile(self.draws[:, column], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class _Bootstrap:
    """One set of resampling weights for all pairs of arms, so that their gaps stay paired with each other.

    Test images are drawn with replacement, the same for all sizes and draws. Draws of the training set are resampled
    too; with S of them their spread is understated by sqrt((S-1)/S) and its own uncertainty not shown at all, so their
    deviations, of a spread pooled over sizes, are scaled by sqrt(S/(S-1)) and by Student's factor.
    """

    def __init__(self, outcomes: Outcomes, draws: int, generator: np.random.Generator) -> None:
        self.sizes = outcomes.sizes
        first = outcomes.hits[outcomes.full]
        self.images = first[self.sizes[0]].shape[1]
        self.seeds = [len(first[size]) for size in self.sizes]
        most = max(self.seeds)
        self.image_weights = generator.multinomial(self.images, np.full(self.images, 1 / self.images), draws)
        self.image_weights = self.image_weights / self.images
        self.picks = generator.random((draws, most))
        freedom = sum(count - 1 for count in self.seeds)
        self.freedom = max(1, freedom - (len(self.sizes) > 2))  # one is spent on how the spread falls with n
        self.student = np.sqrt(self.freedom / generator.chisquare(self.freedom, draws))

    def gaps(self, first: Mapping[int, Floats], second: Mapping[int, Floats]) -> _Gaps:
        """Bootstrap of accuracy(first) - accuracy(second) at every size."""
        means, columns = [], []
        spreads = self._spreads(first, second)
        for place, size in enumerate(self.sizes):
            difference = first[size] - second[size]
            by_seed = difference.mean(axis=1)
            mean, count = float(by_seed.mean()), len(by_seed)
            images = self.image_weights @ (difference.mean(axis=0)) - mean
            seeds = np.zeros(len(images))
            if count > 1:
                deviation = by_seed - mean
                own = math.sqrt(float((deviation**2).sum()) / (count - 1))
                scale = math.sqrt(count / (count - 1)) * (spreads[place] / own if own > 0 else 0.0)
                chosen = (self.picks[:, :count] * count).astype(np.int64)
                seeds = deviation[chosen].mean(axis=1) * scale * self.student
            means.append(mean)
            columns.append(mean + images + seeds)
        return _Gaps(np.array(means), np.stack(columns, axis=1))

    def _spreads(self, first: Mapping[int, Floats], second: Mapping[int, Floats]) -> Floats:
        """The standard deviation between draws at every size: a line of log s in log n, where there are three sizes."""
        found = []
        for size in self.sizes:
            by_seed = (first[size] - second[size]).mean(axis=1)
            count = len(by_seed)
            found.append(float(by_seed.std(ddof=1)) if count > 1 else math.nan)
        known = np.array(found)
        floor = 0.5 / self.images
        use = np.isfinite(known)
        if use.sum() < 3:
            pooled = math.sqrt(float(np.mean(known[use] ** 2))) if use.any() else floor
            return np.full(len(known), max(pooled, floor))
        freedom = np.array(self.seeds)[use] - 1
        # E log(s^2) lies below log(sigma^2) by log(f/2) - digamma(f/2), 0.58 for two draws' three
        logs = np.log(np.maximum(known[use], floor)) + 0.5 * np.array([_bias(int(f)) for f in freedom])
        x = np.log(np.array(self.sizes)[use])
        slope = np.clip(np.polyfit(x, logs, 1)[0], -1.0, 0.0)  # spreads fall with n, and not faster than 1/n
        level = float((logs - slope * x).mean())
        spreads: Floats = np.maximum(np.exp(level + slope * np.log(np.array(self.sizes))), floor)
        return spreads


def _bias(freedom: int) -> float:
    """log(f/2) - digamma(f/2), which is what the mean of log s^2 lacks of log sigma^2."""
    half, value = freedom / 2, 0.0
    while half < 6:
        value += 1 / half
        half += 1
    digamma = math.log(half) - 1 / (2 * half) - 1 / (12 * half**2) + 1 / (120 * half**4) - value
    return math.log(freedom / 2) - digamma


class _Line:
    """gap = a + b log n, weighted by the inverse variances; one line for each bootstrap draw."""

    def __init__(self, sizes: Sequence[int], gaps: _Gaps) -> None:
        self.x = np.log(np.array(sizes, dtype=np.float64))
        variance = np.maximum(gaps.draws.var(axis=0), 1e-8)
        weights = 1 / variance
        self.centre = float((weights * self.x).sum() / weights.sum())
        u = self.x - self.centre
        spread = float((weights * u * u).sum())
        self.rows = weights / weights.sum(), (weights * u / spread if spread > 0 else np.zeros_like(u))
        self.level, self.slope = (float(row @ gaps.mean) for row in self.rows)
        self.levels, self.slopes = (gaps.draws @ row for row in self.rows)
        rest = gaps.mean - self.level - self.slope * u
        freedom = max(1, len(sizes) - 2)
        self.misfit = max(1.0, math.sqrt(float((weights * rest * rest).sum()) / freedom)) if len(sizes) > 2 else 1.0

    def at(self, size: float) -> tuple[float, Floats]:
        """The line's gap at `size`, and its bootstrap draws, widened where the line misses the measured gaps."""
        u = math.log(size) - self.centre
        mean = self.level + self.slope * u
        return mean, mean + (self.levels + self.slopes * u - mean) * self.misfit


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
    otherwise and beyond, where three sizes or more support it. PB16: of 20 re-draws of images and draws at least 18
    must name the same, else it is "too-close". "other": the arm that validation chose among the rest beats prompts and
    full, each with its interval. Cost: O(draws * sizes * (images + draws of the training set))."""
    generator = np.random.default_rng(seed)
    bootstrap = _Bootstrap(outcomes, draws, generator)
    hits, sizes = outcomes.hits, outcomes.sizes
    gaps = bootstrap.gaps(hits[outcomes.prompts], hits[outcomes.full])
    line = _Line(sizes, gaps)
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
        at[name] = {
            "size": size, "verdict": verdict, "gap": mean, "low": low, "high": high,
            "extrapolated": not measured, "agreeing": agreeing,
        }  # fmt: skip
    top = sizes[-1]
    other = _other(outcomes, bootstrap, sizes.index(top))
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


def _band(gaps: _Gaps, place: int) -> dict[str, float]:
    low, high = gaps.interval(place)
    return {"low": low, "high": high}


def _other(outcomes: Outcomes, bootstrap: _Bootstrap, place: int) -> dict[str, Any] | None:
    """How the best other arm stands at the largest size against prompts and against full."""
    if outcomes.other is None:
        return None
    hits, found = outcomes.hits, {}
    for name, rival in ((PROMPTS, outcomes.prompts), (FULL, outcomes.full)):
        gaps = bootstrap.gaps(hits[outcomes.other], hits[rival])
        low, high = gaps.interval(place)
        mean = float(gaps.mean[place])
        agreeing = int((gaps.draws[:REDRAWS, place] > 0).sum())
        found[name] = {"gap": mean, "low": low, "high": high, "agreeing": agreeing}
    wins = all(entry["low"] > 0 and entry["gap"] >= SMALLEST and entry["agreeing"] >= AGREE for entry in found.values())
    return {"arm": outcomes.other, "wins": wins, "against": found}


def _accuracies(outcomes: Outcomes, bootstrap: _Bootstrap) -> list[dict[str, Any]]:
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


def _crossing(line: _Line, sizes: Sequence[int], images: int) -> dict[str, Any]:
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
    beyond = f", beyond the {images} images there are" if size > images else ""
    text = f"{above} ahead from about {size} images on (90 % of the re-draws: {low} to {high}){beyond}"
    return {"size": size, "low": low, "high": high, "share": share, "text": text}
