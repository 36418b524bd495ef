"""`compare`: the nine stages from data to a decision, cached, resumable, inside a budget."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cl_kernels import data as image_data
from cl_kernels.compare import evidence, finish
from cl_kernels.compare.cache import Budget, Cache, opened
from cl_kernels.compare.config import CompareConfig, describe_seconds
from cl_kernels.compare.planner import BudgetError, Plan, Rates, cost_of_cell, fits, make_plan
from cl_kernels.compare.progress import Silent
from cl_kernels.compare.report import write_report
from cl_kernels.compare.runner import OutOfTime, Runner
from cl_kernels.compare.session import SAMPLE, Session, open_session
from cl_kernels.compare.sweep import Run, cell_is_cached, run_cell
from cl_kernels.compare.tuning import Tuned, tune
from cl_kernels.continual import seeds
from cl_kernels.continual.checkpoint import write_atomically
from cl_kernels.continual.environment import environment
from cl_kernels.errors import BackendUnavailableError

__all__ = ["SCHEMA", "Work", "compare"]

SCHEMA = "cl_kernels.compare/1"


@dataclass
class Work:
    """What one comparison has at hand."""

    session: Session
    cache: Cache
    budget: Budget
    progress: Silent
    rates: Rates = field(default_factory=lambda: Rates.none())
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lead: int = 0  # the largest size of which the first draw was run: its models are kept
    models: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The arms."""
        return [arm.name for arm in self.session.arms]

    def unit(self, stage: str, make: Callable[[], dict[str, Any]], key: Any = "") -> dict[str, Any]:
        """A stage from the cache, or made now."""
        self.progress.now(stage, left=self.budget.left())
        return evidence.unit(self.cache, self.budget, stage, key, make)


def compare(
    config: CompareConfig,
    data: image_data.ImageData | None = None,
    backbone: image_data.Backbone | None = None,
    *,
    progress: Silent | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run the comparison that `config` describes; write results.json, the report and the best weights to `config.out`.

    Returns what results.json holds (schema "cl_kernels.compare/1"). `data` and `backbone` replace what would be loaded.
    Killed at any moment, a call with `resume` repeats at most the trial that ran and ends with the same decision.

    Raises `BudgetError` for a budget that cannot decide, naming the smallest that can; `FileExistsError`, `ValueError`
    as `cache.opened` does; what the parts raise for data, backbone and names. Cost: the budget."""
    started = clock()
    session = open_session(config, data, backbone)
    threads = torch.get_num_threads() if config.threads is None else config.threads
    with (
        opened(config.folder, session.fixed(), resume=config.resume, overwrite=config.overwrite) as cache,
        seeds.seeded(config.seed, session.device, threads),
        progress or Silent() as shown,
    ):
        spent, stages = cache.last()
        budget = Budget(config.seconds, clock, spent + clock() - started)
        budget.stages = stages
        budget.stages["opening"] = budget.stages.get("opening", 0.0) + clock() - started
        work = Work(session, cache, budget, shown)
        return _run(work)


def _run(work: Work) -> dict[str, Any]:
    session = work.session
    session.load(min(session.size, SAMPLE), 1)
    card = work.unit("data card", lambda: evidence.card(session))
    probes = work.unit("probes", lambda: evidence.frozen_probes(session, work.budget))
    distance = work.unit("distance", lambda: evidence.distances(session, work.budget))
    plan = _planned(work)
    with work.budget.stage("reading images"):
        session.load(plan.sizes[-1], plan.seeds)
    tuned, runs = _trained(work, plan)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": session.config.settings(),
        "environment": environment(session.device, torch.float32),
        "data": card,
        "probes": probes,
        "distance": distance,
        "sizes": sorted({run.size for run in runs}),
    }
    results |= finish.finished(work, plan, tuned, runs, card)
    return _write(work, results)


def _planned(work: Work) -> Plan:
    session, budget = work.session, work.budget
    stored = work.cache.get("plan", "")
    if stored is not None:
        work.rates = Rates(**stored["rates"])
        return Plan.from_dict(stored["plan"])
    rates = work.unit("rates", lambda: evidence.measured_rates(session, session.arms, budget.now).as_dict())
    work.rates = Rates(**rates)
    most = min(len(session.grid(arm)) for arm in session.arms)
    plan = make_plan(
        session.sizes, session.size, len(session.test_rows), work.rates, work.names,
        seconds=session.config.seconds, spent=budget.spent(), reserve=finish.reserve(work),
        seeds=session.config.seeds, most_trials=most, quick=session.config.quick,
    )  # fmt: skip
    value = {"plan": plan.as_dict(), "rates": work.rates.as_dict()}
    work.cache.put("plan", "", value, spent=budget.spent(), stages=budget.stages)
    work.progress.line(f"plan for {describe_seconds(session.config.seconds)}: {plan.text()}")
    return plan


def _trained(work: Work, plan: Plan) -> tuple[dict[str, Tuned], list[Run]]:
    """Tuning and the size sweep, cut down evenly where the machine is slower than it was."""
    session, budget = work.session, work.budget
    reserve = finish.reserve(work)
    runner = Runner(session, work.cache, budget, work.rates, reserve)
    with budget.stage("tuning"):
        least = sum(cost_of_cell(plan, work.rates, work.names, size) for size, _ in plan.cells[:6])  # three sizes
        runner.on_trial = lambda arm, detail: work.progress.now("tuning", detail=f"{arm}: {detail}", left=budget.left())
        try:
            tuned = tune(runner, session.arms, plan, least)
        except OutOfTime:
            _check_enough(work, plan, [])
            raise
    with budget.stage("size sweep"):
        runs = [run for place in range(len(plan.cells)) for run in _cell(work, runner, plan, tuned, place)]
    _check_enough(work, plan, runs)
    return tuned, runs


def _cell(work: Work, runner: Runner, plan: Plan, tuned: dict[str, Tuned], place: int) -> list[Run]:
    """One cell of the plan, or nothing where it does not fit into the time that is left: for all arms alike.

    What was left out is remembered, so that a resumed run leaves it out too."""
    size, draw = cell = plan.cells[place]
    key, told, count = {"size": size, "draw": draw}, f"size {size}, draw {draw + 1}", len(work.names)

    def shown(arm: str, detail: str) -> None:
        work.progress.now("size sweep", place * count, len(plan.cells) * count, f"{arm}: {told}", work.budget.left())

    runner.on_trial = shown
    alone = draw > 0 and work.cache.get("skipped", key | {"draw": 0}) is not None  # of no use without the first draw
    if not alone and work.cache.get("skipped", key) is None:
        left = work.budget.left() - runner.reserve
        if cell_is_cached(work, runner, plan, tuned, size, draw) or fits(plan, work.rates, work.names, cell, left):
            with contextlib.suppress(OutOfTime):
                return run_cell(work, runner, plan, tuned, size, draw)
        work.cache.put("skipped", key, {}, spent=work.budget.spent(), stages=work.budget.stages)
        work.progress.line(f"left out for every arm, as no time is left for it: {told}")
    work.skipped.append(told)
    return []


def _check_enough(work: Work, plan: Plan, runs: list[Run]) -> None:
    """Raise `BudgetError` where no size was run with two draws of every arm."""
    if any(sum(run.size == size for run in runs) >= 2 * len(work.names) for size in plan.sizes):
        return
    more = 2 * sum(cost_of_cell(plan, work.rates, work.names, size) for size in plan.sizes) + finish.reserve(work)
    wanted = 1.2 * (work.budget.spent() + more)
    raise BudgetError(
        f"budget: {describe_seconds(work.budget.seconds)} ended before any size was run with two draws, as this "
        f"machine became {work.rates.factor:.1f} times slower than measured; about {math.ceil(wanted)}s are needed now"
    )


def _write(work: Work, results: dict[str, Any]) -> dict[str, Any]:
    """results.json, then the report; a page that cannot be drawn is said and fails nothing. What the file holds."""
    out = work.session.config.folder
    with work.budget.stage("report"):
        _settle(work, results)
        write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
        try:
            write_report(results, out)
        except BackendUnavailableError as error:  # no jinja2
            results["missing"].append(f"the report: {error}")
    _settle(work, results)
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(out / "results.json", text.encode())
    found: dict[str, Any] = json.loads(text)
    return found


def _settle(work: Work, results: dict[str, Any]) -> None:
    results["budget"] = {
        "seconds": work.budget.seconds,
        "spent": work.budget.spent(),
        "stages": [{"stage": name, "seconds": seconds} for name, seconds in work.budget.stages.items()],
        "threads": torch.get_num_threads(),
    }
    with contextlib.suppress(OSError):
        results["budget"]["load"] = list(os.getloadavg())
