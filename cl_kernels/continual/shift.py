"""Corrupted test images beside clean ones: what a finished run keeps out of distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.continual import transforms
from cl_kernels.continual.evaluate import evaluate
from cl_kernels.continual.feed import Feed, Segment
from cl_kernels.continual.session import Session
from cl_kernels.data import corruptions
from cl_kernels.data.preprocess import cover

__all__ = ["accuracies", "check", "left", "summary"]


def check() -> None:
    """Raise what would stop the evaluation, before anything is trained: `ImportError` where Pillow is missing."""
    for name in corruptions.names():
        corruptions.corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), name, 1)


def left(done: Mapping[str, Sequence[float]]) -> list[str]:
    """The families that are not in `done`, in their order."""
    return [name for name in corruptions.names() if name not in done]


def accuracies(session: Session, name: str) -> list[float]:
    """Mean over the tasks of the accuracy on their test images under the corruption `name`, at each severity.

    Argmax over every class seen, as in the last row of the accuracy matrix. The images are corrupted in their task's
    domain, at the size that the backbone takes, all runs and seeds the same. Cost: five evaluations of all test images,
    and `data.corruptions` says what making them costs.
    """
    method, found = session.method, []
    for severity in corruptions.SEVERITIES:
        scores = []
        for task in session.tasks:
            method.assume_task(task.index)
            feed = _feed(session, task.index, name, severity)
            scores.append(evaluate(method, feed, task.classes, session.config.eval_batch_size).accuracy)
        found.append(sum(scores) / len(scores))
    method.assume_task(None)
    return found


def summary(found: Mapping[str, Sequence[float]], clean: float) -> dict[str, Any]:
    """What results.json says, from `accuracies` of every family and the accuracy on clean images."""
    families = {name: list(found[name]) for name in corruptions.names()}
    mean = _mean([_mean(values) for values in families.values()])
    return {
        "clean": clean,
        "mean": mean,
        "relative": mean / clean if clean > 0 else None,
        "severities": [_mean(values) for values in zip(*families.values(), strict=True)],
        "groups": {
            kind: _mean([_mean(families[name]) for name in group]) for kind, group in corruptions.GROUPS.items()
        },
        "families": families,
    }


def _feed(session: Session, index: int, name: str, severity: int) -> Feed:
    task = session.tasks[index]
    domain = transforms.get(task.domain)

    def worsened(images: Tensor) -> Tensor:
        return corruptions.corrupt(cover(domain(images), session.preprocess.size), name, severity)

    return Feed(session.test, [Segment(task.test, worsened)], session.preprocess, cache=0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
