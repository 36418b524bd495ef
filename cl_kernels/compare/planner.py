"""What fits into the budget: sizes, seeds, epochs and trials, chosen from measured rates, the same for every arm."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_kernels.compare.config import describe_seconds

__all__ = ["BudgetError", "Plan", "Rates", "batch_size", "cost_of_rung", "fits", "make_plan", "rungs"]

EPOCHS = (100, 70, 50, 40, 30, 25, 20, 16, 12, 10, 8, 6, 5, 4, 3)
ENOUGH = 10  # epochs at the largest size, below which every arm is cut short
SLACK = 0.9  # of the time that a plan may fill: other processes come and go
MAX_EPOCHS = 200
LOOKS = 10  # epochs whose test log-probabilities are kept of the run that is diagnosed, the first with all images
FOLD = 0.8  # of a subset trains in a tuning trial


class BudgetError(ValueError):
    """The budget cannot decide; the message says the smallest that can."""


@dataclass
class Rates:
    """Measured seconds of each arm: per training image and epoch, per step, per test image, and per trial besides.

    `factor` is what trials took of late in units of what was predicted: a machine that others use makes it grow.
    """

    train: dict[str, float]
    step: dict[str, float]
    test: dict[str, float]
    fixed: dict[str, float]
    factor: float = 1.0
    _known: dict[tuple[Any, ...], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def none(cls) -> Rates:
        """Nothing measured yet."""
        return cls({}, {}, {}, {})

    def trial(self, arm: str, images: int, epochs: int, tested: int) -> float:
        """Predicted seconds of one trial."""
        steps = epochs * -(-images // batch_size(images))
        passes = images * epochs * self.train[arm] + steps * self.step[arm] + tested * self.test[arm]
        return self.factor * (self.fixed[arm] + passes)

    def trials(self, arms: Sequence[str], images: int, epochs: int, tested: int) -> float:
        """The same, one of every arm."""
        key = (*arms, images, epochs, tested)
        if key not in self._known:  # a planner asks for the same thousands of times
            self._known[key] = sum(self.trial(arm, images, epochs, tested) for arm in arms) / self.factor
        return self.factor * self._known[key]

    def observe(self, predicted: float, seconds: float) -> None:
        """Learn from a trial that was predicted with the present factor; long trials teach more than short ones."""
        if predicted <= 0 or seconds <= 0:
            return
        weight = min(0.5, 0.1 + 0.1 * seconds)
        self.factor *= min(4.0, max(0.25, seconds / predicted)) ** weight

    def as_dict(self) -> dict[str, Any]:
        """What `Rates(**...)` takes."""
        names = ("train", "step", "test", "fixed", "factor")
        return {name: getattr(self, name) for name in names}


@dataclass
class Plan:
    """What will be run. `cells` are (size, seed) in the order of running; each is run for every arm or for none."""

    sizes: list[int]
    seeds: int
    epochs: int  # at the largest size
    trials: int  # of tuning, each arm, at each of `anchors`
    anchors: list[int]
    repeats: dict[int, int]  # 80:20 splits at each anchor
    images: int  # all training images there are
    tested: int
    cells: list[tuple[int, int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        made = cls(**values)
        made.repeats = {int(key): value for key, value in made.repeats.items()}
        made.cells = [(int(size), int(seed)) for size, seed in made.cells]
        return made

    def epochs_at(self, size: int) -> int:
        """Epochs of every arm at `size`."""
        return epochs_at(size, self.sizes[-1], self.epochs)

    def anchor(self, size: int) -> int:
        """The size whose tuned settings a run at `size` takes: the nearest in log n."""
        return min(self.anchors, key=lambda anchor: (abs(math.log(anchor / size)), anchor))

    def text(self) -> str:
        """One line for people."""
        sizes = ", ".join(map(str, self.sizes))
        return (
            f"sizes {sizes} of {self.images} images; {self.seeds} seeds; {self.epochs} epochs at {self.sizes[-1]} "
            f"({self.epochs_at(self.sizes[0])} at {self.sizes[0]}); {self.trials} tuning trials for each arm at "
            f"{' and '.join(map(str, self.anchors))} images; {self.tested} test images"
        )


def epochs_at(size: int, largest: int, epochs: int) -> int:
    """Epochs at `size` when the largest size gets `epochs`: x sqrt(largest / size), so that small sets get fewer steps
    than large ones but not proportionally fewer; at most 200."""
    return max(1, min(max(MAX_EPOCHS, epochs), round(epochs * math.sqrt(largest / size))))


def batch_size(size: int) -> int:
    """A power of two near an eighth of the images, from 16 to 64: some steps an epoch also on small sets."""
    return int(2 ** min(6, max(4, int(math.log2(max(size / 8, 1))))))


def rungs(trials: int, epochs: int) -> list[tuple[int, int]]:
    """(configurations, epochs) of each rung of successive halving: half go on, with twice the epochs, until two are
    left at the full number."""
    counts = [trials]
    while counts[-1] > 2:
        counts.append(-(-counts[-1] // 2))
    return [(count, max(1, epochs // 2 ** (len(counts) - 1 - rung))) for rung, count in enumerate(counts)]


def cost_of_sweep(
    plan: Plan, rates: Rates, arms: Sequence[str], cells: Sequence[tuple[int, int]] | None = None
) -> float:
    """Predicted seconds of the cells (all of the plan's by default)."""
    return sum(cost_of_cell(plan, rates, arms, size) for size, _ in (plan.cells if cells is None else cells))


def cost_of_cell(plan: Plan, rates: Rates, arms: Sequence[str], size: int) -> float:
    """Predicted seconds of one size with one seed, all arms."""
    return rates.trials(arms, size, plan.epochs_at(size), 2 * plan.tested)


def cost_of_tuning(plan: Plan, rates: Rates, arms: Sequence[str]) -> float:
    """Predicted seconds of all tuning trials."""
    return sum(
        cost_of_rung(plan, rates, arms, anchor, rung)
        for anchor in plan.anchors
        for rung in range(len(rungs(plan.trials, plan.epochs_at(anchor))))
    )


def cost_of_rung(plan: Plan, rates: Rates, arms: Sequence[str], anchor: int, rung: int) -> float:
    """Predicted seconds of one rung of tuning, all arms."""
    count, epochs = rungs(plan.trials, plan.epochs_at(anchor))[rung]
    tested = round((1 - FOLD) * anchor) * epochs
    return plan.repeats[anchor] * count * rates.trials(arms, round(FOLD * anchor), epochs, tested)


def make_plan(
    sizes: Sequence[int], images: int, tested: int, rates: Rates, arms: Sequence[str], *,
    seconds: float, spent: float, reserve: float, seeds: int, most_trials: int, quick: bool = False,
) -> Plan:  # fmt: skip
    """The richest plan that fits into `seconds` beside what is spent and reserved.

    Richness counts in doublings: epochs twice up to `ENOUGH` and once up to 40, seeds once, trials one and a half times
    up to 4 and half beyond, sizes a fifth each; a largest size below `images` costs two for each halving, since the
    verdict there is then extrapolated. Raises `BudgetError` naming the smallest budget that can decide: four sizes (or
    as many as there are), two seeds, two trials, three epochs.
    """
    best: tuple[float, Plan] | None = None
    cheapest = math.inf
    for plan in _candidates(sizes, images, tested, seeds, most_trials, quick):
        cost = cost_of_tuning(plan, rates, arms) + cost_of_sweep(plan, rates, arms)
        cheapest = min(cheapest, cost)
        if cost <= SLACK * (seconds - spent - reserve) and (best is None or _richness(plan) > best[0]):
            best = _richness(plan), plan
    if best is None:
        wanted = 1.05 * (spent + reserve + cheapest / SLACK)
        wanted = 5.0 * math.ceil(wanted / 5)
        raise BudgetError(
            f"budget: {describe_seconds(seconds)} is too small to decide here: the smallest comparison (two seeds, two "
            f"trials an arm) needs about {describe_seconds(wanted)} on this machine as it is now; give --budget "
            f"{math.ceil(wanted)}s or more, fewer --arms, or a smaller --backbone"
        )
    return best[1]


def _candidates(
    sizes: Sequence[int], images: int, tested: int, seeds: int, most_trials: int, quick: bool
) -> list[Plan]:
    least = min(4, len(sizes))
    tops = range(least, len(sizes) + 1)
    trial_counts = [count for count in (2, 4, 6, 8, 12, 16) if count <= most_trials] or [most_trials]
    epochs: Sequence[int] = (4, 3) if quick else EPOCHS
    draws = [2] if quick else range(2, seeds + 1)
    trial_counts = trial_counts[:1] if quick else trial_counts
    plans = []
    for top, count in itertools.product(tops, range(least, len(sizes) + 1)):
        if count > top or (quick and (top, count) != (least, least)):
            continue
        chosen = _spread(list(sizes[:top]), count)
        for base, seed_count, trials in itertools.product(epochs, draws, trial_counts):
            for tuned in _anchor_choices(chosen):
                repeats = {anchor: 1 if quick else max(1, min(3, 400 // anchor)) for anchor in tuned}
                plan = Plan(chosen, seed_count, base, trials, tuned, repeats, images, tested)
                plan.cells = _order(chosen, seed_count)
                plans.append(plan)
    return plans


def _order(sizes: list[int], draws: int) -> list[tuple[int, int]]:
    """Two draws of the largest size, of the smallest, of the one in the middle, of those between; after them the
    further draws. Whenever time runs out, what has been run spans all sizes and can be used."""
    by_worth = _by_worth(sizes)
    first = [(size, draw) for size in by_worth for draw in range(min(2, draws))]
    return first + [(size, draw) for draw in range(2, draws) for size in by_worth]


def _by_worth(sizes: list[int]) -> list[int]:
    """The ends, then the middle of the widest stretch that is left, again and again."""
    found = [sizes[-1], *sizes[:1]][: len(sizes)]
    while len(found) < len(sizes):
        known = sorted(sizes.index(size) for size in found)
        low, high = max(itertools.pairwise(known), key=lambda pair: (pair[1] - pair[0], -pair[0]))
        found.append(sizes[(low + high) // 2])
    return found


def fits(plan: Plan, rates: Rates, arms: Sequence[str], cell: tuple[int, int], seconds: float) -> bool:
    """Whether a cell can be run in `seconds`; of the first two draws, which are of use together only, both."""
    size, draw = cell
    return cost_of_cell(plan, rates, arms, size) * (2 if draw == 0 else 1) <= seconds


def _anchor_choices(sizes: list[int]) -> list[list[int]]:
    """Where to tune: at a small size and at the largest, or, cheaper, at the largest but one or two."""
    small = sizes[1] if len(sizes) > 2 else sizes[0]
    return [sorted({small, sizes[-1 - back]}) for back in range(min(3, len(sizes)))]


def _spread(sizes: list[int], count: int) -> list[int]:
    """`count` of the sizes, first and last among them, as even as may be."""
    places = {round(step * (len(sizes) - 1) / max(count - 1, 1)) for step in range(count)}
    return [sizes[place] for place in sorted(places)]


def _richness(plan: Plan) -> float:
    value = math.log2(min(plan.epochs, ENOUGH)) + math.log2(min(plan.epochs, 40)) + 0.1 * math.log2(plan.epochs)
    value += math.log2(plan.seeds) + 0.5 * math.log2(plan.trials) + math.log2(min(plan.trials, 4))
    value += 0.2 * len(plan.sizes)
    value -= 2.0 * math.log2(plan.images / plan.sizes[-1])
    return value - 0.75 * math.log2(plan.sizes[-1] / plan.anchors[-1])
