"""Small classifiers on fixed features: stratified folds, logistic regression, and accuracies with their error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "STRENGTHS",
    "LogisticRegression",
    "accuracy",
    "best_logistic",
    "fold_numbers",
    "splits",
    "stratified_sample",
]

STRENGTHS = (
    1.0,
    1e-1,
    1e-2,
    1e-3,
    1e-4,
)  # weight of |W|^2 / 2 beside the mean loss, strongest first: each warms the next
INNER_SHARE = 0.2  # of the training images that choose the strength


def stratified_sample(labels: Tensor, size: int, seed: int) -> Tensor:
    """Sorted numbers of ``size`` images in which every class keeps its share (largest remainders, at least one each
    where there is room); all of them where there are no more."""
    if len(labels) <= size:
        return torch.arange(len(labels))
    values, counts = torch.unique(labels, return_counts=True)
    exact = counts.double() * size / len(labels)
    take = exact.floor().long().clamp(min=1 if len(values) <= size else 0)
    order = (exact - exact.floor()).sort(descending=True, stable=True).indices.tolist()
    step = 1 if int(take.sum()) < size else -1
    position = 0
    while int(take.sum()) != size:  # over by the classes that rounded to none, under by the remainders
        chosen = int(take.argmax()) if step < 0 else order[position % len(order)]
        take[chosen] += step if 1 <= int(take[chosen]) + step <= int(counts[chosen]) else 0
        position += 1
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for value, count in zip(values, take.tolist(), strict=True):
        rows = (labels == value).nonzero().flatten()
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def fold_numbers(labels: Tensor, folds: int, seed: int) -> Tensor:
    """A fold 0..folds-1 for each image; each class is dealt out in turn, so that folds differ by one image of it."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(len(labels), dtype=torch.int64)
    start = 0
    for value in torch.unique(labels):
        rows = (labels == value).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        numbers[rows] = (torch.arange(len(rows)) + start) % folds
        start += len(rows)  # go on where the last class stopped, so that folds are of one size too
    return numbers


def splits(numbers: Tensor, folds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(train rows, test rows) for each of the folds."""
    for fold in folds:
        yield (numbers != fold).nonzero().flatten(), (numbers == fold).nonzero().flatten()


def accuracy(right: Tensor) -> dict[str, float | int]:
    """Share of right answers with its standard error, as ``{"accuracy", "se", "n"}``.

    The error is the binomial one of Agresti and Coull (two successes and two failures added), which is not zero at
    0 % and 100 %. It covers which images were tested, not which were trained on.
    """
    n, hits = len(right), int(right.sum())
    share = (hits + 2) / (n + 4)
    return {"accuracy": hits / n if n else math.nan, "se": math.sqrt(share * (1 - share) / (n + 4)), "n": n}


class LogisticRegression:
    """Multinomial logistic regression on standardised features, through scikit-learn's L-BFGS in float64.

    Minimises mean cross-entropy + strength |W|^2 / 2 (no penalty on the bias) over some rows of ``features``; each
    ``fit`` goes on from the weights of the last. Raises `ImportError` with the install line without scikit-learn.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        try:
            from sklearn.linear_model import LogisticRegression as Model
        except ImportError as error:
            raise ImportError('probes need scikit-learn: pip install "cl-kernels[data]"') from error
        wide = features.double()
        self._mean = wide.mean(dim=0)
        spread = wide.std(dim=0, correction=0)
        self._scale = torch.where(spread > 1e-12 * (1 + self._mean.abs()), spread, torch.ones_like(spread))
        self._x = self._standard(features)
        self._y = labels.numpy()
        # 100 steps: past them the accuracy moved by less than an image on digits and groceries
        self._model: Any = Model(max_iter=100, warm_start=True)
        self._only = int(labels[0]) if len(torch.unique(labels)) == 1 else None

    def _standard(self, features: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        return ((features.double() - self._mean) / self._scale).numpy()

    def fit(self, strength: float, rows: Tensor | None = None) -> LogisticRegression:
        """Fit on ``rows`` (bool [N], all by default), which must hold every class."""
        if self._only is None:
            x, y = (self._x, self._y) if rows is None else (self._x[rows.numpy()], self._y[rows.numpy()])
            self._model.set_params(C=1 / (strength * len(y)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # stopping early only regularises a little more
                self._model.fit(x, y)
        return self

    def loss(self, features: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy; the labels must be of classes that it was fitted on."""
        if self._only is not None:
            return 0.0
        columns = np.searchsorted(self._model.classes_, labels.numpy())
        logs = self._model.predict_log_proba(self._standard(features))
        return -float(logs[np.arange(len(labels)), columns].mean())

    def predict(self, features: Tensor) -> Tensor:
        """The label [N] of each image."""
        if self._only is not None:
            return torch.full((len(features),), self._only)
        return torch.from_numpy(self._model.predict(self._standard(features)).astype(np.int64))


def best_logistic(
    features: Tensor, labels: Tensor, seed: int, strength: float | None = None
) -> tuple[LogisticRegression, float]:
    """Logistic regression on all the images given, with the strength of the lowest loss on a fifth of them held out.

    From the strongest penalty on, until the loss rises: it has one minimum along the way, where accuracies of a few
    hundred images jump up and down. Every class keeps an image to train on. A given ``strength`` is used as it is.
    """
    model = LogisticRegression(features, labels)
    if strength is not None:
        return model.fit(strength), strength
    counts = torch.bincount(labels)[labels]
    held = (fold_numbers(labels, round(1 / INNER_SHARE), seed) == 0) & (counts > 1)
    chosen, best = STRENGTHS[len(STRENGTHS) // 2], math.inf
    for tried in STRENGTHS if bool(held.any()) else ():
        loss = model.fit(tried, ~held).loss(features[held], labels[held])
        if loss > best:
            break
        chosen, best = tried, loss
    return model.fit(chosen), chosen
