"""Classifier heads: one per task, trained on its own classes, concatenated for prediction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.methods._task import Batches

__all__ = ["HEADS", "HEAD_INITS", "ClassMeans", "Head", "Heads"]

HEADS = ("cosine", "linear")
HEAD_INITS = ("class-means", "default", "kaiming", "official", "zeros")


class Head(nn.Module):
    """Logits [B, K] of features [B, D]: `x W^T + b` ("linear") or `scale * cos(x, w_k)` ("cosine", no bias)."""

    def __init__(self, dim: int, classes: int, kind: str, scale: float) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes)) if kind == "linear" else None

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "linear":
            return F.linear(features, self.weight.to(features.dtype), None if self.bias is None else self.bias)
        # In float32 whatever autocast says: a cosine near 1 loses all its digits in 16 bits.
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float() if features.dtype.itemsize < 4 else features, dim=-1)
            return F.linear(unit, F.normalize(self.weight, dim=-1).to(unit.dtype)) * self.scale

    @torch.no_grad()
    def init_default(self) -> None:
        """The law of `torch.nn.Linear`: weight and bias uniform within 1 / sqrt(D)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def init_kaiming(self) -> None:
        """The head of VPT (Jia et al. 2022): normal of variance 2 / classes. Its constant bias of -4.595 is left at 0:
        a softmax does not see what all logits share."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    @torch.no_grad()
    def init_official(self, task: int, first: Head) -> None:
        """The official NSP2 code (method-null-space.md T6): task 1 truncated normal of std 0.02 and zero bias; task 2
        goes on from task 1's head if the widths match; later tasks the law of `torch.nn.Linear`."""
        if task == 0:
            nn.init.trunc_normal_(self.weight, std=0.02)
        elif task == 1 and first.weight.shape == self.weight.shape:
            self.weight.copy_(first.weight)
            if self.bias is not None and first.bias is not None:
                self.bias.copy_(first.bias)
        else:
            self.init_default()

    @torch.no_grad()
    def init_class_means(self, means: ClassMeans) -> None:
        """Start as the nearest-class-mean classifier of the features.

        Cosine: w_k is the mean of the normalised features. Linear: `(x . m_k - |m_k|^2 / 2) / s` with s the mean
        squared distance of a feature to its class mean, which keeps the logits near 1 in size."""
        if self.kind == "cosine":
            self.weight.copy_(means.directions())
            return
        centres, spread = means.centres()
        self.weight.copy_(centres / spread)
        if self.bias is not None:
            self.bias.copy_(-0.5 * centres.square().sum(dim=1) / spread)


class ClassMeans:
    """Sums of features by class, in float64: means of the raw and of the normalised features."""

    def __init__(self, classes: tuple[int, ...], dim: int, device: torch.device) -> None:
        self.classes = classes
        self.raw = torch.zeros(len(classes), dim, dtype=torch.float64, device=device)
        self.unit = torch.zeros_like(self.raw)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(classes), dtype=torch.float64, device=device)

    def add(self, features: Tensor, local: Tensor) -> None:
        """Add features [B, D] whose classes are the positions `local` [B] in `classes`."""
        wide = features.double()
        self.raw.index_add_(0, local, wide)
        self.unit.index_add_(0, local, F.normalize(wide, dim=1))
        self.squares += wide.square().sum()
        self.counts.index_add_(0, local, torch.ones_like(local, dtype=torch.float64))

    def directions(self) -> Tensor:
        """[K, D] unit vectors along the mean of the normalised features; zero for a class without images."""
        return F.normalize(self.unit, dim=1)

    def centres(self) -> tuple[Tensor, Tensor]:
        """[K, D] means and the mean squared distance to them, at least 1e-12."""
        means = self.raw / self.counts.clamp(min=1)[:, None]
        inside = self.squares - (self.counts[:, None] * means.square()).sum()
        return means, (inside / self.counts.sum().clamp(min=1)).clamp(min=1e-12)


class Heads(nn.Module):
    """The heads of all tasks so far.

    `own(task)` is the head that task trains; a task all of whose classes are known shares the head that holds them
    (domain-incremental streams). `forward` concatenates all heads; column j belongs to label `classes[j]`.
    """

    def __init__(self, dim: int, kind: str, scale: float) -> None:
        super().__init__()
        self.dim, self.kind, self.scale = dim, kind, scale
        self.parts = nn.ModuleList()
        self.groups: list[tuple[int, ...]] = []
        self.register_buffer("positions", torch.full((1,), -1, dtype=torch.int64), persistent=False)
        self.positions: Tensor

    @property
    def classes(self) -> list[int]:
        """The labels in the order of the columns."""
        return [label for group in self.groups for label in group]

    def extend(self, classes: tuple[int, ...], like: Tensor) -> tuple[int, bool]:
        """The number of the head for `classes`, and whether it is new. Raises `ValueError` when only a part is
        known."""
        known = [index for index, group in enumerate(self.groups) if set(classes) <= set(group)]
        if known:
            return known[0], False
        repeated = sorted(set(classes) & set(self.classes))
        if repeated:
            raise ValueError(f"task.classes: {repeated[:5]} belong to an earlier task's head, the others are new")
        self.parts.append(Head(self.dim, len(classes), self.kind, self.scale).to(like))
        self.groups.append(classes)
        self._number(like.device)
        return len(self.groups) - 1, True

    def head(self, index: int) -> Head:
        """The head with that number."""
        part = self.parts[index]
        if not isinstance(part, Head):
            raise TypeError(f"heads: part {index} is a {type(part).__name__}")
        return part

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.head(index)(features) for index in range(len(self.parts))], dim=1)

    def columns(self, labels: Tensor) -> Tensor:
        """The column of each label in the concatenation."""
        return self.positions[labels]

    def offset(self, index: int) -> int:
        """The column where a head starts."""
        return sum(len(group) for group in self.groups[:index])

    def _number(self, device: torch.device) -> None:
        order = torch.tensor(self.classes, dtype=torch.int64)
        positions = torch.full((int(order.max()) + 1,), -1, dtype=torch.int64)
        positions[order] = torch.arange(len(order))
        self.positions = positions.to(device)


def class_means(features_of_batches: Batches, heads: Heads, index: int, device: torch.device) -> ClassMeans:
    """Class means of (features, labels) batches over the classes of head `index`; images of other classes are
    skipped."""
    means = ClassMeans(heads.groups[index], heads.dim, device)
    start, size = heads.offset(index), len(heads.groups[index])
    for features, labels in features_of_batches:
        local = heads.columns(labels) - start
        own = (local >= 0) & (local < size)
        means.add(features[own], local[own])
    return means
