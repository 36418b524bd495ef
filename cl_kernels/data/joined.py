"""Several data sets as one, and a part of one: streams across data sets, and settings tuned on other classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cl_kernels.data.sets import ImageData, ImageSet

__all__ = ["joined", "part_of"]


class _Chain:
    """Images of several sets, one set after another; grey images become RGB, so that all have three channels."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets = list(sets)
        self._ends = torch.tensor([len(one) for one in sets]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Tensor:
        place = int(torch.searchsorted(self._ends, index, right=True))
        image = self.sets[place][index - (int(self._ends[place - 1]) if place else 0)][0]
        return image.expand(3, -1, -1).contiguous() if image.shape[0] == 1 else image


def joined(sets: Sequence[ImageData]) -> ImageData:
    """One data set of all classes of `sets`, in their order; ``parts`` tells where each begins and what it is called.

    Class names carry their set's name ("omniglot_small12: Greek/character01"), so equal names stay two classes. Sizes
    may differ: load each with the same ``image_size`` to decode them together. Pixels are read on demand. Raises
    ``ValueError`` for fewer than two sets, or one that is given twice.
    """
    names = [data.name for data in sets]
    if len(sets) < 2 or len(set(names)) < len(names):
        raise ValueError(f"data: a join needs two different sets or more, got {' + '.join(names) or 'none'}")
    starts = [sum(len(data.class_names) for data in sets[:index]) for index in range(len(sets))]
    halves = []
    for half in ("train", "test"):
        own: list[ImageSet] = [getattr(data, half) for data in sets]
        labels = torch.cat([part.labels + start for part, start in zip(own, starts, strict=True)])
        halves.append(ImageSet(_Chain(own), labels))
    return ImageData(
        "+".join(names),
        halves[0],
        halves[1],
        [f"{data.name}: {name}" for data in sets for name in data.class_names],
        sum(data.skipped for data in sets),
        "; ".join(f"{data.name}: {data.test_from}" for data in sets),
        tuple(zip(names, starts, strict=True)),
    )


def part_of(data: ImageData, *, classes: tuple[int, int] | None = None, per_class: int | None = None) -> ImageData:
    """The classes from ``classes[0]`` up to ``classes[1]``, numbered anew from 0; of each all test images, and at most
    ``per_class`` training images, the first ones. Of a join the range counts through all its sets. Raises
    ``ValueError`` naming the argument that does not fit."""
    train, test = data.train, data.test
    if classes is not None:
        start, stop = classes
        if not 0 <= start < stop <= len(data.class_names):
            raise ValueError(f"classes: expected a range within 0:{len(data.class_names)}, got {start}:{stop}")
        ends = [begin for _, begin in data.parts[1:]] + [len(data.class_names)]
        kept = [
            (name, max(begin - start, 0))
            for (name, begin), end in zip(data.parts, ends if data.parts else [], strict=True)
            if max(begin, start) < min(end, stop)
        ]
        train, test = (_renumbered(part.of_classes(range(start, stop)), start) for part in (train, test))
        data = dataclasses.replace(data, class_names=data.class_names[start:stop], parts=tuple(kept))
    if per_class is not None:
        if per_class < 1:
            raise ValueError(f"images_per_class: expected at least 1, got {per_class}")
        own = [(train.labels == label).nonzero().flatten()[:per_class] for label in range(len(data.class_names))]
        train = train.subset(torch.cat(own).sort().values)
    return dataclasses.replace(data, train=train, test=test)


def _renumbered(part: ImageSet, start: int) -> ImageSet:
    part.labels = part.labels - start
    return part
