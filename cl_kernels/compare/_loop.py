"""The training loop of one trial: one task of all classes, in an order that depends on the seed alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.compare._footprint import Footprint
from cl_kernels.continual import seeds
from cl_kernels.continual.feed import augment
from cl_kernels.errors import NonFiniteError
from cl_kernels.methods import Method

__all__ = ["PREDICT", "Batch", "Loop", "Settings", "Stopped", "check_data", "log_probabilities"]

Batch = tuple[Tensor, Tensor]
PREDICT = 250  # images of a batch without gradient


class Stopped(Exception):
    """The deadline has passed."""


@dataclass(frozen=True)
class _Task:
    """All classes as one task. Its epochs are the steps, so that the learning rate's schedule moves with each."""

    classes: tuple[int, ...]
    epochs: int
    data: Batch
    device: torch.device
    index: int = 0
    last: bool = True

    def batches(self) -> Iterator[Batch]:
        images, labels = self.data
        for start in range(0, len(labels), PREDICT):
            part = slice(start, start + PREDICT)
            yield images[part].to(self.device), labels[part].to(self.device)

    def held_out(self) -> Iterator[Batch]:
        return iter(())


@dataclass(frozen=True)
class Settings:
    """What arms of one comparison share."""

    classes: int
    epochs: int
    batch_size: int
    seed: int
    augment: str = "none"
    deadline: Callable[[], bool] | None = None


def check_data(
    training: Batch, validation: Batch | None, test_images: Tensor | None, settings: Settings, features_too: bool
) -> None:
    """Raise `ValueError` for numbers out of range, and for images and labels that do not fit each other."""
    s = settings
    for name, value, low in (("classes", s.classes, 2), ("epochs", s.epochs, 1), ("batch_size", s.batch_size, 1)):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    allowed = (2, 4) if features_too and s.augment == "none" else (4,)
    pairs = {"": training} | ({} if validation is None else {"validation ": validation})
    for what, (images, labels) in pairs.items():
        if images.ndim not in allowed or not images.is_floating_point() or not len(images):
            raise ValueError(f"{what}images: expected floats [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"{what}labels: expected int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= s.classes:
            raise ValueError(f"{what}labels: expected 0 to {s.classes - 1}, got {low} to {high}")
    wanted = tuple(training[0].shape[1:])
    if test_images is not None and test_images.shape[1:] != wanted:
        raise ValueError(f"test_images: expected the shape of images [N, {wanted}], got {tuple(test_images.shape)}")


@dataclass
class Loop:
    """Trains `method` on `data`. Raises `Stopped` before a step and `NonFiniteError` after one."""

    method: Method
    data: Batch
    settings: Settings
    rates: list[float] = field(default_factory=list)  # of each step
    seconds: list[float] = field(default_factory=list)  # of each epoch
    footprint: Footprint | None = None

    def begin(self) -> None:
        """Start the task: heads, optimizer, schedule."""
        steps = -(-len(self.data[1]) // self.settings.batch_size) * self.settings.epochs
        device = next(self.method.backbone.parameters()).device
        self._task = _Task(tuple(range(self.settings.classes)), steps, self.data, device)
        self.method.begin_task(self._task)

    def end(self) -> None:
        """Finish the task."""
        self.method.end_task(self._task, self._task.batches())

    def epoch(self, number: int) -> float:
        """Train epoch `number` (from 0); its mean loss."""
        start, images, labels, s = time.perf_counter(), *self.data, self.settings
        order = seeds.permutation(len(labels), s.seed, "order", number).split(s.batch_size)
        losses = torch.zeros(len(order), device=self._task.device)
        for step, rows in enumerate(order):
            if s.deadline is not None and s.deadline():
                raise Stopped
            some = images[rows].to(self._task.device)
            if some.ndim == 4:
                some = augment(some, s.augment, s.seed, number, step)
            losses[step] = self._step(some, labels[rows].to(self._task.device))
            if losses.device.type == "cpu":  # elsewhere each look waits for the device
                _finite(float(losses[step]), number)
        mean = float(losses.mean())
        _finite(mean, number)
        self.seconds.append(time.perf_counter() - start)
        return mean

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        optimizer, scheduler = self.method.optimizer, self.method.scheduler
        if optimizer is None or scheduler is None:
            raise RuntimeError(f"{self.method.name}: it has no optimizer inside a task")
        self.rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.zero_grad(set_to_none=True)
        if self.footprint is None:
            self.footprint = Footprint(self.method.modules(), images.device)
            with self.footprint.watching():
                loss = self.method.loss((images, labels))
        else:
            loss = self.method.loss((images, labels))
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        return loss.detach()


def _finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} in epoch {epoch + 1}")


@torch.no_grad()
def log_probabilities(method: Method, images: Tensor, device: torch.device) -> Tensor:
    """Log-probabilities [N, classes], float32 on the CPU. Raises `NonFiniteError`."""
    if not len(images):
        return torch.empty(0, len(method.classes))
    parts = [method.predict(part.to(device)).float().cpu() for part in images.split(PREDICT)]
    logits = torch.cat(parts)
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("a logit is not finite")
    return F.log_softmax(logits, dim=1)
