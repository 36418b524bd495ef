"""What a method learns about a task, and what it remembers of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Batch", "Batches", "Task", "TaskRecord"]

Batch = tuple[Tensor, Tensor]
"""(images, labels): normalised images [B, C, H, W], or features [B, D] for a method whose features never change; int64
labels [B] in the numbering of the data set."""

Batches = Iterable[Batch]


class Task(Protocol):
    """What `Method.begin_task` gets. `continual` builds these; anything with the same attributes will do."""

    @property
    def index(self) -> int:
        """0 for the first task."""

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels of its images. New ones get a new head; when all are known already, their head goes on
        learning."""

    @property
    def epochs(self) -> int:
        """Epochs it will be trained for; learning rate schedules need it."""

    @property
    def last(self) -> bool:
        """True when no task follows, so that nothing need be remembered for one."""

    def batches(self) -> Batches:
        """A fresh pass over the images it will be trained on, in order and without augmentation."""

    def held_out(self) -> Batches:
        """A fresh pass over the images kept from training, the same batches every time, each of all classes; only a
        method whose `held_out` is not 0 looks at them."""


@dataclass(frozen=True)
class TaskRecord:
    """The part of a task that goes into checkpoints."""

    index: int
    classes: tuple[int, ...]
    epochs: int
    last: bool

    @classmethod
    def of(cls, task: Task) -> TaskRecord:
        """Copy the attributes, checked."""
        classes = tuple(int(label) for label in task.classes)
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"task.classes: expected distinct labels, at least one, got {classes}")
        return cls(int(task.index), classes, int(task.epochs), bool(task.last))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskRecord:
        """The inverse of `as_dict`."""
        return cls(values["index"], tuple(values["classes"]), values["epochs"], values["last"])
