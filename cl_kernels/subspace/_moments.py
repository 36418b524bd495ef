"""Running second moments of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.subspace._covariance import Covariance, Quartic
from cl_kernels.subspace._rows import parts

__all__ = ["Moments", "Sums", "unguarded"]

BLOCK_ROWS = 256  # checked at a time: a matrix of 3072 in fp64 and what torch makes of it to check it are 200 MB
QUARTIC_BYTES = 4 << 20  # rows that are widened to fp64 at a time


class Sums(NamedTuple):
    """Sums of one layer as read, before any check: [..., n, n] and [..., n], and which updates were finite."""

    matrix: Tensor
    total: Tensor
    weight: float
    rows: int
    updates: int
    first_bad: int | None
    quartic: Tensor | None = None  # sum |x|^4, then sum |x|^2 x, in fp64

    def checked(self, name: str) -> Sums:
        """Raise `NonFiniteError` naming the layer and the batch, `SubspaceMismatchError` if not symmetric."""
        blocks = [slice(first, first + BLOCK_ROWS) for first in range(0, self.matrix.shape[-1], BLOCK_ROWS)]
        bad = sum(int((~torch.isfinite(x)).sum()) for x in (self.total, *(self.matrix[..., b, :] for b in blocks)))
        if bad or self.first_bad is not None:
            where = "an overflow of the sum" if self.first_bad is None else f"batch {self.first_bad} (counted from 0)"
            raise NonFiniteError(
                f"{name}: {bad} of {self.matrix.numel() + self.total.numel()} sums are NaN or infinite, "
                f"the first of them from {where}, of {self.updates} seen"
            )
        if not all(torch.equal(self.matrix[..., b, :], self.matrix[..., :, b].mT) for b in blocks):
            error = float((self.matrix - self.matrix.mT).abs().max())
            raise SubspaceMismatchError(f"{name}: the covariance is not symmetric (by up to {error:.3e})")
        return self

    def covariance(self, centred: bool = False) -> Covariance:
        """What the sums say of [n, n] rows."""
        mean = self.total / self.weight if self.weight else self.total.clone()
        quartic = None if self.quartic is None else Quartic(float(self.quartic[0]), self.quartic[1:])
        if not centred:
            return Covariance(self.matrix, self.weight, mean, self.rows, False, quartic)
        matrix = torch.outer(mean, -self.weight * mean).add_(self.matrix)
        matrix.add_(matrix.mT.clone()).div_(2)
        return Covariance(matrix, self.weight, mean, self.rows, True, quartic)


class Moments:
    """Sum of x x^T and of x for rows [..., d], or head by head: [H, dh, dh] and [H, dh] from q [B, H, N, dh].

    Counts live on the host and are known from shapes, and which batch was the first bad one is decided on the device,
    so an update waits for nothing. Rows on another device are summed there first: d x d numbers travel, not the rows,
    and that device waits for them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, quartic: bool = False) -> None:
        self.matrix = torch.zeros((*shape, shape[-1]), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self.quartic = torch.zeros(1 + shape[-1], dtype=torch.float64, device=device) if quartic else None
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0.0
        self.rows = 0
        self.updates = 0
        self._lent = False

    def update(self, pieces: Iterable[Tensor], count: int, weighting: str) -> None:
        """Add one batch of `count` rows that comes in `pieces`."""
        if self._lent:
            self.matrix, self.total, self._lent = self.matrix.clone(), self.total.clone(), False
            self.quartic = None if self.quartic is None else self.quartic.clone()
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
        if self.quartic is not None:
            for part in parts(x, QUARTIC_BYTES):
                wide = part.reshape(-1, part.shape[-1]).double()
                power = wide.square().sum(-1)
                self.quartic[0].add_((power @ power).to(self.quartic.device))
                self.quartic[1:].add_((power @ wide).to(self.quartic.device))

    def sums(self) -> tuple[Sums, ...]:
        """The sums as they stand, lent and not copied: the next update works on a copy. Waits for the device."""
        good = int(self.good)
        bad = None if good == self.updates else good
        self._lent = True
        return (Sums(self.matrix, self.total, self.count, self.rows, self.updates, bad, self.quartic),)


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
