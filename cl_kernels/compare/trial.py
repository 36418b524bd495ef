"""One training run of one arm on one subset, and all that the comparison needs to know of it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels import methods
from cl_kernels.compare._loop import PREDICT, Batch, Loop, Settings, Stopped, check_data, log_probabilities
from cl_kernels.compare.arms import Arm, arm_named
from cl_kernels.continual import seeds
from cl_kernels.errors import NonFiniteError
from cl_kernels.nn._backbone import digest_of, plain_state

__all__ = ["Trial", "train_trial"]


@dataclass
class Trial:
    """What one run gave.

    * status: "done"; "stopped" (`deadline` or `on_epoch` said so; `final` and `best` are None); "failed" (`reason`:
      a loss or logit was not finite).
    * curve: for each finished epoch {"epoch" (from 1), "train_loss", "validation_loss", "validation_accuracy", "lr"};
      None where there are no validation images; lr is the body's in the epoch's last step.
    * final, best: test log-probabilities [n, classes], float32, after the last epoch and after `best_epoch`, the one of
      the highest validation accuracy (of equals that of the lowest loss; None without validation images).
    * test_curve: epoch -> test log-probabilities, where they were asked for.
    * options: all of the method's, as `methods.create(trial.method_name, backbone, **options)` takes them.
    * rates: first, highest and last learning rate of the body, as they were used.
    * seconds: "total"; "train" and "evaluate"; "epoch", the median of training one; "to_best", until the best epoch.
    * peak_bytes: see `Footprint`; trainable_parameters; stored_bytes: of what a task adds to the backbone.
    * digests: sha256 of the "backbone" as given and "after" training, and of "trained", all that has trained.
    * method: the trained method, as after the last epoch.
    """

    arm: str
    method_name: str
    options: dict[str, Any]
    seed: int
    epochs: int
    status: str = "done"
    reason: str = ""
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    final: Tensor | None = None
    best: Tensor | None = None
    test_curve: dict[int, Tensor] = field(default_factory=dict)
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    trainable_parameters: int = 0
    stored_bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    method: methods.Method | None = None

    @property
    def accuracy_last(self) -> float:
        """Validation accuracy after the last epoch; -inf for a failed run, or without validation images."""
        return self._accuracy(len(self.curve))

    @property
    def accuracy_best(self) -> float:
        """Validation accuracy after the best epoch; -inf as for `accuracy_last`."""
        return self._accuracy(self.best_epoch or 0)

    def _accuracy(self, epoch: int) -> float:
        found = self.curve[epoch - 1]["validation_accuracy"] if 0 < epoch <= len(self.curve) else None
        return -math.inf if found is None or self.status == "failed" else float(found)


def train_trial(
    arm: Arm | str,
    options: dict[str, Any],
    backbone: nn.Module | Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    validation: Batch | None = None,
    test_images: Tensor | None = None,
    test_every: int = 0,
    augment: str = "none",
    deadline: Callable[[], bool] | None = None,
    on_epoch: Callable[[dict[str, Any]], bool | None] | None = None,
) -> Trial:
    """Train `arm` with `options` (of its grid) as one task of all `classes`; no test label comes near.

    images: float [N, C, H, W], normalised; an arm with `frozen_features` also takes features [N, D]. labels: int64 [N]
    in 0..classes - 1. `backbone` is copied, or made by a call. The learning rate follows its schedule step by step.
    `test_every`: also predict the test images after every so many epochs. `deadline()` is asked before each step and
    `on_epoch(row of the curve)` after each epoch; True ends the run.

    The same arguments give the same run to the bit on one machine, and arms with one seed see the same batches.
    Images of frozen arms are read once. Patches are embedded anew in every step of the others, which is 1 % of a step
    of VPT-shallow (0.3 of 30 ms, embedded backbone, 32 images on one core), so there is nothing to cache.
    Global random states are put back. A loss that is not finite fails the trial and raises nothing. Raises `ValueError`
    for options, shapes and numbers that do not fit. Cost: forward and backward passes of `epochs` x N images.
    """
    chosen = arm_named(arm)
    settings = Settings(classes, epochs, batch_size, seed, augment, deadline)
    check_data((images, labels), validation, test_images, settings, chosen.frozen_features)
    chosen.check(options)
    trial = Trial(chosen.name, chosen.method, chosen.method_options(options), seed, epochs)
    started = time.perf_counter()
    model: Any = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone()
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
    device, trial.digests["backbone"] = next(model.parameters()).device, digest_of(plain_state(model))
    with seeds.seeded(seed, device, None):
        if chosen.first is not None:
            before = arm_named(chosen.first)
            first = Trial(before.name, before.method, before.method_options(options.get("first", {})), seed, epochs)
            _Run(first, model, (images, labels), settings).execute()
            trial.status, trial.reason = first.status, first.reason
        if trial.status == "done":
            run = _Run(trial, model, (images, labels), settings)
            run.execute(validation, test_images, test_every, on_epoch)
            if chosen.first is not None:  # no other task has this backbone
                trial.stored_bytes += run.fixed_bytes()
    trial.seconds["total"] = time.perf_counter() - started
    return trial


class _Run:
    """One arm's training, written into its trial as it goes."""

    def __init__(self, trial: Trial, model: nn.Module, data: Batch, settings: Settings) -> None:
        self.trial, self.device = trial, next(model.parameters()).device
        method = methods.create(trial.method_name, model, **trial.options)
        if method.frozen and data[0].ndim == 4 and settings.augment == "none":
            data = (self._features(method, data[0]), data[1])
        self.method = trial.method = method
        self.loop = Loop(method, data, settings)
        self._best: dict[str, Tensor] = {}
        self._spent = 0.0  # on looking at validation and test images

    def execute(
        self,
        validation: Batch | None = None,
        test_images: Tensor | None = None,
        test_every: int = 0,
        on_epoch: Callable[[dict[str, Any]], bool | None] | None = None,
    ) -> None:
        """Train to the end, unless it is stopped or fails; then predict the test images."""
        trial, started = self.trial, time.perf_counter()
        if self.method.frozen:
            test_images = None if test_images is None else self._features(self.method, test_images)
            validation = None if validation is None else (self._features(self.method, validation[0]), validation[1])
        try:
            self.loop.begin()
            trial.trainable_parameters = sum(value.numel() for _, value in self._trained())
            for number in range(trial.epochs):
                row = self._epoch(number, validation)
                if test_images is not None and test_every and (number + 1) % test_every == 0:
                    trial.test_curve[number + 1] = self._predict(test_images)
                if trial.best_epoch == number + 1:
                    trial.seconds["to_best"] = time.perf_counter() - started
                if on_epoch is not None and on_epoch(dict(row)):
                    raise Stopped
            self._finish(test_images)
        except Stopped:
            trial.status = "stopped"
        except NonFiniteError as error:
            trial.status, trial.reason = "failed", str(error)
        seconds, rates = self.loop.seconds, self.loop.rates
        trial.seconds |= {"train": sum(seconds), "evaluate": self._spent}
        trial.seconds["epoch"] = statistics.median(seconds) if seconds else 0.0
        trial.rates = (rates[0], max(rates), rates[-1]) if rates else (0.0, 0.0, 0.0)

    def _epoch(self, number: int, validation: Batch | None) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": number + 1, "train_loss": self.loop.epoch(number)}
        row |= {"validation_loss": None, "validation_accuracy": None, "lr": self.loop.rates[-1]}
        if validation is not None:
            told, labels = self._predict(validation[0]), validation[1].cpu()
            row["validation_loss"] = float(F.nll_loss(told, labels))
            row["validation_accuracy"] = float((told.argmax(dim=1) == labels).float().mean())
        curve = self.trial.curve
        curve.append(row)
        if validation is not None and all(_rank(row) > _rank(other) for other in curve[:-1]):
            self.trial.best_epoch = number + 1
            self._best = {name: value.detach().clone() for name, value in self._trained()}
        return row

    def _finish(self, test_images: Tensor | None) -> None:
        """Predictions after the last and after the best epoch, sizes and digests."""
        trial = self.trial
        footprint, optimizer = self.loop.footprint, self.method.optimizer
        trial.peak_bytes = footprint.peak(optimizer) if footprint is not None else 0
        trained = self._trained()
        trial.stored_bytes = sum(value.numel() * value.element_size() for _, value in trained)
        trial.digests |= {"after": digest_of(plain_state(self.method.backbone)), "trained": digest_of(dict(trained))}
        if test_images is not None:
            trial.final = trial.best = self._predict(test_images)
            if trial.best_epoch not in (None, trial.epochs):
                with self._at_best():
                    trial.best = self._predict(test_images)
        self.loop.end()
        for _, value in trained:
            value.grad = None

    @contextmanager
    def _at_best(self) -> Iterator[None]:
        """The method as it was after the best epoch."""
        last = {name: value.detach().clone() for name, value in self._trained()}
        try:
            self._copy(self._best)
            yield
        finally:
            self._copy(last)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, value in self._trained():
            value.copy_(values[name])

    def fixed_bytes(self) -> int:
        """Bytes of the backbone's weights that this arm does not train."""
        mine = {id(value) for _, value in self._trained()}
        fixed = [value for value in self.method.backbone.parameters() if id(value) not in mine]
        return sum(value.numel() * value.element_size() for value in fixed)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return self.method.trainable_parameters()

    def _predict(self, images: Tensor) -> Tensor:
        start = time.perf_counter()
        found = log_probabilities(self.method, images, self.device)
        self._spent += time.perf_counter() - start
        return found

    @torch.no_grad()
    def _features(self, method: methods.Method, images: Tensor) -> Tensor:
        parts = [method.features(part.to(self.device)) for part in images.split(PREDICT)]
        return torch.cat(parts)


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    """Higher is better: accuracy, then a lower loss."""
    return row["validation_accuracy"], -row["validation_loss"]
