"""Evaluation of all tasks seen: one forward pass over each test set gives both accuracies and the drift of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.continual.feed import Feed
from cl_kernels.methods import Method

__all__ = ["Score", "evaluate", "feature_drift"]

DRIFT_IMAGES = 512  # of a task's test images whose features are kept


@dataclass(frozen=True)
class Score:
    """What one pass over one task's test images gives."""

    accuracy: float
    task_accuracy: float
    features: Tensor


@torch.no_grad()
def evaluate(method: Method, feed: Feed, classes: tuple[int, ...], batch_size: int) -> Score:
    """Accuracy with all seen classes as candidates, accuracy with `classes` as the only ones, and kept features [n, D].

    One host synchronisation.
    """
    columns = torch.tensor(method.classes, device=feed.labels.device)
    own = torch.isin(columns, torch.tensor(classes, device=columns.device))
    hits = torch.zeros(2, dtype=torch.int64, device=columns.device)
    kept, stride = [], max(1, -(-len(feed) // DRIFT_IMAGES))
    start = 0
    for images, labels in feed.batches(batch_size):
        features = method.features(images)
        logits = method.logits(features)
        inside = logits.masked_fill(~own, -torch.inf)
        hits[0] += (columns[logits.argmax(dim=1)] == labels).sum()
        hits[1] += (columns[inside.argmax(dim=1)] == labels).sum()
        kept.append(features[(-start) % stride :: stride])
        start += len(labels)
    right, right_inside = (int(count) for count in hits)
    return Score(right / len(feed), right_inside / len(feed), torch.cat(kept))


def feature_drift(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Mean over images of `|f - f0| / |f0|` and of `1 - cos(f, f0)`; exactly 0 where nothing moved."""
    a, b = now.double(), before.double()
    relative = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)
    # 1 - cos as half the squared distance of unit vectors: no cancellation when the angle is small
    cosine = 0.5 * (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1)
    return float(relative.mean()), float(cosine.mean())
