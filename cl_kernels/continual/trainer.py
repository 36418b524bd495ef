"""The loop: tasks, epochs, steps; evaluation after each task; checkpoints from which it goes on exactly."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_kernels import data as image_data
from cl_kernels.continual import checkpoint, seeds, shift
from cl_kernels.continual.claim import CHECKPOINT, claimed
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.deployed import save_model
from cl_kernels.continual.environment import pick_device
from cl_kernels.continual.evaluate import evaluate, feature_drift
from cl_kernels.continual.feed import Feed, augment, held_out
from cl_kernels.continual.keeper import Keeper, Position
from cl_kernels.continual.latency import latency
from cl_kernels.continual.log import Log, Progress
from cl_kernels.continual.record import results
from cl_kernels.continual.session import Session, open_session
from cl_kernels.continual.stopping import RunStopped, on_sigterm
from cl_kernels.errors import NonFiniteError
from cl_kernels.methods import Method

__all__ = ["RunStopped", "run"]

logger = logging.getLogger("cl_kernels")

CHECK_EVERY = 50  # steps between looks at the loss on CUDA, where each look waits for the device


@dataclass(frozen=True)
class _View:
    """A task as a method sees it."""

    index: int
    classes: tuple[int, ...]
    epochs: int
    last: bool
    feed: Feed
    batch_size: int
    held: Feed | None = None  # in random order
    held_batch_size: int = 1

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.feed.batches(self.batch_size)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(()) if self.held is None else self.held.batches(self.held_batch_size)


def run(
    config: RunConfig,
    *,
    data: image_data.ImageData | None = None,
    backbone: image_data.Backbone | None = None,
) -> dict[str, Any]:
    """Train and evaluate one method on one stream; return (and write) the results that `RunConfig` documents.

    With `config.out`: results.json, metrics.jsonl, the method's subspace.safetensors, with a teacher
    student.safetensors (see `load_model`), and checkpoints/last.safetensors after every task and as often as asked
    within one. `config.resume` goes on from it, bit for bit on the same machine.
    `data` and `backbone` replace what the configuration names (it must still name them). Global random states and
    thread counts are put back.

    Raises `ValueError` for names and values that do not fit, `OSError` when `out` cannot be written (before training
    starts, or while saving: the previous checkpoint stays), `CheckpointError` for a checkpoint that is damaged or of
    another run, `FileExistsError` when `out` holds a run and neither `resume` nor `overwrite` is set or when another
    process writes to it, `NonFiniteError` when a loss or parameter is NaN or infinite. SIGTERM finishes the step,
    saves, and raises `RunStopped` (exit code 0)."""
    if config.eval_shift:
        shift.check()
    out = None if config.out is None else Path(config.out)
    started = time.perf_counter()
    held = nullcontext() if out is None else claimed(out, resume=config.resume, overwrite=config.overwrite)
    with held, seeds.seeded(config.seed, pick_device(config.device), config.threads, strict=config.strict):
        trainer = _Trainer(open_session(config, data, backbone), out, started)
        try:
            with on_sigterm(trainer.stop):
                return trainer.execute()
        finally:
            trainer.log.close()


class _Trainer:
    def __init__(self, session: Session, out: Path | None, started: float) -> None:
        self.session, self.config, self.method, self.out = session, session.config, session.method, out
        self.stop = threading.Event()
        tensorboard = out / "tensorboard" if out is not None and self.config.tensorboard else None
        self.log = Log(None if out is None else out / "metrics.jsonl", tensorboard)
        self.keeper = Keeper(session, None if out is None else out / CHECKPOINT, self.log, started)
        self._tests: dict[int, Feed] = {}

    def execute(self) -> dict[str, Any]:
        if not (self.config.resume and self.keeper.restore()):
            self.log.cut(0)
        state = self.keeper.state
        done = state.steps + len(state.record.shift)
        with Progress(self.config.method, self._total_steps(), done) as self.progress:
            for index in range(state.position.task, len(self.session.tasks)):
                self._task(index)
            if self.config.eval_shift:
                self._evaluate_shift()
        if self.method.teacher is not None:
            self._deploy(self.method.teacher)
        self.keeper.lap()
        found = results(state.record, self.session)
        if self.out is not None:
            store = getattr(self.method, "store", None)
            if store is not None:
                store.save(self.out / "subspace.safetensors")
            checkpoint.write_atomically(self.out / "results.json", json.dumps(found, indent=1).encode())
        return found

    def _task(self, index: int) -> None:
        task, config, method, state = self.session.tasks[index], self.config, self.method, self.keeper.state
        feed, held = self.session.training(index), None
        if method.held_out:
            held, feed = (feed.subset(part) for part in self._parted(feed.labels.cpu(), index))
        if method.frozen and config.augment == "none":
            feed = feed.mapped(method.features, config.eval_batch_size)
        view = _View(
            index, task.classes, self.session.epochs, task.last, feed, config.statistics_batch, held, config.batch_size
        )
        if state.open:
            method.resume_task(view)
        else:
            method.begin_task(view)
            state.open = True
            state.record.trainable.append(_count(method))
            if method.teacher is not None:
                state.record.teacher_trainable.append(_count(method.teacher))
            state.record.loss.append([])
            state.record.train_seconds.append(0.0)
        phase, epochs = -1, self.session.epochs * len(method.phases)
        while method.optimizer is not None and state.position.epoch < epochs:
            if phase != state.position.epoch // self.session.epochs:
                phase = state.position.epoch // self.session.epochs
                phase_feed = self._begin_phase(phase, feed)
            self._epoch(phase_feed)
        start = time.perf_counter()
        try:
            method.end_task(view, view.batches())
        except NonFiniteError as error:  # it knows the layer and not how far the run has come
            raise NonFiniteError(f"{error}; {self.keeper.at_the_end(index)}") from error
        state.open = False
        state.record.end_seconds.append(time.perf_counter() - start)
        state.record.subspace.append(method.subspace())
        state.record.anchoring.append(method.anchoring())
        state.record.prompt_usage.append(method.prompt_usage())
        self._evaluate(index)
        state.position = Position(index + 1)
        self.keeper.save()
        self._heed_stop()

    @torch.no_grad()
    def _deploy(self, teacher: Method) -> None:
        """Write the student as one file, and measure both models on the first test images."""
        config, record = self.config, self.keeper.state.record
        images, _ = self._test(0).batch(torch.arange(min(len(self._test(0)), config.eval_batch_size)))
        for name, model in (("teacher", teacher), ("student", self.method)):
            record.latency[name] = latency(model.predict, images)
        if self.out is not None:
            save_model(
                self.out / "student.safetensors", self.method, name=config.method, options=config.options,
                backbone=config.backbone, preprocess=self.session.preprocess, class_names=self.session.class_names,
            )  # fmt: skip

    def _parted(self, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Positions that task `index` holds out of training, in random order, and those that it trains on."""
        order = seeds.permutation(len(labels), self.config.seed, "held out", index)
        return held_out(labels, self.method.held_out, order)

    def _begin_phase(self, phase: int, feed: Feed) -> Feed:
        """Enter a phase, unless a checkpoint stands inside it, and compute what the method needs of every image."""
        start, record = time.perf_counter(), self.keeper.state.record
        while len(record.phase_seconds) < len(record.train_seconds):  # a new task, or an older checkpoint
            record.phase_seconds.append([0.0])
        if self.method.phase != phase:
            self.method.begin_phase(phase)
            record.phase_seconds[-1].append(0.0)
        if self.config.augment == "none" and not self.method.frozen:
            with self._autocast():
                feed = feed.with_facts(self.method.per_image, self.config.eval_batch_size)
        self._spent(start)
        return feed

    def _spent(self, start: float) -> None:
        seconds, record = time.perf_counter() - start, self.keeper.state.record
        record.train_seconds[-1] += seconds
        record.phase_seconds[-1][-1] += seconds

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.session.precision != torch.float32
        return torch.autocast(self.session.device.type, self.session.precision) if half else nullcontext()

    def _epoch(self, feed: Feed) -> None:
        start, state = time.perf_counter(), self.keeper.state
        place, record = state.position, state.record
        batches = seeds.permutation(len(feed), self.config.seed, place.task, place.epoch).split(self.config.batch_size)
        if state.losses is None:
            state.losses = torch.zeros(len(batches), device=self.session.device)
        look = 1 if self.session.device.type == "cpu" else CHECK_EVERY
        while place.step < len(batches):
            state.losses[place.step] = self._step(feed, batches[place.step], place)
            place.step += 1
            state.steps += 1
            if place.step % look == 0 or place.step == len(batches):
                self.keeper.check_losses()
            self.progress.advance(f"{self.config.method}: task {place.task + 1}, epoch {place.epoch + 1}")
            if place.step < len(batches) and (self.keeper.due() or self.stop.is_set()):
                self._spent(start)
                self.keeper.save()
                self._heed_stop()
                start = time.perf_counter()
        mean = float(state.losses.double().mean())
        record.loss[-1].append(mean)
        scheduler = self.method.scheduler
        rate = float(scheduler.get_last_lr()[0]) if scheduler is not None else 0.0
        self.log.event("epoch", state.steps, task=place.task, epoch=place.epoch, loss=mean, lr=rate)
        if scheduler is not None:
            scheduler.step()
        state.losses, state.position = None, Position(place.task, place.epoch + 1)
        self._spent(start)

    def _step(self, feed: Feed, positions: Tensor, place: Position) -> Tensor:
        optimizer, scaler = self.method.optimizer, self.keeper.scaler
        if optimizer is None:
            raise RuntimeError(f"{self.config.method}: the optimizer disappeared inside a task")
        images, labels = feed.batch(positions)
        if images.ndim == 4:
            images = augment(images, self.config.augment, self.config.seed, place.task, place.epoch, place.step)
        optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.method.loss((images, labels), *feed.facts(positions))
        if scaler is None:
            torch.autograd.backward(loss)
            optimizer.step()
        else:
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    def _evaluate(self, index: int) -> None:
        start, state = time.perf_counter(), self.keeper.state
        rows: dict[str, list[float]] = {"accuracy": [], "task_accuracy": [], "relative": [], "cosine": []}
        for old in range(index + 1):
            classes = self.session.tasks[old].classes
            self.method.assume_task(old)
            score = evaluate(self.method, self._test(old), classes, self.config.eval_batch_size)
            relative, cosine = feature_drift(score.features, state.references.setdefault(old, score.features))
            for name, value in zip(rows, (score.accuracy, score.task_accuracy, relative, cosine), strict=True):
                rows[name].append(value)
        self.method.assume_task(None)
        teacher = self.method.teacher
        if teacher is not None:
            seen = [(self._test(old), self.session.tasks[old].classes) for old in range(index + 1)]
            scores = [evaluate(teacher, feed, classes, self.config.eval_batch_size).accuracy for feed, classes in seen]
            state.record.teacher_accuracy.append(scores)
        state.record.protocol = self.method.protocol
        for name, row in rows.items():
            getattr(state.record, name).append(row)
        state.record.evaluate_seconds.append(time.perf_counter() - start)
        mean = sum(rows["accuracy"]) / len(rows["accuracy"])
        self.log.event("task", state.steps, task=index, average_accuracy=mean, **rows)

    def _evaluate_shift(self) -> None:
        """The last model on corrupted test images; a checkpoint keeps the families that are finished."""
        state = self.keeper.state
        for name in shift.left(state.record.shift):
            start = time.perf_counter()
            state.record.shift[name] = found = shift.accuracies(self.session, name)
            state.record.shift_seconds += time.perf_counter() - start
            self.log.event("shift", state.steps, family=name, accuracy=found)
            self.progress.advance(f"{self.config.method}: {name}")
            if self.keeper.due() or self.stop.is_set():
                self.keeper.save()
                self._heed_stop()

    def _test(self, index: int) -> Feed:
        if index not in self._tests:
            feed = self.session.testing(index)
            if self.method.frozen:
                feed = feed.mapped(self.method.features, self.config.eval_batch_size)
            self._tests[index] = feed
        return self._tests[index]

    def _heed_stop(self) -> None:
        if self.stop.is_set():
            message = f"stopped by SIGTERM; {self.keeper.last_good()}; resume continues from there"
            logger.info(message)
            raise RunStopped(message)

    def _total_steps(self) -> int:
        tasks, total = self.session.tasks, 0
        for index in range(len(tasks)):
            first = 0 if self.method.scope == "seen" else index
            images = sum(len(task.train) for task in tasks[first : index + 1])
            if self.method.held_out:
                images = len(self._parted(self.session.train.labels[tasks[index].train], index)[1])
            total += -(-images // self.config.batch_size) * self.session.epochs * len(self.method.phases)
        return total + (len(shift.left({})) if self.config.eval_shift else 0)


def _count(method: Method) -> int:
    return sum(parameter.numel() for _, parameter in method.trainable_parameters())
