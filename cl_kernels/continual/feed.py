"""Images in memory, once, as one uint8 tensor on the device; batches of them as the backbone wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.continual.seeds import derive

__all__ = ["Feed", "Pool", "augment", "held_out"]

DEVICE_SHARE = 0.25  # of the free device memory that the uint8 images may take


class Pool:
    """The images of one part of the data set that a run needs: `images(rows)` are uint8 [n, C, H, W] on the device.

    Decoded once and kept on the device where they fit; larger sets stay on the host, or are read image by image.
    """

    def __init__(self, source: Any, rows: Tensor, device: torch.device) -> None:
        self.device = device
        self._source = source.subset(rows)
        self._place = torch.full((int(rows.max()) + 1,), -1, dtype=torch.int64)
        self._place[rows] = torch.arange(len(rows))
        self._images: Tensor | None = None
        if self._fits(source, rows):
            self._images = self._source.tensors()
            if device.type != "cuda" or self._images.numel() < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
                self._images = self._images.to(device)
        self.labels = source.labels.to(torch.int64)

    def images(self, rows: Tensor) -> Tensor:
        """uint8 [n, C, H, W] of the data set's rows `rows` (on the CPU)."""
        places = self._place[rows]
        if self._images is None:
            return torch.stack([self._source[int(place)][0] for place in places]).to(self.device)
        picked = self._images[places.to(self._images.device, non_blocking=True)]
        return picked.to(self.device, non_blocking=True)

    @staticmethod
    def _fits(source: Any, rows: Tensor) -> bool:
        return bool(len(rows) * source[int(rows[0])][0].numel() <= 4 << 30)


@dataclass(frozen=True)
class Segment:
    """Rows of a pool under one transform."""

    rows: Tensor
    transform: Callable[[Tensor], Tensor]


class Feed:
    """The images of one task, or of several: `batch(positions)` gives (float images, labels) on the device.

    Preprocessed images are kept when they take at most `cache` bytes, so that a step costs one gather.
    """

    def __init__(self, pool: Pool, segments: list[Segment], preprocess: Callable[[Tensor], Tensor], cache: int) -> None:
        self._pool, self._segments, self._preprocess = pool, segments, preprocess
        rows = torch.cat([segment.rows for segment in segments])
        self._rows = rows
        self._part = torch.repeat_interleave(torch.tensor([len(segment.rows) for segment in segments]))
        self.labels = pool.labels[rows].to(pool.device)
        self._values: Tensor | None = None
        self._facts: tuple[Tensor, ...] = ()
        first = self._make(torch.zeros(1, dtype=torch.int64))
        if first.numel() * first.element_size() * len(rows) <= cache:
            self._values = torch.cat([self._make(part) for part in torch.arange(len(rows)).split(512)])

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `positions` (int64, on the CPU)."""
        on_device = positions.to(self.labels.device, non_blocking=True)
        values = self._make(positions) if self._values is None else self._values[on_device]
        return values, self.labels[on_device]

    def facts(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What `with_facts` computed of the images at `positions`."""
        return tuple(fact[positions.to(fact.device, non_blocking=True)] for fact in self._facts)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in order."""
        for positions in torch.arange(len(self)).split(size):
            yield self.batch(positions)

    def subset(self, positions: Tensor) -> Feed:
        """The images at `positions` (int64, on the CPU) alone, in that order."""
        other = object.__new__(Feed)
        other.__dict__.update(self.__dict__)
        on_device = positions.to(self.labels.device)
        other._rows, other._part, other.labels = self._rows[positions], self._part[positions], self.labels[on_device]
        other._values = None if self._values is None else self._values[on_device]
        other._facts = tuple(fact[positions.to(fact.device)] for fact in self._facts)
        return other

    @torch.no_grad()
    def with_facts(self, facts: Callable[[Tensor], tuple[Tensor, ...]], size: int) -> Feed:
        """The same feed with `facts(images)` of every image, computed now; itself where there are none."""
        made = []
        for images, _ in self.batches(size):
            made.append(facts(images))
            if not made[-1]:
                return self
        other = object.__new__(Feed)
        other.__dict__.update(self.__dict__)
        other._facts = tuple(torch.cat(parts) for parts in zip(*made, strict=True))
        return other

    @torch.no_grad()
    def mapped(self, features: Callable[[Tensor], Tensor], size: int) -> Feed:
        """The same feed with images replaced by `features(images)`, computed now."""
        other = object.__new__(Feed)
        other.__dict__.update(self.__dict__)
        other._values = torch.cat([features(images) for images, _ in self.batches(size)])
        return other

    def _make(self, positions: Tensor) -> Tensor:
        if len(self._segments) == 1:
            return self._preprocess(self._segments[0].transform(self._pool.images(self._rows[positions])))
        parts = self._part[positions]
        made: Tensor | None = None
        for index in parts.unique().tolist():
            chosen = (parts == index).nonzero().flatten()
            images = self._pool.images(self._rows[positions[chosen]])
            values = self._preprocess(self._segments[index].transform(images))
            if made is None:
                made = values.new_empty((len(positions), *values.shape[1:]))
            made[chosen.to(values.device)] = values
        if made is None:
            raise ValueError("positions: expected at least one, got none")
        return made


def augment(images: Tensor, kind: str, seed: int, *place: int) -> Tensor:
    """Random flips ("flip") or crops ("crop") of a batch; a pure function of (seed, place), so that a resumed run
    repeats it. Crops pad by an eighth of the size, repeating the border."""
    if kind == "none":
        return images
    generator = torch.Generator().manual_seed(derive(seed, "augment", *place))
    count, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    if kind == "flip":
        flipped = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)
    margin = max(1, height // 8)
    padded = F.pad(images, (margin,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * margin + 1, (2, count), generator=generator).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def held_out(labels: Tensor, share: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of `share` of each class's images, at least one of two or more, in the order of the permutation
    `order`; and all other positions, ascending. int64 on the CPU, as `labels` are."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = labels[order]
    for label in labels.unique():
        mine = order[shuffled == label]
        held[mine[: max(round(share * len(mine)), 1) if len(mine) > 1 else 0]] = True
    return order[held[order]], (~held).nonzero().flatten()
