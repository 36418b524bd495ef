"""Runs trials, each once: from the cache where it is there, else trained, timed, stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cl_kernels.compare.arms import Arm
from cl_kernels.compare.cache import Budget, Cache
from cl_kernels.compare.planner import Rates, batch_size
from cl_kernels.compare.session import Session
from cl_kernels.compare.subsets import fold
from cl_kernels.compare.trial import Trial, train_trial

__all__ = ["OutOfTime", "Runner"]


class OutOfTime(Exception):
    """A trial would have run over the budget and was stopped; nothing of it is kept, and the plan goes on without."""


@dataclass
class Runner:
    """Trains arms on subsets. `reserve` seconds must be left for what comes after the trials, and `cushion` besides for
    the sweep, while tuning trials run that could be done without."""

    session: Session
    cache: Cache
    budget: Budget
    rates: Rates
    reserve: float = 0.0
    cushion: float = 0.0
    on_trial: Callable[[str, str], None] | None = None

    def tune(self, arm: Arm, options: dict[str, Any], size: int, repeat: int, epochs: int) -> dict[str, Any]:
        """One tuning trial: trains on 80 % of the first draw's subset of `size` images, validates on the rest."""
        key = {"arm": arm.name, "options": options, "size": size, "repeat": repeat, "epochs": epochs}
        found = self.cache.get("tuning", key)
        if found is None:
            rows = self.session.rows(size, 0)
            labels = self.session.labels[rows]
            train, held = fold(labels, self.session.draw_seed(0), repeat)
            trial = self._train(
                arm, options, rows[train], size, epochs, self.session.draw_seed(0), tested=len(held), held=rows[held]
            )
            found = _record(trial) | {"images": len(train), "validation_images": len(held)}
            self._store("tuning", key, found)
        return found

    def measure(
        self, arm: Arm, options: dict[str, Any], size: int, draw: int, epochs: int, test_every: int,
        keep: Callable[[Trial], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One trial of the sweep: trains on the whole subset, predicts the test images; their labels stay sealed.

        `keep` sees the trial before it is stored, so that what it writes is there whenever the record is."""
        key = self.sweep_key(arm, options, size, draw, epochs)
        found = self.cache.get("sweep", key)
        if found is None:
            rows = self.session.rows(size, draw)
            evaluations = 1 + (epochs // test_every if test_every else 0)
            trial = self._train(
                arm, options, rows, size, epochs, self.session.draw_seed(draw),
                tested=evaluations * len(self.session.test_rows), test_every=test_every,
            )  # fmt: skip
            tensors = {} if trial.final is None else {"final": trial.final}
            tensors |= {str(epoch): told for epoch, told in trial.test_curve.items()}
            if keep is not None and trial.status == "done":
                keep(trial)
            found = _record(trial) | {"images": len(rows), "data_hash": self.session.data_hash(rows)}
            self._store("sweep", key, found, tensors)
        return found

    def sweep_key(self, arm: Arm, options: dict[str, Any], size: int, draw: int, epochs: int) -> dict[str, Any]:
        """Where `measure` keeps a trial."""
        return {"arm": arm.name, "options": options, "size": size, "draw": draw, "epochs": epochs}

    def inputs(self, arm: Arm, rows: Tensor) -> Tensor:
        """What an arm trains on: images, or the features of a backbone that never changes, computed once for all."""
        return self.session.features(rows) if arm.frozen_features else self.session.images(rows)

    def test_inputs(self, arm: Arm) -> Tensor:
        """The same of the test images."""
        return self.session.test_features() if arm.frozen_features else self.session.test_images()

    def _train(
        self, arm: Arm, options: dict[str, Any], rows: Tensor, size: int, epochs: int, seed: int, *,
        tested: int, held: Tensor | None = None, test_every: int = 0,
    ) -> Trial:  # fmt: skip
        session = self.session
        validation = None if held is None else (self.inputs(arm, held), session.labels[held])
        test = self.test_inputs(arm) if held is None else None
        if self.on_trial is not None:
            self.on_trial(arm.name, f"{len(rows)} images, {epochs} epochs")
        predicted = self.rates.trial(arm.name, len(rows), epochs, tested)
        start = self.budget.now()
        trial = train_trial(
            arm, options, session.backbone.model, self.inputs(arm, rows), session.labels[rows],
            classes=session.classes, epochs=epochs, batch_size=batch_size(size), seed=seed,
            validation=validation, test_images=test, test_every=test_every,
            deadline=lambda: self.budget.left() < self.reserve + self.cushion,
        )  # fmt: skip
        if trial.status == "stopped":
            raise OutOfTime
        self.rates.observe(predicted, self.budget.now() - start)
        return trial

    def _store(self, kind: str, key: Any, record: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        self.cache.put(kind, key, record, tensors, spent=self.budget.spent(), stages=self.budget.stages)


def _record(trial: Trial) -> dict[str, Any]:
    last = trial.accuracy_last
    return {
        "status": trial.status, "reason": trial.reason, "epochs": trial.epochs, "curve": trial.curve,
        "method": trial.method_name, "method_options": trial.options, "best_epoch": trial.best_epoch,
        "validation_accuracy": last if math.isfinite(last) else None,
        "validation_loss": trial.curve[-1]["validation_loss"] if trial.curve else None,
        "seconds": trial.seconds, "rates": list(trial.rates), "peak_bytes": trial.peak_bytes,
        "trainable_parameters": trial.trainable_parameters, "stored_bytes": trial.stored_bytes,
        "digests": trial.digests,
    }  # fmt: skip
