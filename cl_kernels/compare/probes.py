"""What the frozen features say before anything is trained: probes by cross-validation inside the training set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.compare._classify import accuracy, best_logistic, fold_numbers, splits, stratified_sample
from cl_kernels.compare._logme import logme
from cl_kernels.compare.features import Features

__all__ = ["class_mean", "knn", "linear_probe", "logme", "probes"]

LIMIT = 1000  # 2,640 groceries of 81 classes took 32 s with 2000 on a busy core, digits 7 s
FOLDS = 5
CURVE_FOLDS = 2  # of the five: the curve compares layers on the same images, so it needs fewer
NEIGHBOURS = (5, 20)
Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]


def probes(
    features: Features,
    labels: Tensor,
    *,
    seed: int = 0,
    limit: int = LIMIT,
    folds: int = FOLDS,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Linear probe, k nearest neighbours, nearest class mean, LogME and the probe curve over the layers.

    ``features``: frozen features of *training* images, ``labels`` [N] theirs. At most ``limit`` images are used, every
    class in its share. Every accuracy is out of fold: the images are dealt into ``folds`` parts by ``seed``, each part
    is predicted from the others, and the probe's penalty is chosen on a fifth of those others. No test image and no
    test label is read. ``should_stop`` is asked between layers; the layers left out are named in ``missing``.

    Returns ``n``, ``images``, ``classes``, ``folds``, ``seed``, ``majority`` (share of the commonest class: what a
    constant answer reaches), ``feature`` ("cls" or "mean"), ``linear`` (accuracy, se, n, strengths by fold), ``knn``
    (by k), ``class_mean``, ``logme`` (value, se by jackknife over the folds), ``layers`` [{layer, accuracy, se, n}] and
    ``missing``. Raises `ValueError` for fewer than two classes or images without labels.
    """
    _check(features.pooled, labels, folds)
    rows = stratified_sample(labels, limit, seed)
    chosen, known = features.rows(rows), labels[rows]
    numbers = fold_numbers(known, folds, seed)
    pooled = chosen.pooled
    curve, missing = [], []
    for layer, values in sorted(chosen.layers.items()):
        if should_stop is not None and should_stop():
            missing.append(f"the probe of layer {layer}: no time was left")
            continue
        right, _ = linear_probe(values, known, numbers, range(min(CURVE_FOLDS, folds)), seed, once=True)
        curve.append({"layer": layer, **accuracy(right)})
    right, strengths = linear_probe(pooled, known, numbers, range(folds), seed)
    neighbours = {str(k): accuracy(_out_of_fold(knn(k), pooled, known, numbers, range(folds))) for k in NEIGHBOURS}
    return {
        "n": len(known),
        "images": len(labels),
        "classes": len(torch.unique(labels)),
        "folds": folds,
        "seed": seed,
        "majority": float(torch.bincount(known).max()) / len(known),
        "feature": features.kind,
        "linear": {**accuracy(right), "strengths": strengths},
        "knn": neighbours,
        "class_mean": accuracy(_out_of_fold(class_mean, pooled, known, numbers, range(folds))),
        "logme": _logme_with_error(pooled, known, numbers, folds),
        "layers": curve,
        "missing": missing,
    }


def _check(features: Tensor, labels: Tensor, folds: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features and labels: expected [N, D] and [N], got {tuple(features.shape)}, {tuple(labels.shape)}"
        )
    classes = len(torch.unique(labels))
    if classes < 2:
        raise ValueError(f"labels: a probe needs at least two classes, got {classes}")
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds: expected 2..{len(labels)} (the number of images), got {folds}")


def linear_probe(
    features: Tensor, labels: Tensor, numbers: Tensor, folds: range, seed: int, *, once: bool = False
) -> tuple[Tensor, list[float]]:
    """Right answers of logistic regression on the images of ``folds``, and the penalty each of them chose.

    ``once``: the first fold chooses for all, on images that the others may test; a coarse choice that saves most of
    the time, good enough to compare layers.
    """
    right: list[Tensor] = []
    strengths: list[float] = []
    for train, test in splits(numbers, folds):
        given = strengths[0] if once and strengths else None
        model, strength = best_logistic(features[train], labels[train], seed, given)
        right.append(model.predict(features[test]) == labels[test])
        strengths.append(strength)
    return torch.cat(right), strengths


def knn(k: int) -> Predictor:
    """Majority among the k training images of highest cosine similarity; ties go to the class that is nearer in sum."""

    def predict(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        similar = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
        near = similar.topk(min(k, len(train)), dim=1)
        one = 1 + 1e-3 * near.values  # k <= 100 votes: the sum of similarities never outweighs a vote
        votes = torch.zeros(len(test), int(labels.max()) + 1, dtype=one.dtype)
        winner: Tensor = votes.scatter_add_(1, labels[near.indices], one).argmax(dim=1)
        return winner

    return predict


def class_mean(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The class whose mean direction is nearest in angle, as the method "class-mean" does by default."""
    values, local = torch.unique(labels, return_inverse=True)
    sums = torch.zeros(len(values), train.shape[1], dtype=torch.float64)
    sums.index_add_(0, local, F.normalize(train.double(), dim=1))
    chosen: Tensor = values[(test.double() @ F.normalize(sums, dim=1).T).argmax(dim=1)]
    return chosen


def _out_of_fold(predict: Predictor, features: Tensor, labels: Tensor, numbers: Tensor, folds: range) -> Tensor:
    return torch.cat(
        [predict(features[a], labels[a], features[b]) == labels[b] for a, b in splits(numbers, folds) if len(b)]
    )


def _logme_with_error(features: Tensor, labels: Tensor, numbers: Tensor, folds: int) -> Mapping[str, float]:
    """LogME of all images; the error is the jackknife's over the folds, each left out once."""
    left_out = torch.tensor([logme(features[rows], labels[rows]) for rows, _ in splits(numbers, range(folds))])
    spread = float((left_out - left_out.mean()).square().sum()) * (folds - 1) / folds
    return {"value": logme(features, labels), "se": math.sqrt(spread)}
