"""Image sets: labels known at once, pixels read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_kernels.data.preprocess import cover

__all__ = ["ImageData", "ImageSet", "Images", "TensorImages", "held_out", "stratified_split"]

MAX_BYTES = 4 << 30  # of decoded images that `ImageSet.tensors` keeps


class Images(Protocol):
    """A source of images by number: uint8 [C, H, W]; sizes may differ between images, channels may not.

    One that scales what it reads also has ``size(index)``: height and width as stored.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor: ...


class TensorImages:
    """Images that are in memory already, as one uint8 tensor [N, C, H, W]."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]


class ImageSet(Dataset[tuple[Tensor, int]]):
    """A labelled set of images: item ``i`` is (uint8 [C, H, W], class number).

    ``images``: where the pixels come from; ``labels`` int64 [N]; ``rows`` int64 [N]: the number in ``images`` of each
    item (all of them by default); ``image_size``: scale each image to cover a square of that size and cut its centre.
    Pixels are read on demand, so a subset of a large shard decodes only its own images. Raises ``ValueError`` where
    labels and rows disagree in length.
    """

    def __init__(
        self, images: Images, labels: Tensor, rows: Tensor | None = None, *, image_size: int | None = None
    ) -> None:
        self._rows = torch.arange(len(images)) if rows is None else rows
        if labels.shape != self._rows.shape:
            raise ValueError(f"labels must have one entry an image: got {tuple(labels.shape)} and {len(self._rows)}")
        self._images = images
        self._size = image_size
        self._decoded: Tensor | None = None
        self.labels = labels.to(torch.int64)

    @property
    def image_size(self) -> int | None:
        """The side that every image is scaled to; None leaves them as they are stored."""
        return self._size

    def __len__(self) -> int:
        return int(self.labels.numel())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._image(index), int(self.labels[index])

    def _image(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a set of {len(self)} images")
        if self._decoded is not None:
            return self._decoded[index]
        image = self._images.read(int(self._rows[index]))
        return image if self._size is None else cover(image.unsqueeze(0), self._size).squeeze(0)

    def stored_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in its source, before any scaling; a file's header is enough for it."""
        row = int(self._rows[index])
        size: Callable[[int], tuple[int, int]] | None = getattr(self._images, "size", None)
        if size is not None:
            return size(row)
        height, width = self._images.read(row).shape[-2:]
        return int(height), int(width)

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The items at ``indices``, in that order; shares the source, and decoded pixels where there are any."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        part = ImageSet(self._images, self.labels[chosen], self._rows[chosen], image_size=self._size)
        if self._decoded is not None:
            part._decoded = self._decoded[chosen]
        return part

    def of_classes(self, classes: Sequence[int]) -> ImageSet:
        """The items whose label is one of ``classes``, in their old order."""
        wanted = torch.isin(self.labels, torch.as_tensor(list(classes), dtype=torch.int64))
        return self.subset(wanted.nonzero().flatten())

    def tensors(self) -> Tensor:
        """Every image as one uint8 tensor [N, C, H, W]; decoded at the first call and kept.

        Raises ``ValueError`` where sizes differ (give ``image_size``), or where the images would take over 4 GiB.
        """
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    def _decode(self) -> Tensor:
        if len(self) == 0:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        first = self._image(0)
        size = len(self) * first.numel()
        if size > MAX_BYTES:
            raise ValueError(f"{len(self)} images of {tuple(first.shape)} take {size} bytes; give a smaller image_size")
        decoded = torch.empty(len(self), *first.shape, dtype=torch.uint8)
        decoded[0] = first
        for index in range(1, len(self)):
            image = self._image(index)
            if image.shape != first.shape:
                raise ValueError(
                    f"images differ in size ({tuple(first.shape)} and {tuple(image.shape)}); give image_size to load"
                )
            decoded[index] = image
        return decoded


@dataclass(frozen=True)
class ImageData:
    """A training and a test set with the same classes; ``skipped`` counts the broken images that were left out.

    ``test_from``: where the test set comes from, to be read after "the test images are". ``parts``: of several sets
    joined into one, the name of each and the number of its first class.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: list[str]
    skipped: int = 0
    test_from: str = "the test split that came with the data"
    parts: tuple[tuple[str, int], ...] = ()


def held_out(share: float, seed: int) -> str:
    """`ImageData.test_from` of a set without a test split."""
    return f"{share:.0%} of each class, held out of the training images by seed {seed}: the data has no test split"


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers (train, test), each sorted: ``share`` of every class, at least one image, goes to the test part.

    A class needs two images or more; the split depends on the labels and ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for value in torch.unique(labels):
        rows = (labels == value).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = min(max(1, round(share * len(rows))), len(rows) - 1)
        test.append(rows[:held])
        train.append(rows[held:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
