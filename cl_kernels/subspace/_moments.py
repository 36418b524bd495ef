"""Running second moments of one layer, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.errors import NonFiniteError, SubspaceMismatchError

__all__ = ["Covariance", "Moments", "PromptCovariance", "Sums", "unguarded"]


@dataclass(frozen=True, eq=False)
class Covariance:
    """Sum of x x^T over rows: `matrix` [d, d], `count` of rows, `mean` [d] of x.

    `matrix` is a sum, so that tasks accumulate by addition; ``matrix / count`` is the second moment of a row. With
    weighting "batches" it is a sum of per-batch means and `count` is the number of batches. With `centred` collection
    it is the sum of (x - mean)(x - mean)^T. `rows` is the number of rows whatever the weighting, 0 if unknown.
    """

    matrix: Tensor
    count: float
    mean: Tensor
    rows: int = 0

    def merge(self, other: Covariance) -> Covariance:
        """Both together. Raises `SubspaceMismatchError` for another dimension."""
        if self.matrix.shape != other.matrix.shape:
            raise SubspaceMismatchError(
                f"other: expected a matrix of shape {tuple(self.matrix.shape)}, got {tuple(other.matrix.shape)}"
            )
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count if count else self.mean
        return Covariance(self.matrix + other.matrix, count, mean, self.rows + other.rows)


@dataclass(frozen=True, eq=False)
class PromptCovariance:
    """What one prompted block protects: `left` [M, M] of the softmax mass, `right` [D, D] of queries x key weight."""

    left: Covariance
    right: Covariance

    def merge(self, other: PromptCovariance) -> PromptCovariance:
        """Both together, side by side."""
        return PromptCovariance(self.left.merge(other.left), self.right.merge(other.right))


class Sums(NamedTuple):
    """Sums of one layer as read, before any check: [..., n, n] and [..., n], and which updates were finite."""

    matrix: Tensor
    total: Tensor
    weight: float
    rows: int
    updates: int
    first_bad: int | None

    def checked(self, name: str) -> Sums:
        """Raise `NonFiniteError` naming the layer and the batch, `SubspaceMismatchError` if not symmetric."""
        bad = int((~torch.isfinite(self.matrix)).sum()) + int((~torch.isfinite(self.total)).sum())
        if bad or self.first_bad is not None:
            where = "an overflow of the sum" if self.first_bad is None else f"batch {self.first_bad} (counted from 0)"
            raise NonFiniteError(
                f"{name}: {bad} of {self.matrix.numel() + self.total.numel()} sums are NaN or infinite, "
                f"the first of them from {where}, of {self.updates} seen"
            )
        if not torch.equal(self.matrix, self.matrix.mT):
            error = float((self.matrix - self.matrix.mT).abs().max())
            raise SubspaceMismatchError(f"{name}: the covariance is not symmetric (by up to {error:.3e})")
        return self

    def covariance(self, centred: bool = False) -> Covariance:
        """What the sums say of [n, n] rows."""
        mean = self.total / self.weight if self.weight else self.total.clone()
        matrix = self.matrix
        if centred and self.weight:
            matrix = matrix - self.weight * torch.outer(mean, mean)
            matrix = (matrix + matrix.mT) / 2
        return Covariance(matrix, self.weight, mean, self.rows)


class Moments:
    """Sum of x x^T and of x for rows [..., d], or head by head: [H, dh, dh] and [H, dh] from q [B, H, N, dh].

    Counts live on the host and are known from shapes, and which batch was the first bad one is decided on the device,
    so an update waits for nothing. Rows on another device are summed there first: d x d numbers travel, not the rows.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.matrix = torch.zeros((*shape, shape[-1]), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0.0
        self.rows = 0
        self.updates = 0

    def update(self, pieces: Iterable[Tensor], count: int, weighting: str) -> None:
        """Add one batch of `count` rows that comes in `pieces`."""
        alpha = 1.0 / count if weighting == "batches" else 1.0
        for piece in pieces:
            self._add(piece, alpha)
        self.count += alpha * count
        self.rows += count
        self.updates += 1
        self.good.add_(torch.isfinite(self.total.sum()))  # NaN and infinity stay in a sum: good counts up to the first

    def _add(self, x: Tensor, alpha: float) -> None:
        matrix, total = self.matrix, self.total
        if x.device != matrix.device:
            matrix, total = (torch.zeros(t.shape, dtype=t.dtype, device=x.device) for t in (matrix, total))
        if matrix.ndim == 2:
            ops.update_covariance_(matrix, x, alpha=alpha, total=total)
        else:
            ops.update_head_grams_(matrix, x, alpha=alpha)
            total.add_(x.sum(dim=(0, 2), dtype=torch.promote_types(x.dtype, torch.float32)), alpha=alpha)
        if x.device != self.matrix.device:
            self.matrix.add_(matrix.to(self.matrix.device))
            self.total.add_(total.to(self.total.device))

    def sums(self) -> tuple[Sums, ...]:
        """A copy of the sums; waits for the device."""
        good = int(self.good)
        bad = None if good == self.updates else good
        return (Sums(self.matrix.clone(), self.total.clone(), self.count, self.rows, self.updates, bad),)


class unguarded:
    """No gradient, no autocast and no inference mode: sums are normal tensors, and nobody lowers their precision."""

    def __init__(self, device: torch.device) -> None:
        self._contexts = (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        )

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)
