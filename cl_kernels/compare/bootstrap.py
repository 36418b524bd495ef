"""Resampling test images and draws of the training set together, and lines through the gaps that go beyond them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEVEL", "Bootstrap", "Floats", "Gaps", "Line", "Outcomes"]

Floats = npt.NDArray[np.float64]

LEVEL = 0.95  # of the interval that a verdict needs
MADE = (1.0, -1.0)  # differences of the images that are drawn beside the real ones


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
class Gaps:
    """Bootstrap of gap(n) for one pair of arms: `mean` [sizes], `draws` [bootstrap, sizes]."""

    mean: Floats
    draws: Floats

    def interval(self, column: int, level: float = LEVEL) -> tuple[float, float]:
        low, high = np.quantile(self.draws[:, column], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class Bootstrap:
    """One set of resampling weights for all pairs of arms, so that their gaps stay paired with each other.

    Test images are drawn with replacement, the same for all sizes and draws, and beside them two made ones that each
    side alone gets right: without them four images that all speak for one side made a verdict (the exact sign test
    gives them p = 0.125), and so did a test set of one; with them it takes about six. Draws of the training set are
    resampled too; with S of them their spread is understated by sqrt((S-1)/S) and its own uncertainty not shown at
    all, so their deviations, of a spread pooled over sizes, are scaled by sqrt(S/(S-1)) and by Student's factor.
    """

    def __init__(self, outcomes: Outcomes, draws: int, generator: np.random.Generator) -> None:
        self.sizes = outcomes.sizes
        first = outcomes.hits[outcomes.full]
        self.images = first[self.sizes[0]].shape[1]
        self.seeds = [len(first[size]) for size in self.sizes]
        most = max(self.seeds)
        counted = self.images + len(MADE)
        self.image_weights = generator.multinomial(counted, np.full(counted, 1 / counted), draws) / self.images
        self.picks = generator.random((draws, most))
        freedom = sum(count - 1 for count in self.seeds)
        self.freedom = max(1, freedom - (len(self.sizes) > 2))  # one is spent on how the spread falls with n
        self.student = np.sqrt(self.freedom / generator.chisquare(self.freedom, draws))

    def gaps(self, first: Mapping[int, Floats], second: Mapping[int, Floats]) -> Gaps:
        """Bootstrap of accuracy(first) - accuracy(second) at every size."""
        means, columns = [], []
        spreads = self._spreads(first, second)
        for place, size in enumerate(self.sizes):
            difference = first[size] - second[size]
            by_seed = difference.mean(axis=1)
            mean, count = float(by_seed.mean()), len(by_seed)
            images = self.image_weights @ np.concatenate([difference.mean(axis=0), MADE]) - mean
            seeds = np.zeros(len(images))
            if count > 1:
                deviation = by_seed - mean
                if not deviation.any():  # equal by chance: the spread of the other sizes holds here too
                    deviation = np.linspace(-1, 1, count)
                own = math.sqrt(float((deviation**2).sum()) / (count - 1))
                scale = math.sqrt(count / (count - 1)) * spreads[place] / own
                chosen = (self.picks[:, :count] * count).astype(np.int64)
                seeds = deviation[chosen].mean(axis=1) * scale * self.student
            means.append(mean)
            columns.append(mean + images + seeds)
        return Gaps(np.array(means), np.stack(columns, axis=1))

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


class Line:
    """gap = a + b log n, weighted by the inverse variances; one line for each bootstrap draw.

    `levels_off`: gap = a - b / sqrt(n), which comes to rest at a, as the gaps of most published tasks do."""

    def __init__(self, sizes: Sequence[int], gaps: Gaps, *, levels_off: bool = False) -> None:
        self.levels_off = levels_off
        self.x = np.array([self._place(size) for size in sizes])
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

    def _place(self, size: float) -> float:
        return -1 / math.sqrt(size) if self.levels_off else math.log(size)

    def at(self, size: float) -> tuple[float, Floats]:
        """The line's gap at `size`, and its bootstrap draws, widened where the line misses the measured gaps."""
        u = self._place(size) - self.centre
        mean = self.level + self.slope * u
        return mean, mean + (self.levels + self.slopes * u - mean) * self.misfit
