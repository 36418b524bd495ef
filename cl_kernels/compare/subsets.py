"""Which images a run trains on: nested stratified subsets, folds inside them, and the sealed labels of the test set.

All are pure functions of labels and seed, so that every arm sees the same images and a resumed run draws them again.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_kernels.continual.seeds import derive

__all__ = ["SealedLabels", "fold", "ladder", "nested_order", "subset"]


def ladder(images: int, classes: int, smallest: int = 50) -> list[int]:
    """Training sizes: `smallest` doubled again and again, and all `images`; none below the number of classes.

    Where that gives fewer than four, four in equal steps of log n, from an eighth of `images` or one image a class.
    """
    sizes = {images}
    size = max(smallest, classes)
    while size <= 0.75 * images:  # a last step of a third would measure the same thing twice
        sizes.add(size)
        size *= 2
    if len(sizes) < 4:
        low = max(classes, images // 8)
        sizes |= {round(low * (images / low) ** (step / 3)) for step in range(4)}
        sizes = {size for size in sizes if classes <= size <= images}
    return sorted(sizes)


def nested_order(labels: Tensor, seed: int) -> Tensor:
    """All rows of `labels`, ordered so that every beginning is a stratified sample: `order[:n]`.

    In a beginning of n rows the count of each class is within 1 of its proportional share n N_c / N (PB10). One image
    of every class comes first, so none is missing where n is at least the number of classes; the shares of the other
    classes are of what is left until every share has passed 1. Drawn anew for every seed. O(N log N).

    Each next image of a class has a first place (before it the class would be a whole image ahead) and a last one
    (after it, behind); the earliest last place is served first. Shares add up to n, so by Hall's theorem that succeeds.
    """
    generator = torch.Generator().manual_seed(derive(seed, "subset"))
    values = labels.unique()
    rows = []
    for value in values:
        mine = (labels == value).nonzero().flatten()
        rows.append(mine[torch.randperm(len(mine), generator=generator)].numpy())
    turns = torch.randperm(len(values), generator=generator).tolist()  # between classes with the same last place
    counts = np.array([len(part) for part in rows])
    level = _levels(counts)
    begins: list[list[tuple[int, int, int]]] = [[] for _ in range(len(labels) + 1)]
    for index, count in enumerate(counts):
        done = np.arange(1, count)  # images of the class that are placed before the next
        first = np.searchsorted(level, done / count + 1e-12, side="right")
        last = np.searchsorted(level, (done + 1) / count - 1e-12, side="left")
        for begin, end, number in zip(first.tolist(), last.tolist(), done.tolist()):
            begins[min(begin, len(labels) - 1)].append((end, turns[index], number))
    owner = {turn: index for index, turn in enumerate(turns)}
    order = [int(rows[owner[turn]][0]) for turn in range(len(rows))]
    waiting: list[tuple[int, int, int]] = []
    for place in range(len(labels)):
        for job in begins[place]:
            heapq.heappush(waiting, job)
        if place >= len(rows):
            _, turn, number = heapq.heappop(waiting)
            order.append(int(rows[owner[turn]][number]))
    return torch.tensor(order)


def _levels(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For n = 1..N the share of every class that a sample of n images holds, were each class to hold at least one."""
    ascending = np.sort(counts)
    rest = np.concatenate([np.cumsum(ascending[::-1])[::-1], [1]])
    levels = np.zeros(int(counts.sum()))
    clamped = len(counts)
    for n in range(len(counts), len(levels) + 1):
        while clamped and (n - (clamped - 1)) / rest[clamped - 1] * ascending[clamped - 1] >= 1:
            clamped -= 1
        levels[n - 1] = (n - clamped) / rest[clamped] if clamped < len(counts) else 0.0
    return levels


def subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """The rows of the nested stratified subset of `size` images that `seed` draws, in the order of training data.

    Raises `ValueError` for a size below the number of classes or above the number of images.
    """
    classes = int(labels.unique().numel())
    if not classes <= size <= len(labels):
        raise ValueError(f"size: expected {classes} (one image a class) to {len(labels)} images, got {size}")
    return nested_order(labels, seed)[:size]


def fold(labels: Tensor, seed: int, repeat: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Positions (train, validation) of one stratified 80:20 split inside a training subset; `repeat` draws another.

    A class with one image stays in training whole; validation gets at least one image.
    """
    generator = torch.Generator().manual_seed(derive(seed, "fold", repeat))
    shuffled = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    due = 0.0
    for value in labels.unique():
        mine = shuffled[labels[shuffled] == value]
        due += share * len(mine)  # what rounding leaves over goes to the next class
        count = min(round(due), len(mine) - 1)
        due -= count
        held[mine[:count]] = True
    if not held.any():
        counts = torch.bincount(labels)
        held[shuffled[counts[labels[shuffled]] == counts.max()][0]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


class SealedLabels:
    """The labels of the test set, closed until the final evaluation (PB11).

    Nothing that chooses (plans, tuning, selection of an arm) can reach them by accident: `open` raises before `unseal`.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels.to(torch.int64).clone()
        self._sealed = True

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def sealed(self) -> bool:
        """Whether they are closed."""
        return self._sealed

    def digest(self) -> str:
        """A hash that tells two test sets apart without giving a label out."""
        return hashlib.blake2b(self._labels.numpy().tobytes(), digest_size=16).hexdigest()

    def unseal(self) -> None:
        """The final evaluation begins: nothing may be chosen after this."""
        self._sealed = False

    def open(self) -> Tensor:
        """The labels [N]. Raises `RuntimeError` before `unseal`."""
        if self._sealed:
            raise RuntimeError("the test labels are sealed until the final evaluation")
        return self._labels

    @staticmethod
    def choose(labels: Tensor, most: int, seed: int) -> Tensor:
        """Rows of a stratified sample of at most `most` test images, ascending; all where there are no more."""
        if len(labels) <= most:
            return torch.arange(len(labels))
        return nested_order(labels, derive(seed, "test"))[:most].sort().values


def counts_by_class(labels: Tensor, rows: Sequence[int] | Tensor, classes: int) -> list[int]:
    """How many of `rows` belong to each class."""
    return [int(count) for count in torch.bincount(labels[torch.as_tensor(rows)], minlength=classes)]
