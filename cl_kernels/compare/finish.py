"""The stages after training: final evaluation, cost, diagnosis, decision, pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.compare import cost, diagnosis
from cl_kernels.compare.arms import Arm
from cl_kernels.compare.config import PROMPT_ARMS
from cl_kernels.compare.decision import Outcomes, decide
from cl_kernels.compare.planner import Plan
from cl_kernels.compare.prior import prior
from cl_kernels.compare.sweep import Run, weights_file
from cl_kernels.compare.tuning import RULE, Tuned, at_the_edge, ranked_by_rule
from cl_kernels.compare.words import break_tie, explain, withhold_where_underfit
from cl_kernels.continual import Deployed, load_model
from cl_kernels.continual.latency import CALLS, WARM_UP
from cl_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from cl_kernels.compare.engine import Work

__all__ = ["finished", "reserve"]

LAST = 4.0  # seconds for the decision, the report and its files
SAFETY = 1.25  # on what is kept for the last stages
PICTURES = 4000  # forward and backward passes of attribution: 8 images, 2 arms, 2 targets, 50 nodes and the checks
LOADER = 'from cl_kernels.continual import load_model; model = load_model("{}")  # logits of uint8 images'


def reserve(work: Work) -> float:
    """Seconds to keep for everything after the sweep, by the measured rates."""
    rates, steps = work.rates, WARM_UP + CALLS
    total = 0.0
    for arm in work.names:
        total += rates.factor * steps * cost.BATCH * (rates.train[arm] + rates.test[arm])
        total += rates.factor * 4 * diagnosis.IMAGES * rates.test[arm]
    if work.session.config.pictures:
        total += min(_pictures(work), 0.2 * work.budget.seconds)
    return LAST + SAFETY * total


def _pictures(work: Work) -> float:
    return 3.0 + work.rates.factor * PICTURES * work.rates.train["full"]


def finished(
    work: Work, plan: Plan, tuned: Mapping[str, Tuned], runs: Sequence[Run], card: dict[str, Any]
) -> dict[str, Any]:
    """The sections of results.json from "arms" on. The test labels are unsealed here, after all choices were made."""
    session = work.session
    chosen = _chosen(work, plan, tuned)
    session.sealed.unseal()
    labels = session.sealed.open()
    counts = torch.bincount(session.data.test.labels, minlength=session.classes)
    card["test"]["counts"] = counts.tolist()
    models = _models(work)
    top = max(run.size for run in runs if run.draw == 0)
    costs = [found for arm in session.arms if (found := _cost(work, arm, runs, models, top)) is not None]
    with work.budget.stage("diagnosis"):
        work.progress.now("diagnosis", left=work.budget.left())
        rows = [_diagnosis(work, arm, runs, models, labels, top) for arm in session.arms]
        diagnoses = [row for row in rows if row is not None]
    with work.budget.stage("decision"):
        work.progress.now("decision", left=work.budget.left())
        decision = _decision(work, plan, tuned, runs, labels, chosen, costs, diagnoses)
    pictures = _drawn(work, decision, models, labels, runs, top)
    return {
        "arms": [_arm(session, arm, tuned[arm.name], plan, runs) for arm in session.arms],
        "runs": [_run(work, run, labels) for run in runs],
        "cost": costs,
        "diagnosis": diagnoses,
        "pictures": pictures,
        "decision": decision,
        "plan": plan.as_dict() | {"text": plan.text(), "rates": work.rates.as_dict(), "tuning_rule": RULE},
        "weights": {
            arm: {"file": weights_file(arm), "loader": LOADER.format(weights_file(arm))}
            for arm in work.names if (session.config.folder / weights_file(arm)).exists()
        },
        "missing": [*session.notes, *work.missing, *_dropped(work, plan), *_busy()],
    }  # fmt: skip


def _dropped(work: Work, plan: Plan) -> list[str]:
    found = []
    if work.skipped:
        found.append(f"left out for every arm, as the machine was slower than planned for: {'; '.join(work.skipped)}")
    if plan.sizes[-1] < plan.images:
        found.append(f"training with more than {plan.sizes[-1]} of {plan.images} images: the budget did not reach")
    return found


def _busy() -> list[str]:
    """A note where more processes want to run than the machine has cores: measured times then say little."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except OSError:
        return []
    if load <= 1.5 * cores:
        return []
    return [f"quiet timings: {load:.1f} processes shared {cores} cores, so times and latencies are rough"]


def _chosen(work: Work, plan: Plan, tuned: Mapping[str, Tuned]) -> tuple[str, str | None]:
    """(prompt arm, best of the rest besides full) by the validation of the largest tuned size."""

    def best(names: Sequence[str]) -> str | None:
        entries = [dict(tuned[name].entry(plan.sizes[-1]), arm=name) for name in names]
        return str(ranked_by_rule(entries)[0]["arm"]) if entries else None

    prompts = best([name for name in work.names if name in PROMPT_ARMS])
    if prompts is None:
        raise ValueError(f"arms: expected one of {', '.join(PROMPT_ARMS)}")
    return prompts, best([name for name in work.names if name not in (*PROMPT_ARMS, "full")])


def _decision(
    work: Work, plan: Plan, tuned: Mapping[str, Tuned], runs: Sequence[Run], labels: Tensor,
    chosen: tuple[str, str | None], costs: Sequence[Mapping[str, Any]], diagnoses: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    session = work.session
    by_size = {size: [run for run in runs if run.size == size] for size in {run.size for run in runs}}
    whole = {size: here for size, here in by_size.items() if len(here) >= 2 * len(work.names)}
    hits = {
        arm: {
            size: torch.stack([(run.final.argmax(dim=1) == labels).double() for run in here if run.arm == arm]).numpy()
            for size, here in sorted(whole.items())
        }
        for arm in work.names
    }
    decision = decide(Outcomes(hits, chosen[0], "full", chosen[1]), session.size, seed=session.config.seed)
    withhold_where_underfit(decision, _last_losses(runs, max(whole)))
    decision["prior"] = prior(session.config.backbone, session.size)
    break_tie(decision, costs, session.config.prefer)
    titles = {arm.name: arm.title for arm in session.arms}
    edges = {
        arm.name: which for arm in session.arms if arm.name in (chosen[0], "full", chosen[1])
        and (which := at_the_edge(session.grid(arm), tuned[arm.name].chosen(plan.sizes[-1])))
    }  # fmt: skip
    facts = {
        "cost": {entry["arm"]: entry for entry in costs},
        "diagnosis": {entry["arm"]: entry for entry in diagnoses},
        "edges": edges,
        "seeds": max(len(here) // len(work.names) for here in whole.values()),
        "tested": len(labels),
        "trained": max(whole),
    }
    explain(decision, titles, images=session.size, facts=facts)
    return decision


def _last_losses(runs: Sequence[Run], size: int) -> dict[str, float]:
    """The mean training loss of each arm in its last epoch at `size`."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.size == size:
            found.setdefault(run.arm, []).append(float(run.record["curve"][-1]["train_loss"]))
    return {arm: sum(losses) / len(losses) for arm, losses in found.items()}


def _models(work: Work) -> dict[str, Deployed]:
    """The trained models, from memory or, after a resume, from their files."""
    found: dict[str, Deployed] = dict(work.models)
    for arm in work.names:
        path = work.session.config.folder / weights_file(arm)
        if arm not in found and path.exists():
            try:
                found[arm] = load_model(path, device=work.session.device)
            except CheckpointError as error:
                work.missing.append(f"cost, diagnosis and pictures of {arm}: {error}")
    return found


def _cost(work: Work, arm: Arm, runs: Sequence[Run], models: Mapping[str, Deployed], top: int) -> dict[str, Any] | None:
    mine = [run for run in runs if run.arm == arm.name and run.size == top]
    if arm.name not in models or not mine:
        return None
    options, records = mine[0].options, [run.record for run in mine]
    future = work.session.config.future_tasks
    return work.unit(
        "cost", lambda: cost.measure(work.session, arm, options, models[arm.name], records, future), key=arm.name
    )


def _diagnosis(
    work: Work, arm: Arm, runs: Sequence[Run], models: Mapping[str, Deployed], labels: Tensor, top: int
) -> dict[str, Any] | None:
    first = next((run for run in runs if run.arm == arm.name and run.size == top and run.draw == 0), None)
    if first is None or arm.name not in models:
        return None
    session, model = work.session, models[arm.name]
    images = session.test_images()[: diagnosis.IMAGES].to(session.device)
    rows = session.rows(top, 0)[: 2 * diagnosis.IMAGES]
    with torch.no_grad():
        logits = torch.cat([model.method.predict(part.to(session.device)) for part in session.images(rows).split(64)])
    told, right = F.log_softmax(logits.double().cpu(), dim=1), session.labels[rows]
    return diagnosis.diagnose(
        arm.name, model, session.test_features()[: diagnosis.IMAGES], images, first.test, labels,
        float(F.nll_loss(told, right)), float((told.argmax(dim=1) == right).double().mean()),
    )  # fmt: skip


def _drawn(
    work: Work, decision: Mapping[str, Any], models: Mapping[str, Deployed], labels: Tensor, runs: Sequence[Run],
    top: int,
) -> dict[str, Any]:  # fmt: skip
    """Attribution maps of the prompt arm, full fine-tuning and the arm that won, in the time that is left."""
    session, budget = work.session, work.budget
    prompts = str(decision["prompts_arm"])
    names = [name for name in dict.fromkeys((prompts, "full", decision["arm"])) if name in models]
    if not session.config.pictures or not {prompts, "full"} <= set(names):
        if session.config.pictures:
            work.missing.append("pictures: the trained models are not there")
        return {}
    if budget.left() < LAST + 0.25 * _pictures(work):
        work.missing.append("pictures: no time was left for them")
        return {}
    from cl_kernels.compare.attribution import pictures

    first = {run.arm: run.final for run in runs if run.size == top and run.draw == 0}
    found = work.unit(
        "pictures",
        lambda: pictures(
            {name: models[name] for name in names}, session.test_pixels(), labels, out=Path(session.config.folder),
            class_names=[str(name) for name in session.data.class_names], pair=(prompts, "full"),
            preprocess=session.backbone.preprocessing,
            log_probabilities={name: first[name] for name in names}, seed=session.config.seed,
            deadline=lambda: budget.left() < LAST,
        ),
        key=names,
    )  # fmt: skip
    if found.get("stopped"):
        work.missing.append("some of the pictures: no time was left for them")
    return found


def _arm(session: Any, arm: Arm, tuned: Tuned, plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    mine = [run for run in runs if run.arm == arm.name]
    top = plan.sizes[-1]
    return {
        "name": arm.name,
        "title": arm.title,
        "trainable_parameters": int(mine[0].record["trainable_parameters"]) if mine else None,
        "tuning": {
            "trials": tuned.trials,
            "chosen": tuned.chosen(top),
            "chosen_by_size": {str(size): tuned.chosen(size) for size in tuned.ranking},
            "edge": at_the_edge(session.grid(arm), tuned.chosen(top)),
        },
    }


def _run(work: Work, run: Run, labels: Tensor) -> dict[str, Any]:
    losses = {epoch: float(F.nll_loss(told.double(), labels)) for epoch, told in sorted(run.test.items())}
    return {
        "arm": run.arm,
        "size": run.size,
        "seed": run.draw,
        "options": run.options,
        "epochs": run.record["epochs"],
        "curve": run.record["curve"],
        "accuracy_last": _accuracy(run.final, labels),
        "accuracy_best": _accuracy(run.test[run.best_epoch], labels),
        "best_epoch": run.best_epoch,
        "test_loss_curve": [losses.get(row["epoch"]) for row in run.record["curve"]],
        "seconds": run.record["seconds"]["total"],
        "subset": f"{run.size} images of draw {run.draw + 1}",
        "data_hash": run.record["data_hash"],
        "weight_hash": work.session.weight_hash,
        "digests": run.record["digests"],
        "rates": run.record["rates"],
    }


def _accuracy(told: Tensor, labels: Tensor) -> float:
    return float((told.argmax(dim=1) == labels).double().mean())
