"""The decision in words: a sentence, reasons, what would change it, and how a tie was broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_kernels.compare.decision import CLOSE, FULL, OTHER, PROMPTS

__all__ = ["break_tie", "explain", "withhold_where_underfit"]

UNDERFIT = 0.1  # training loss in nats
PREFER_MARGIN = 0.03  # of accuracy that an arm may stay behind, by the interval, and still win a tie on costs


def break_tie(decision: dict[str, Any], cost: Sequence[Mapping[str, Any]], prefer: str) -> None:
    """Name the cheaper arm where accuracy leaves it too close and the user said what counts; said as such.

    Only where the interval of the cheaper arm's loss stays within three points: else nothing is known that a cost could
    outweigh, be it at the largest size that was trained or by the line. Two sizes make no line, and a verdict that
    was withheld is no tie."""
    measure = {"storage": "stored_bytes", "latency": "latency_ms"}.get(prefer)
    now, last = decision["at"]["1x"], decision["gaps"][-1]
    if decision["verdict"] != CLOSE or measure is None or decision.get("underfit"):
        return
    if now["extrapolated"] and len(decision["gaps"]) < 3:
        return
    by_arm = {entry["arm"]: entry for entry in cost}
    sides = {PROMPTS: decision["prompts_arm"], FULL: "full"}
    if not all(arm in by_arm for arm in sides.values()):
        return
    cheaper = min(sides, key=lambda side: float(by_arm[sides[side]][measure]))
    at_risk = max(-row["low"] if cheaper == PROMPTS else row["high"] for row in (now, last))
    if at_risk > PREFER_MARGIN:
        decision["tie"] = {"prefer": prefer, "broken": False, "at_risk": at_risk}
        return
    decision["tie"] = {"prefer": prefer, "broken": True, "side": cheaper, "at_risk": at_risk}
    decision["verdict"], decision["arm"] = cheaper, sides[cheaper]
    now["verdict"] = cheaper


def withhold_where_underfit(decision: dict[str, Any], losses: Mapping[str, float]) -> None:
    """Take back a verdict for prompts where full fine-tuning has not fitted its own training images as well.

    It can do all that prompts can; where its training loss is above 0.1 and twice that of the winner, too few epochs or
    the settings that were tried are to blame, and more budget may turn the verdict."""
    winner = decision["arm"]
    if decision["verdict"] not in (PROMPTS, OTHER) or winner in (None, "ftp") or not {winner, "full"} <= losses.keys():
        return
    if losses["full"] <= max(UNDERFIT, 2 * losses[winner]):
        return
    decision["underfit"] = {"full": losses["full"], "winner": losses[winner], "withheld": decision["verdict"]}
    decision["verdict"], decision["arm"] = CLOSE, None
    decision["at"]["1x"]["verdict"] = CLOSE


def explain(decision: dict[str, Any], titles: Mapping[str, str], *, images: int, facts: Mapping[str, Any]) -> None:
    """Add "sentence", "reasons" and "changes". `facts`: "cost" and "diagnosis" by arm, "edges" {arm: which}, "seeds",
    "tested", "tuned" (anchors), "trained" (largest size)."""
    decision["sentence"] = _sentence(decision, titles, images)
    decision["reasons"] = _reasons(decision, titles, images, facts)
    decision["changes"] = _changes(decision, titles, images, facts)


def _sentence(decision: Mapping[str, Any], titles: Mapping[str, str], images: int) -> str:
    now, verdict = decision["at"]["1x"], decision["verdict"]
    gap = f"{_points(now['gap'])} points (95 % interval {_points(now['low'])} to {_points(now['high'])})"
    prompts = titles[decision["prompts_arm"]]
    trained = max(entry["size"] for entry in decision["accuracy"])
    tie = decision.get("tie") or {}
    if tie.get("broken"):
        return (
            f"Too close in accuracy with {images} images, and {titles[decision['arm']]} because you prefer less "
            f"{tie['prefer']}: {prompts} minus full fine-tuning is {gap}."
        )
    if verdict == OTHER:
        against = decision["other"]["against"]
        return (
            f"Neither prompts nor full fine-tuning: {titles[decision['arm']]} is better with {trained} images, by "
            f"{_points(against[PROMPTS]['gap'])} points than {prompts} and by {_points(against[FULL]['gap'])} than "
            "full fine-tuning."
        )
    basis = "by the line through the sizes that were trained" if now["extrapolated"] else "measured"
    if verdict == CLOSE and now["extrapolated"]:
        last = decision["gaps"][-1]
        told = f"{_points(last['mean'])} points (95 % interval {_points(last['low'])} to {_points(last['high'])})"
        return (
            f"Too close to call with {images} images: with {trained}, the most that were trained on, {prompts} minus "
            f"full fine-tuning is {told}; the line in log n expects {_points(now['gap'])}, which alone decides nothing."
        )
    if verdict == CLOSE:
        return (
            f"Too close to call with {images} images: {prompts} minus full fine-tuning is {gap}, {basis}, and no other "
            "arm beats both."
        )
    winner, loser = (prompts, "full fine-tuning") if verdict == PROMPTS else ("Full fine-tuning", prompts)
    size = abs(now["gap"])
    return (
        f"{winner} rather than {loser} with {images} images: {_points(size).lstrip('+')} points more accurate, {basis} "
        f"(95 % interval of prompts minus full {_points(now['low'])} to {_points(now['high'])})."
    )


def _reasons(
    decision: Mapping[str, Any], titles: Mapping[str, str], images: int, facts: Mapping[str, Any]
) -> list[str]:
    now, prompts = decision["at"]["1x"], decision["prompts_arm"]
    accuracy = {(entry["arm"], entry["size"]): entry["mean"] for entry in decision["accuracy"]}
    top = max(size for _, size in accuracy)
    best = sorted({arm for arm, _ in accuracy}, key=lambda arm: -accuracy[arm, top])
    told = ", ".join(f"{titles[arm]} {accuracy[arm, top]:.1%}" for arm in best)
    found = [
        f"Test accuracy with {top} training images, mean of {facts['seeds']} draws on {facts['tested']} test images: "
        f"{told}.",
        f"{titles[prompts]} stands for prompts because validation inside the training set chose it; no test label was "
        "read before everything was trained.",
        f"Data size: {decision['crossing']['text']}.",
    ]
    if now["agreeing"] < decision["rule"]["agree"]:
        found.append(f"Only {now['agreeing']} of 20 re-draws of images and training sets name the same winner.")
    if underfit := decision.get("underfit"):
        found.append(
            f"A verdict against full fine-tuning is withheld: its training loss is still {underfit['full']:.2f} (the "
            f"leading arm's is {underfit['winner']:.2f}), so it had too few epochs or settings in this budget."
        )
    if now["extrapolated"] and len({size for _, size in accuracy}) < 3:
        found.append("Fewer than three sizes were trained: a line through two says nothing of sizes beyond them.")
    tie = decision.get("tie")
    if tie:
        what = "Accuracy cannot separate the two; your preference for less {} decided".format(tie["prefer"])
        if not tie["broken"]:
            what = f"Your preference for less {tie['prefer']} did not decide: too much might be lost"
        found.append(f"{what} (it may cost up to {100 * max(tie['at_risk'], 0):.1f} points).")
    found += _other_reasons(decision, titles)
    found += _cost_reasons(prompts, titles, facts)
    found += _diagnosis_reasons(titles, facts)
    return found


def _other_reasons(decision: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    other = decision.get("other")
    if not other or decision["verdict"] == OTHER:
        return []
    against = other["against"]
    return [
        f"{titles[other['arm']]}, the best of the other arms by validation, is {_points(against[PROMPTS]['gap'])} "
        f"points from {titles[decision['prompts_arm']]} and {_points(against[FULL]['gap'])} from full fine-tuning: it "
        "does not beat both by more than chance."
    ]


def _cost_reasons(prompts: str, titles: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
    cost = facts.get("cost", {})
    if prompts not in cost or "full" not in cost:
        return []
    mine, full = cost[prompts], cost["full"]
    share = mine["trainable_parameters"] / max(full["trainable_parameters"], 1)
    return [
        f"{titles[prompts]} stores {_bytes(mine['stored_bytes'])} for each task, full fine-tuning "
        f"{_bytes(full['stored_bytes'])}; it trains {share:.2%} of the parameters, a training step takes "
        f"{mine['step_ms'] / full['step_ms']:.2f} times as long, and predicting one image "
        f"{mine['latency_ms'] / full['latency_ms']:.2f} times."
    ]


def _diagnosis_reasons(titles: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
    rows = facts.get("diagnosis", {})
    over = [titles[arm] for arm, row in rows.items() if row.get("overfit")]
    found = [f"The test loss of {', '.join(over)} rose again before the end: overfitting."] if over else []
    full = rows.get("full")
    if full:
        found.append(
            f"Full fine-tuning moved the features of test images to a cosine of {full['drift']['cosine']:.2f} (CKA "
            f"{full['drift']['cka']:.2f}) with the frozen model."
        )
    return found


def _changes(
    decision: Mapping[str, Any], titles: Mapping[str, str], images: int, facts: Mapping[str, Any]
) -> list[str]:
    found, now = [], decision["at"]["1x"]
    for name, times in (("2x", 2), ("5x", 5)):
        later = decision["at"][name]
        if later["verdict"] not in (CLOSE, now["verdict"]) and decision["verdict"] != later["verdict"]:
            winner = titles[decision["prompts_arm"]] if later["verdict"] == PROMPTS else "full fine-tuning"
            found.append(
                f"{times} times as many images ({later['size']}): the line in log n expects {winner} to lead by "
                f"{abs(100 * later['gap']):.1f} points there."
            )
    crossing = decision["crossing"]
    if crossing["size"] is not None:
        side = "more" if crossing["size"] > images else "fewer"
        found.append(f"{side.capitalize()} images than about {crossing['size']}: the two change places there.")
    if decision.get("underfit"):
        found.append(
            "A larger budget: with more epochs full fine-tuning may catch up, or the verdict against it stand."
        )
    if decision["verdict"] == CLOSE:
        half = (decision["gaps"][-1]["high"] - decision["gaps"][-1]["low"]) / 2
        found.append(
            f"More test images or draws: with {facts['tested']} test images and {facts['seeds']} draws the interval "
            f"is +-{100 * half:.1f} points, so a smaller difference cannot show. A larger --budget or --seeds helps."
        )
        found.append("A preference: --prefer storage or --prefer latency breaks a tie by cost, and says so.")
    for arm, which in facts.get("edges", {}).items():
        found.append(
            f"{titles[arm]}: the best learning rate was the {which} of its grid, so a wider grid might raise it."
        )
    if facts["trained"] < images:
        found.append(f"A larger budget: nothing was trained on more than {facts['trained']} of the {images} images.")
    return found


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
