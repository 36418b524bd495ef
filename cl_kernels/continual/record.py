"""What a run has measured so far, and the results.json it becomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cl_kernels.continual import metrics, shift
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.environment import environment
from cl_kernels.continual.session import Session
from cl_kernels.methods import Method

__all__ = ["Record", "results"]

VERSION = 1


@dataclass
class Record:
    """Grows by one row per task; goes into every checkpoint."""

    accuracy: list[list[float]] = field(default_factory=list)
    task_accuracy: list[list[float]] = field(default_factory=list)
    relative: list[list[float]] = field(default_factory=list)
    cosine: list[list[float]] = field(default_factory=list)
    loss: list[list[float]] = field(default_factory=list)
    subspace: list[dict[str, Any]] = field(default_factory=list)
    anchoring: list[dict[str, dict[str, float]]] = field(default_factory=list)
    prompt_usage: list[dict[str, list[float]]] = field(default_factory=list)
    trainable: list[int] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    phase_seconds: list[list[float]] = field(default_factory=list)
    end_seconds: list[float] = field(default_factory=list)
    evaluate_seconds: list[float] = field(default_factory=list)
    teacher_accuracy: list[list[float]] = field(default_factory=list)
    teacher_trainable: list[int] = field(default_factory=list)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    shift: dict[str, list[float]] = field(default_factory=dict)
    shift_seconds: float = 0.0
    protocol: str = ""
    checkpoint_seconds: float = 0.0
    total_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def results(record: Record, session: Session) -> dict[str, Any]:
    """The layout that `RunConfig` documents."""
    config, tasks = session.config, session.tasks
    sizes = [len(task.test) for task in tasks]
    return {
        "version": VERSION,
        "method": config.method,
        "data": config.data,
        "backbone": config.backbone,
        "stream": config.stream,
        "seed": config.seed,
        "config": config.as_json(),
        "fingerprint": session.fingerprint,
        "tasks": [
            {
                "name": task.name,
                "classes": list(task.classes),
                "class_names": [session.class_names[label] for label in task.classes],
                "domain": task.domain,
                "train": len(task.train),
                "test": len(task.test),
            }
            for task in tasks
        ],
        **_teacher_and_student(record, session),
        "protocol": record.protocol,
        "accuracy_matrix": _square(record.accuracy),
        "average_accuracy": metrics.average_accuracy(record.accuracy),
        "forgetting": metrics.forgetting(record.accuracy),
        "forgetting_variants": metrics.forgetting_variants(record.accuracy),
        "accuracy_after": metrics.accuracy_after(record.accuracy),
        "forgetting_after": metrics.forgetting_after(record.accuracy),
        "average_incremental_accuracy": _mean(metrics.accuracy_after(record.accuracy)),
        "repository": metrics.repository_metrics(record.accuracy, sizes),
        "task_incremental": _task_incremental(record, config),
        "feature_drift": {
            "relative": _square(record.relative),
            "cosine": _square(record.cosine),
            "final_relative": metrics.last_row_mean(record.relative),
            "final_cosine": metrics.last_row_mean(record.cosine),
        },
        "shift": _shift(record, config),
        "subspace": record.subspace,
        "anchoring": record.anchoring,
        "prompt_usage": record.prompt_usage,
        "loss": record.loss,
        "parameters": {"trainable": record.trainable, "total": session.parameters},
        "skipped_images": session.skipped,
        "seconds": {
            **session.seconds,
            "train": record.train_seconds,
            "end_task": record.end_seconds,
            "evaluate": record.evaluate_seconds,
            **({"phases": record.phase_seconds, "latency": record.latency} if session.config.teacher else {}),
            **({"shift": record.shift_seconds} if config.eval_shift else {}),
            "checkpoint": record.checkpoint_seconds,
            "total": record.total_seconds,
        },
        "environment": environment(session.device, session.precision),
    }


def _teacher_and_student(record: Record, session: Session) -> dict[str, Any]:
    method = session.method
    teacher = method.teacher
    if teacher is None:
        return {"teacher": None, "student": None}
    return {
        "teacher": {
            "backbone": session.config.teacher,
            "accuracy_matrix": _square(record.teacher_accuracy),
            "average_accuracy": metrics.average_accuracy(record.teacher_accuracy),
            "forgetting": metrics.forgetting(record.teacher_accuracy),
            **_size(teacher),
            "trainable": record.teacher_trainable,
        },
        "student": _size(method),
    }


def _size(method: Method) -> dict[str, int]:
    """What must be kept to predict: the backbone, and what was trained, with its buffers."""
    held = {id(value): value for part in method.modules() for value in (*part.parameters(), *part.buffers())}
    count = sum(value.numel() for value in held.values())
    return {"parameters": count, "bytes": sum(value.numel() * value.element_size() for value in held.values())}


def _task_incremental(record: Record, config: RunConfig) -> dict[str, Any] | None:
    if config.stream == "domain":
        return None  # every class is in every task: the same numbers
    return {
        "accuracy_matrix": _square(record.task_accuracy),
        "average_accuracy": metrics.average_accuracy(record.task_accuracy),
        "forgetting": metrics.forgetting(record.task_accuracy),
    }


def _shift(record: Record, config: RunConfig) -> dict[str, Any] | None:
    return shift.summary(record.shift, metrics.average_accuracy(record.accuracy)) if config.eval_shift else None


def _square(rows: list[list[float]]) -> list[list[float | None]]:
    return [[*row, *[None] * (len(rows) - len(row))] for row in rows]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
