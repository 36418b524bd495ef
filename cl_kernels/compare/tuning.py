"""Equal tuning: every arm gets the same number of trials by the same rule, on training images alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_kernels.compare.arms import Arm
from cl_kernels.compare.planner import Plan, cost_of_rung, rungs
from cl_kernels.compare.runner import OutOfTime, Runner

__all__ = ["RULE", "Tuned", "candidates", "ranked_by_rule", "tune"]

RULE = (
    "Successive halving on 80:20 splits inside the training subset, by validation after the last epoch: the least loss "
    "of those whose accuracy is within one standard error of the best, and of equals the smaller learning rate. As "
    "many trials, epochs and splits for every arm."
)


@dataclass
class Tuned:
    """How one arm was tuned: `ranking[anchor]` holds settings with their validation accuracy, the best first, and
    behind those of the last rung the ones that went out before it."""

    trials: list[dict[str, Any]] = field(default_factory=list)
    ranking: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def chosen(self, anchor: int) -> dict[str, Any]:
        """The settings to use near `anchor`: of the tuned size that is nearest in log n."""
        return self.entry(anchor)["options"]  # type: ignore[no-any-return]  # a JSON object

    def entry(self, anchor: int) -> dict[str, Any]:
        """The best entry of the ranking near `anchor`."""
        return self.entries(anchor)[0]

    def entries(self, anchor: int) -> list[dict[str, Any]]:
        """All of it."""
        nearest = min(self.ranking, key=lambda size: (abs(math.log(size / anchor)), size))
        return self.ranking[nearest]


def candidates(grid: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` settings of a grid, spread evenly over its list; few of them stay away from its ends."""
    if count >= len(grid):
        return [dict(options) for options in grid]
    return [dict(grid[int((step + 0.5) * len(grid) / count)]) for step in range(count)]


def tune(runner: Runner, arms: Sequence[Arm], plan: Plan, cushion: float) -> dict[str, Tuned]:
    """Tune every arm at every anchor of the plan; `cushion` seconds must be left for the sweep.

    Where a slower machine than planned for uses the time up, tuning ends for all arms after the same rung. Raises
    `OutOfTime` when not even the first rung of the first anchor fits."""
    found = {arm.name: Tuned() for arm in arms}
    for number, anchor in enumerate(reversed(plan.anchors)):  # the largest first: the verdict is about it
        alive = {arm.name: candidates(runner.session.grid(arm), plan.trials) for arm in arms}
        for rung, (count, epochs) in enumerate(rungs(plan.trials, plan.epochs_at(anchor))):
            if (number or rung) and _cut(runner, plan, arms, anchor, rung, cushion):
                break
            runner.cushion = cushion if number or rung else 0.0
            try:
                ranked = {
                    arm.name: _rung(runner, arm, alive[arm.name][:count], plan, anchor, rung, epochs) for arm in arms
                }
            except OutOfTime:
                if not (number or rung):
                    raise
                _keep_cut(runner, anchor, rung, True)
                break
            finally:
                runner.cushion = 0.0
            for name, entries in ranked.items():
                found[name].trials += entries
                ranking = ranked_by_rule(entries)
                alive[name] = [entry["options"] for entry in ranking]
                out = [e for e in found[name].ranking.get(anchor, ()) if e["options"] not in alive[name]]
                found[name].ranking[anchor] = ranking + out  # behind: for where none of the last rung trains
    return found


def ranked_by_rule(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of one rung, the best first, by the rule that `RULE` says.

    60 validation images tell 93 % from 90 % as little as a coin does, and their losses of 0.79 and 0.26 very well: by
    accuracy alone full fine-tuning was once given a rate at which it had not begun to fit."""
    accuracies = [entry["validation_accuracy"] for entry in entries if entry["validation_accuracy"] is not None]
    best = max(accuracies, default=0.0)
    count = max((entry["validation_images"] for entry in entries), default=1)
    share = (best * count + 1) / (count + 2)  # never 0 or 1: a perfect score has an error too
    within = best - math.sqrt(share * (1 - share) / count)

    def order(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        accuracy, loss = entry["validation_accuracy"], entry["validation_loss"]
        group = math.inf if accuracy is None else 0.0 if accuracy >= within else -accuracy + 1.0
        return group, math.inf if loss is None else loss, float(entry["options"].get("lr") or 0.0)

    return sorted(entries, key=order)


def _cut(runner: Runner, plan: Plan, arms: Sequence[Arm], anchor: int, rung: int, cushion: float) -> bool:
    """Whether tuning ends before this rung; remembered, so that a resumed run ends it there too."""
    found = runner.cache.get("cut", {"anchor": anchor, "rung": rung})
    if found is not None:
        return bool(found["cut"])
    cost = cost_of_rung(plan, runner.rates, [arm.name for arm in arms], anchor, rung)
    cut = cost + cushion > runner.budget.left() - runner.reserve
    _keep_cut(runner, anchor, rung, cut)
    return cut


def _keep_cut(runner: Runner, anchor: int, rung: int, cut: bool) -> None:
    key = {"anchor": anchor, "rung": rung}
    runner.cache.put("cut", key, {"cut": cut}, spent=runner.budget.spent(), stages=runner.budget.stages)


def _rung(
    runner: Runner, arm: Arm, settings: Sequence[dict[str, Any]], plan: Plan, anchor: int, rung: int, epochs: int
) -> list[dict[str, Any]]:
    entries = []
    for options in settings:
        records = [runner.tune(arm, options, anchor, repeat, epochs) for repeat in range(plan.repeats[anchor])]
        entries.append(
            {
                "options": options,
                "size": anchor,
                "rung": rung,
                "epochs": epochs,
                "images": records[0]["images"],
                "repeats": len(records),
                "validation_accuracy": _mean(records, "validation_accuracy"),
                "validation_loss": _mean(records, "validation_loss"),
                "validation_images": sum(record["validation_images"] for record in records),
                "best_share": _best_share(records),
                "seconds": sum(record["seconds"]["total"] for record in records),
                "failed": next((record["reason"] for record in records if record["status"] == "failed"), ""),
            }
        )
    return entries


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return float(sum(values)) / len(values)


def _best_share(records: Sequence[Mapping[str, Any]]) -> float:
    """The best epoch as a share of all, by the mean validation accuracy over the splits; the last of equals."""
    curves = [record["curve"] for record in records if record["status"] == "done"]
    if not curves:
        return 1.0
    epochs = len(curves[0])
    means = [sum(curve[epoch]["validation_accuracy"] for curve in curves) for epoch in range(epochs)]
    best = max(range(epochs), key=lambda epoch: (means[epoch], epoch))
    return (best + 1) / epochs


def at_the_edge(grid: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str | None:
    """ "lowest" or "highest" where the chosen learning rate is the last of its kind in the grid, else None."""
    same = [o for o in grid if o.get("optimizer") == options.get("optimizer")]
    rates = sorted({float(o["lr"]) for o in same if o.get("lr") is not None})
    lr = options.get("lr")
    if lr is None or len(rates) < 2:
        return None
    return "lowest" if lr == rates[0] else "highest" if lr == rates[-1] else None


def describe(options: Mapping[str, Any]) -> str:
    """Settings in words: "lr 0.001, prompts 10"."""
    parts = []
    for name, value in options.items():
        told = (
            json.dumps(value)
            if isinstance(value, (dict, list))
            else f"{value:g}"
            if isinstance(value, float)
            else value
        )
        parts.append(f"{name} {told}")
    return ", ".join(parts)
