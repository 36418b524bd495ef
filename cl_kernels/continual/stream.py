"""Streams of tasks: new classes per task, one data set after another, or the same classes in new domains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cl_kernels.continual import transforms

__all__ = [
    "Dataset",
    "ImageSet",
    "Task",
    "class_incremental",
    "class_order",
    "domain_incremental",
    "quick",
    "source_incremental",
]


class ImageSet(Protocol):
    """What a stream needs of a set of images: `cl_kernels.data.ImageSet` has it."""

    @property
    def labels(self) -> Tensor: ...

    def subset(self, indices: Tensor) -> ImageSet: ...


class Dataset(Protocol):
    """A named training and test set with class names: `cl_kernels.data.ImageData` has it."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> ImageSet: ...

    @property
    def test(self) -> ImageSet: ...

    @property
    def class_names(self) -> list[str]: ...


@dataclass(frozen=True)
class Task:
    """One task: `classes` are indices into the data's class names; `train` and `test` index its training and test sets.

    `domain` names the transform of its images; `last` says that no task follows.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: Tensor
    test: Tensor
    domain: str
    last: bool


def class_order(classes: int, seed: int | None) -> list[int]:
    """The class indices shuffled by NumPy's PCG64(seed), as the official NSP2 code does; in order for None."""
    order = np.arange(classes)
    if seed is not None:
        np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    return [int(label) for label in order]


def class_incremental(
    data: Dataset,
    tasks: int,
    seed: int | None = 0,
    *,
    sizes: Sequence[int] | None = None,
    domains: Sequence[str] = (),
) -> list[Task]:
    """Split the classes, in seeded order, into `tasks` tasks.

    Uneven splits are allowed: the first tasks get one class more. `sizes` gives the number of classes of each task
    instead. `domains` are applied to the tasks in turn. Raises `ValueError` for fewer than two classes, more tasks than
    classes, sizes that do not fit, and a class without training or test images."""
    order = class_order(_known_classes(data), seed)
    if tasks < 1:
        raise ValueError(f"tasks: expected at least 1, got {tasks}")
    if tasks > len(order):
        raise ValueError(f"tasks: expected at most one per class ({len(order)} classes in {data.name}), got {tasks}")
    if sizes is None:
        base, more = divmod(len(order), tasks)
        sizes = [base + (i < more) for i in range(tasks)]
    if len(sizes) != tasks or min(sizes) < 1 or sum(sizes) != len(order):
        raise ValueError(f"sizes: expected {tasks} positive numbers adding up to {len(order)}, got {list(sizes)}")
    return _dealt(data, order, sizes, domains)


def source_incremental(data: Dataset, tasks: int, seed: int | None = 0, *, domains: Sequence[str] = ()) -> list[Task]:
    """The classes of one data set after another, in the order of a join (`cl_kernels.data.joined`), or of one group
    after another, where all class names are "group/class": the alphabets of Omniglot.

    Every set is dealt into as many tasks, the first sets into one more where `tasks` does not divide; classes are
    shuffled within their set. Raises `ValueError` for data that are no join, fewer tasks than sets, and what
    `class_incremental` raises for.
    """
    parts: Sequence[tuple[str, int]] = getattr(data, "parts", ()) or _groups(data.class_names)
    classes = _known_classes(data)
    if not parts:
        raise ValueError(
            "data: a stream of sources needs several sets joined by '+', or class names such as 'group/class', "
            f"got {data.name}"
        )
    if tasks < len(parts):
        raise ValueError(f"tasks: expected at least one per data set ({len(parts)}), got {tasks}")
    starts = [start for _, start in parts]
    each, more = divmod(tasks, len(parts))
    order: list[int] = []
    sizes: list[int] = []
    for place, (start, stop) in enumerate(zip(starts, [*starts[1:], classes], strict=True)):
        count = each + (place < more)
        if count > stop - start:
            raise ValueError(f"tasks: {parts[place][0]} has {stop - start} classes, too few for {count} tasks")
        order += [start + label for label in class_order(stop - start, seed)]
        base, rest = divmod(stop - start, count)
        sizes += [base + (i < rest) for i in range(count)]
    return _dealt(data, order, sizes, domains)


def _groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """What stands before the "/" in class names, and where each begins; empty unless all have it, group by group."""
    found: dict[str, int] = {}
    last = None
    for place, name in enumerate(names):
        group, slash, _ = name.partition("/")
        if not slash or (group != last and group in found):
            return []
        found.setdefault(group, place)
        last = group
    return list(found.items()) if len(found) > 1 else []


def _dealt(data: Dataset, order: Sequence[int], sizes: Sequence[int], domains: Sequence[str]) -> list[Task]:
    """Tasks of so many classes each, in the given order."""
    cycle = list(domains) or ["identity"]
    for name in cycle:
        transforms.get(name)
    result, start = [], 0
    for index, size in enumerate(sizes):
        classes = tuple(order[start : start + size])
        start += size
        train, test = _of_classes(data.train.labels, classes), _of_classes(data.test.labels, classes)
        domain = cycle[index % len(cycle)]
        name = f"task {index + 1}" if domain == "identity" else f"task {index + 1} ({domain})"
        result.append(Task(index, name, classes, train, test, domain, index == len(sizes) - 1))
    return result


def domain_incremental(data: Dataset, domains: Sequence[str] = ("identity", "invert", "rotate90")) -> list[Task]:
    """All classes in every task; task t shows all images under `domains[t]`.

    Raises `ValueError` for no domain, an unknown one, fewer than two classes, and a class without images.
    """
    classes = tuple(range(_known_classes(data)))
    if not domains:
        raise ValueError("domains: expected at least one transform, got none")
    train, test = torch.arange(len(data.train.labels)), torch.arange(len(data.test.labels))
    result = []
    for index, domain in enumerate(domains):
        transforms.get(domain)
        result.append(Task(index, domain, classes, train, test, domain, index == len(domains) - 1))
    return result


def quick(task: Task, data: Dataset, train: int = 40, test: int = 20) -> Task:
    """The same task with at most `train` and `test` images of each class, the first ones."""
    return dataclasses.replace(
        task,
        train=_first(task.train, data.train.labels, task.classes, train),
        test=_first(task.test, data.test.labels, task.classes, test),
    )


def _first(indices: Tensor, labels: Tensor, classes: tuple[int, ...], count: int) -> Tensor:
    own = labels[indices]
    kept = [indices[own == label][:count] for label in classes]
    return torch.cat(kept).sort().values


def _of_classes(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    return torch.isin(labels, torch.tensor(classes)).nonzero().flatten()


def _known_classes(data: Dataset) -> int:
    """The number of classes, after checking that each has training and test images."""
    count = len(data.class_names)
    if count < 2:
        raise ValueError(f"data: expected at least 2 classes in {data.name}, got {count}")
    for part, labels in (("training", data.train.labels), ("test", data.test.labels)):
        present = torch.bincount(labels, minlength=count)
        empty = (present == 0).nonzero().flatten().tolist()
        if empty:
            named = ", ".join(str(data.class_names[label]) for label in empty[:5])
            raise ValueError(f"data: {len(empty)} classes of {data.name} have no {part} image, first: {named}")
    return count
