"""The loop: tasks, epochs, steps; evaluation after each task; checkpoints from which it goes on exactly."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cl_kernels import data as image_data
from cl_kernels.continual import checkpoint, seeds
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.environment import pick_device
from cl_kernels.continual.evaluate import evaluate, feature_drift
from cl_kernels.continual.feed import Feed, augment
from cl_kernels.continual.log import Log, Progress
from cl_kernels.continual.record import Record, results
from cl_kernels.continual.session import Session, open_session
from cl_kernels.errors import CheckpointError, NonFiniteError

__all__ = ["RunStopped", "run"]

logger = logging.getLogger("cl_kernels")

CHECK_EVERY = 50  # steps between looks at the loss on CUDA, where each look waits for the device


class RunStopped(SystemExit):
    """SIGTERM came; the step was finished and a checkpoint saved. Uncaught it ends the process with exit code 0."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass
class Position:
    """The next thing to do: `step` of `epoch` of `task`."""

    task: int = 0
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"task {self.task + 1}, epoch {self.epoch + 1}, step {self.step + 1}"


@dataclass(frozen=True)
class _View:
    """A task as a method sees it."""

    index: int
    classes: tuple[int, ...]
    epochs: int
    last: bool
    feed: Feed
    batch_size: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.feed.batches(self.batch_size)


def run(
    config: RunConfig,
    *,
    data: image_data.ImageData | None = None,
    backbone: image_data.Backbone | None = None,
) -> dict[str, Any]:
    """Train and evaluate one method on one stream; return (and write) the results that `RunConfig` documents.

    With `config.out`: results.json, metrics.jsonl and the method's subspace.safetensors, checkpoints/last.safetensors
    after every task and as often as asked within one. `config.resume` goes on from it, bit for bit on the same machine.
    `data` and `backbone` replace what the configuration names (it must still name them). Global random states and
    thread counts are put back.

    Raises `ValueError` for names and values that do not fit, `OSError` when `out` cannot be written (before training
    starts, or while saving: the previous checkpoint stays), `CheckpointError` for a checkpoint that is damaged or of
    another run, `FileExistsError` when `out` holds a run and neither `resume` nor `overwrite` is set, `NonFiniteError`
    when a loss or parameter is NaN or infinite. SIGTERM finishes the step, saves, and raises `RunStopped` (exit code
    0)."""
    out = None if config.out is None else Path(config.out)
    if out is not None:
        _claim(out, config)
    started = time.perf_counter()
    with seeds.seeded(config.seed, pick_device(config.device), config.threads):
        trainer = _Trainer(open_session(config, data, backbone), out, started)
        try:
            with _on_sigterm(trainer.stop):
                return trainer.execute()
        finally:
            trainer.log.close()


class _Trainer:
    def __init__(self, session: Session, out: Path | None, started: float) -> None:
        self.session, self.config, self.method = session, session.config, session.method
        self.position, self.record = Position(), Record()
        self.references: dict[int, Tensor] = {}
        self.losses: Tensor | None = None  # of the current epoch, on the device
        self.stop = threading.Event()
        self.path = None if out is None else out / "checkpoints" / "last.safetensors"
        self.results_path = None if out is None else out / "results.json"
        tensorboard = out / "tensorboard" if out is not None and self.config.tensorboard else None
        self.log = Log(None if out is None else out / "metrics.jsonl", tensorboard)
        half = session.precision == torch.float16
        self.scaler = torch.amp.GradScaler(session.device.type) if half else None
        self.clock = started
        self.saved_at, self.saved_steps, self.steps = time.monotonic(), 0, 0
        self.last_good: str | None = None
        self.open = False  # between begin_task and end_task
        self._tests: dict[int, Feed] = {}

    # The loop ------------------------------------------------------------------------------------------------------

    def execute(self) -> dict[str, Any]:
        if self.config.resume and self.path is not None and self.path.exists():
            self._restore(self.path)
        else:
            self.log.cut(0)
        with Progress(self.config.method, self._total_steps(), self._done_steps()) as self.progress:
            for index in range(self.position.task, len(self.session.tasks)):
                self._task(index)
        self.record.total_seconds += self._lap()
        found = results(self.record, self.session)
        if self.results_path is not None:
            store = getattr(self.method, "store", None)
            if store is not None:
                store.save(self.results_path.with_name("subspace.safetensors"))
            checkpoint.write_atomically(self.results_path, json.dumps(found, indent=1).encode())
        return found

    def _task(self, index: int) -> None:
        task, config, method = self.session.tasks[index], self.config, self.method
        feed = self.session.training(index)
        if method.frozen and config.augment == "none":
            feed = feed.mapped(method.features, config.eval_batch_size)
        view = _View(index, task.classes, self.session.epochs, task.last, feed, config.statistics_batch)
        if not self.open:
            method.begin_task(view)
            self.open = True
            self.record.trainable.append(sum(p.numel() for _, p in method.trainable_parameters()))
            self.record.loss.append([])
            self.record.train_seconds.append(0.0)
        while method.optimizer is not None and self.position.epoch < self.session.epochs:
            self._epoch(feed)
        start = time.perf_counter()
        method.end_task(view, view.batches())
        self.open = False
        self.record.end_seconds.append(time.perf_counter() - start)
        self.record.subspace.append(method.subspace())
        self._evaluate(index)
        self.position = Position(index + 1)
        self._save()
        self._heed_stop()

    def _epoch(self, feed: Feed) -> None:
        start, place = time.perf_counter(), self.position
        order = seeds.permutation(len(feed), self.config.seed, place.task, place.epoch)
        batches = order.split(self.config.batch_size)
        if self.losses is None:
            self.losses = torch.zeros(len(batches), device=self.session.device)
        look = 1 if self.session.device.type == "cpu" else CHECK_EVERY
        while place.step < len(batches):
            self._step(feed, batches[place.step], self.losses)
            place.step += 1
            self.steps += 1
            if place.step % look == 0 or place.step == len(batches):
                self._check_losses()
            self.progress.advance(f"{self.config.method}: task {place.task + 1}, epoch {place.epoch + 1}")
            if place.step < len(batches) and (self._due() or self.stop.is_set()):
                self._add_train_seconds(start)
                start = time.perf_counter()
                self._save()
                self._heed_stop()
        mean = float(self.losses.double().mean())
        self.record.loss[-1].append(mean)
        scheduler = self.method.scheduler
        rate = scheduler.get_last_lr()[0] if scheduler is not None else 0.0
        self.log.event("epoch", self.steps, task=place.task, epoch=place.epoch, loss=mean, lr=float(rate))
        if scheduler is not None:
            scheduler.step()
        self.losses, self.position = None, Position(place.task, place.epoch + 1)
        self._add_train_seconds(start)

    def _step(self, feed: Feed, positions: Tensor, losses: Tensor) -> None:
        place, optimizer = self.position, self.method.optimizer
        if optimizer is None:
            raise RuntimeError(f"{self.config.method}: the optimizer disappeared inside a task")
        images, labels = feed.batch(positions)
        if images.ndim == 4:
            images = augment(images, self.config.augment, self.config.seed, place.task, place.epoch, place.step)
        optimizer.zero_grad(set_to_none=True)
        half = self.session.precision != torch.float32
        with torch.autocast(self.session.device.type, self.session.precision) if half else nullcontext():
            loss = self.method.loss((images, labels))
        if self.scaler is None:
            torch.autograd.backward(loss)
            optimizer.step()
        else:
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.step(optimizer)
            self.scaler.update()
        losses[place.step] = loss.detach()

    def _evaluate(self, index: int) -> None:
        start = time.perf_counter()
        rows: dict[str, list[float]] = {"accuracy": [], "task_accuracy": [], "relative": [], "cosine": []}
        for old in range(index + 1):
            classes = self.session.tasks[old].classes
            score = evaluate(self.method, self._test(old), classes, self.config.eval_batch_size)
            reference = self.references.setdefault(old, score.features)
            relative, cosine = feature_drift(score.features, reference)
            for name, value in zip(rows, (score.accuracy, score.task_accuracy, relative, cosine), strict=True):
                rows[name].append(value)
        for name, row in rows.items():
            getattr(self.record, name).append(row)
        self.record.evaluate_seconds.append(time.perf_counter() - start)
        mean = sum(rows["accuracy"]) / len(rows["accuracy"])
        self.log.event("task", self.steps, task=index, average_accuracy=mean, **rows)

    def _test(self, index: int) -> Feed:
        if index not in self._tests:
            feed = self.session.testing(index)
            if self.method.frozen:
                feed = feed.mapped(self.method.features, self.config.eval_batch_size)
            self._tests[index] = feed
        return self._tests[index]

    # Safety --------------------------------------------------------------------------------------------------------

    def _check_losses(self) -> None:
        """One synchronisation. The first step whose loss is not finite is named."""
        if self.losses is None:
            return
        bad = (~torch.isfinite(self.losses)).nonzero().flatten()
        if len(bad):
            place = Position(self.position.task, self.position.epoch, int(bad[0]))
            value = float(self.losses[place.step])
            raise NonFiniteError(f"loss is {value} at {place} of {self._of_tasks()}; {self._last_good()}")

    def _check_parameters(self) -> None:
        for name, parameter in self.method.trainable_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"parameter {name} is not finite before {self.position} of {self._of_tasks()}; {self._last_good()}"
                )

    def _of_tasks(self) -> str:
        return f"{len(self.session.tasks)} tasks ({self.config.method})"

    def _last_good(self) -> str:
        if self.path is None or self.last_good is None:
            return "no checkpoint was saved"
        return f"last good checkpoint: {self.path} (next: {self.last_good})"

    def _heed_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped(f"stopped by SIGTERM; {self._last_good()}; resume continues from there")

    def _due(self) -> bool:
        config = self.config
        if self.path is None:
            return False
        if config.checkpoint_steps is not None and self.steps - self.saved_steps >= config.checkpoint_steps:
            return True
        return time.monotonic() - self.saved_at >= 60 * config.checkpoint_minutes

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.path is None:
            return
        self._check_losses()
        self._check_parameters()
        start = time.perf_counter()
        self.record.total_seconds += self._lap()
        tree = {
            "position": asdict(self.position),
            "open": self.open,
            "steps": self.steps,
            "method": self.method.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "losses": self.losses,
            "references": self.references,
            "record": self.record.as_dict(),
            "random": seeds.get_state(self.session.device),
            "log": self.log.size(),
        }
        try:
            checkpoint.save_atomically(self.path, tree, fingerprint=self.session.fingerprint)
        except OSError as error:
            raise OSError(
                error.errno, f"checkpoint not saved ({error.strerror}) before {self.position}; {self._last_good()}"
            ) from error
        self.last_good = str(self.position)
        self.saved_at, self.saved_steps = time.monotonic(), self.steps
        self.record.checkpoint_seconds += time.perf_counter() - start

    def _restore(self, path: Path) -> None:
        tree = checkpoint.load(path, fingerprint=self.session.fingerprint, device=self.session.device)
        try:
            self.position, self.record = Position(**tree["position"]), Record(**tree["record"])
            self.open, self.steps, self.losses = tree["open"], tree["steps"], tree["losses"]
            self.references = tree["references"]
            self.method.load_state_dict(tree["method"])
            if self.scaler is not None:
                self.scaler.load_state_dict(tree["scaler"])
            seeds.set_state(tree["random"], self.session.device)
            self.log.cut(tree["log"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: does not fit this run ({type(error).__name__}: {error})") from error
        self.saved_steps, self.last_good = self.steps, str(self.position)

    # Counting ------------------------------------------------------------------------------------------------------

    def _lap(self) -> float:
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        return passed

    def _add_train_seconds(self, start: float) -> None:
        self.record.train_seconds[-1] += time.perf_counter() - start

    def _steps_of(self, index: int) -> int:
        first = 0 if self.method.scope == "seen" else index
        images = sum(len(task.train) for task in self.session.tasks[first : index + 1])
        return -(-images // self.config.batch_size) * self.session.epochs

    def _total_steps(self) -> int:
        return sum(self._steps_of(index) for index in range(len(self.session.tasks)))

    def _done_steps(self) -> int:
        return self.steps


def _claim(out: Path, config: RunConfig) -> None:
    """Probe `out`, and refuse to write over a run that nobody asked to replace."""
    last = out / "checkpoints" / "last.safetensors"
    if last.exists() and not (config.resume or config.overwrite):
        raise FileExistsError(f"out: {out} holds a run already; resume it, overwrite it, or choose another directory")
    checkpoint.probe(out)
    checkpoint.probe(out / "checkpoints")
    if config.overwrite and not config.resume:
        for path in (last, out / "results.json", out / "metrics.jsonl"):
            path.unlink(missing_ok=True)


@contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM; only the main thread may install handlers, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        logger.warning("SIGTERM: finishing the step, then saving")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
