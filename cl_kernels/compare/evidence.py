"""The stages before training: data card, probes of frozen features, distance to pre-training, and the rates of arms."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_kernels.compare.arms import Arm
from cl_kernels.compare.cache import FOLDER, Budget, Cache
from cl_kernels.compare.data_card import data_card
from cl_kernels.compare.distance import distance_report
from cl_kernels.compare.features import extract
from cl_kernels.compare.planner import Rates
from cl_kernels.compare.probes import probes
from cl_kernels.compare.reference import find
from cl_kernels.compare.session import SAMPLE, Session
from cl_kernels.compare.trial import Trial, train_trial
from cl_kernels.compare.tuning import candidates
from cl_kernels.data import ImageData

__all__ = ["card", "distances", "frozen_probes", "measured_rates", "unit"]

Timed = tuple[float, Trial]
SHARE = 0.1  # of the budget that each of these stages may take before it is told to stop


def unit(cache: Cache, budget: Budget, stage: str, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a stage, from the cache or made now and stored."""
    with budget.stage(stage):
        found = cache.get(stage.replace(" ", "-"), key)
        if found is None:
            found = make()
            cache.put(stage.replace(" ", "-"), key, found, spent=budget.spent(), stages=budget.stages)
    return found


def card(session: Session) -> dict[str, Any]:
    """The data card, without a look at test labels. Of a large set only as many images as the budget allows."""
    most = max(SAMPLE, int(100 * session.config.seconds))
    data = session.data
    if session.size <= most:
        return data_card(data, read_test_labels=False)
    rows = session.rows(most, 0).sort().values
    part = ImageData(
        data.name, data.train.subset(rows), data.test.subset(session.test_rows), data.class_names, data.skipped,
        data.test_from,
    )  # fmt: skip
    found = data_card(part, read_test_labels=False)
    found["train"]["n"], found["test"]["n"] = len(data.train), len(data.test)
    found["train"]["counts"] = torch.bincount(session.labels, minlength=session.classes).tolist()
    found["warnings"].append(f"sizes and copies were looked for among {most} of {session.size} training images")
    return found


def frozen_probes(session: Session, budget: Budget) -> dict[str, Any]:
    """Linear probe, nearest neighbours, class means and LogME of the frozen backbone, on training images alone."""
    rows = session.rows(min(session.size, SAMPLE), 0)
    features = extract(
        session.backbone, session.pixels(rows), layers="all", device=session.device,
        cache=session.config.folder / FOLDER,
    )  # fmt: skip
    return probes(features, session.labels[rows], seed=session.config.seed, should_stop=_limit(budget))


def distances(session: Session, budget: Budget) -> dict[str, Any]:
    """The distance of the training images to those of pre-training, in the backbone's features."""
    rows = session.rows(min(session.size, SAMPLE), 0)
    cache = session.config.folder / FOLDER
    features = extract(session.backbone, session.pixels(rows), device=session.device, cache=cache)
    reference = find(session.backbone, session.config.reference, seed=session.config.seed, cache=cache)
    return distance_report(
        features, reference, seed=session.config.seed, backbone=session.backbone, cache=cache,
        should_stop=_limit(budget),
    )  # fmt: skip


def _limit(budget: Budget) -> Callable[[], bool]:
    end = budget.spent() + SHARE * budget.seconds
    return lambda: budget.spent() > end


def measured_rates(session: Session, arms: list[Arm], clock: Callable[[], float]) -> Rates:
    """Seconds an image and epoch, a step, a test image, and a trial besides: three short runs of every arm.

    On the CPU they are seconds of the processor, which other processes disturb little; `factor` is what the whole of
    the measurement took by the clock, in units of them."""
    meter = time.process_time if session.device.type == "cpu" else clock
    began, worked = clock(), meter()
    rows = session.rows(min(64, session.size), 0)
    start = meter()
    with torch.no_grad():
        session.backbone.model(session.images(rows[:8]).to(session.device))
    if meter() - start > 0.4:  # a large model on a small machine: the estimate may be coarse, it must not be dear
        rows = rows[:16]
    rates = Rates.none()
    for arm in arms:
        options = candidates(session.grid(arm), 1)[0]
        inputs = session.features(rows) if arm.frozen_features else session.images(rows)

        def run(epochs: int, parts: int, arm: Arm = arm, inputs: Tensor = inputs, options: Any = options) -> Timed:
            begun = meter()
            trial = train_trial(
                arm, options, session.backbone.model, inputs, session.labels[rows], classes=session.classes,
                epochs=epochs, batch_size=-(-len(rows) // parts), seed=0,
            )  # fmt: skip
            return meter() - begun, trial

        if not rates.train:
            run(1, 1)
        (one, _), (three, trial), (split, _) = run(1, 1), run(3, 1), run(3, 4)
        step = max((split - three) / 9, 0.0)
        epoch = max((three - one) / 2, 1e-6)
        rates.step[arm.name] = min(step, epoch)
        rates.train[arm.name] = max((epoch - rates.step[arm.name]) / len(rows), 1e-7)
        rates.fixed[arm.name] = max(one - epoch, 1e-3)
        begun = meter()
        if trial.method is not None:
            trial.method.predict(inputs.to(session.device))
        rates.test[arm.name] = max((meter() - begun) / len(rows), 1e-7)
    worked = meter() - worked
    rates.factor = min(100.0, max(0.01, (clock() - began) / worked)) if worked > 0 else 1.0
    return rates
