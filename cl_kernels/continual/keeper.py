"""Where a run stands, and the checkpoint that holds it: saved when due, never with a number that is not finite."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_kernels.continual import checkpoint, seeds
from cl_kernels.continual.log import Log
from cl_kernels.continual.record import Record
from cl_kernels.continual.session import Session
from cl_kernels.errors import CheckpointError, NonFiniteError

__all__ = ["Keeper", "Position", "State"]


@dataclass
class Position:
    """The next thing to do: `step` of `epoch` of `task`, all from 0."""

    task: int = 0
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"task {self.task + 1}, epoch {self.epoch + 1}, step {self.step + 1}"


@dataclass
class State:
    """What changes while a run runs, besides the method and the random generators."""

    position: Position = field(default_factory=Position)
    record: Record = field(default_factory=Record)
    steps: int = 0
    open: bool = False  # between begin_task and end_task
    losses: Tensor | None = None  # of the current epoch, on the device
    references: dict[int, Tensor] = field(default_factory=dict)  # features of test images when their task ended


class Keeper:
    """Saves and restores a run; `path` None keeps nothing."""

    def __init__(self, session: Session, path: Path | None, log: Log, started: float) -> None:
        self._session, self._path, self._log, self._clock = session, path, log, started
        self.scaler = torch.amp.GradScaler(session.device.type) if session.precision == torch.float16 else None
        self.state = State()
        self._saved_at, self._saved_steps = time.monotonic(), 0
        self._last_good: str | None = None

    def due(self) -> bool:
        """Whether it is time for a checkpoint inside a task."""
        config = self._session.config
        if self._path is None:
            return False
        if config.checkpoint_steps is not None and self.state.steps - self._saved_steps >= config.checkpoint_steps:
            return True
        return time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes

    def last_good(self) -> str:
        """The last checkpoint and where it goes on, for messages."""
        if self._path is None or self._last_good is None:
            return "no checkpoint was saved"
        return f"last good checkpoint: {self._path} (next: {self._last_good})"

    def at_the_end(self, task: int) -> str:
        """Where a run stands after the last step of a task (from 0), for messages."""
        return f"at the end of task {task + 1} of {self._of_tasks()}; {self.last_good()}"

    def check_losses(self) -> None:
        """One synchronisation. Raises `NonFiniteError` naming the first step whose loss is not finite."""
        losses, place = self.state.losses, self.state.position
        if losses is None:
            return
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        if len(bad):
            where = Position(place.task, place.epoch, int(bad[0]))
            value = float(losses[where.step])
            raise NonFiniteError(f"loss is {value} at {where} of {self._of_tasks()}; {self.last_good()}")

    def lap(self) -> None:
        """Add the time since the last lap to the record."""
        now = time.perf_counter()
        self.state.record.total_seconds += now - self._clock
        self._clock = now

    def save(self) -> None:
        """Write the checkpoint. Raises `NonFiniteError` instead of saving NaN, and `OSError` with the old file in
        place."""
        if self._path is None:
            return
        self.check_losses()
        self._check_parameters()
        start, state = time.perf_counter(), self.state
        self.lap()
        tree = {
            "position": asdict(state.position),
            "record": state.record.as_dict(),
            "steps": state.steps,
            "open": state.open,
            "losses": state.losses,
            "references": state.references,
            "method": self._session.method.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": seeds.get_state(self._session.device),
            "log": self._log.size(),
        }
        try:
            checkpoint.save_atomically(self._path, tree, fingerprint=self._session.fingerprint)
        except OSError as error:
            why = f"checkpoint not saved ({error.strerror}) before {state.position}; {self.last_good()}"
            raise OSError(error.errno, why) from error
        self._last_good = str(state.position)
        self._saved_at, self._saved_steps = time.monotonic(), state.steps
        state.record.checkpoint_seconds += time.perf_counter() - start

    def restore(self) -> bool:
        """Go on from the checkpoint; False when there is none. Raises `CheckpointError` when it does not fit."""
        path, device = self._path, self._session.device
        if path is None or not path.exists():
            return False
        tree: dict[str, Any] = checkpoint.load(path, fingerprint=self._session.fingerprint, device=device)
        try:
            self.state = State(
                position=Position(**tree["position"]),
                record=Record(**tree["record"]),
                steps=tree["steps"],
                open=tree["open"],
                losses=tree["losses"],
                references=tree["references"],
            )
            self._session.method.load_state_dict(tree["method"])
            if self.scaler is not None:
                self.scaler.load_state_dict(tree["scaler"])
            seeds.set_state(tree["random"], device)
            self._log.cut(tree["log"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: does not fit this run ({type(error).__name__}: {error})") from error
        self._saved_steps, self._last_good = self.state.steps, str(self.state.position)
        return True

    def _check_parameters(self) -> None:
        method = self._session.method
        taught = [] if method.teacher is None else method.teacher.trainable_parameters()
        for name, parameter in [*method.trainable_parameters(), *((f"teacher.{name}", p) for name, p in taught)]:
            if not bool(torch.isfinite(parameter).all()):
                where = f"before {self.state.position} of {self._of_tasks()}"
                raise NonFiniteError(f"parameter {name} is not finite {where}; {self.last_good()}")

    def _of_tasks(self) -> str:
        return f"{len(self._session.tasks)} tasks ({self._session.config.method})"
