"""Second moments as values: they add up over tasks and processes, shrink, and are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError

__all__ = ["Covariance", "PromptCovariance", "Quartic", "Shrinkage"]

Shrinkage = Literal["oas", "ledoit-wolf"]


@dataclass(frozen=True, eq=False)
class Quartic:
    """Sums over rows of |x|^4 (`fourth`) and |x|^2 x (`cubic` [d]), in fp64: what Ledoit-Wolf needs beside C."""

    fourth: float
    cubic: Tensor

    def centred(self, matrix: Tensor, mean: Tensor, rows: int) -> float:
        """sum |x - m|^4, from the uncentred `matrix` = sum x x^T."""
        m, c = mean.double(), matrix.double()
        size, power = float(m @ m), float(c.trace())
        crossed = float(m @ (c @ m))
        return (
            self.fourth + 4 * crossed - 3 * rows * size**2 + 2 * size * power - 4 * float(m @ self.cubic.to(m.device))
        )


@dataclass(frozen=True, eq=False)
class Covariance:
    """Sum of x x^T over rows: `matrix` [d, d], `count` of rows, `mean` [d] of x.

    `matrix` is a sum, so that tasks accumulate by addition; ``matrix / count`` is the second moment of a row. With
    weighting "batches" it is a sum of per-batch means and `count` is the number of batches. With `centred` collection
    it is the sum of (x - mean)(x - mean)^T. `rows` is the number of rows whatever the weighting, 0 if unknown.
    `quartic` is there if the collector was asked for it.
    """

    matrix: Tensor
    count: float
    mean: Tensor
    rows: int = 0
    centred: bool = False
    quartic: Quartic | None = None

    def merge(self, other: Covariance) -> Covariance:
        """Both together, as if collected in one pass: order does not matter beyond rounding.

        Centred sums gain the scatter between their means, n1 n2 / (n1 + n2) (m1 - m2)(m1 - m2)^T. Raises
        `SubspaceMismatchError` for another dimension, or if only one of the two is centred.
        """
        if self.matrix.shape != other.matrix.shape:
            raise SubspaceMismatchError(
                f"other: expected a matrix of shape {tuple(self.matrix.shape)}, got {tuple(other.matrix.shape)}"
            )
        if self.centred != other.centred:
            raise SubspaceMismatchError("other: one of the two covariances is centred, the other is not")
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count if count else self.mean
        matrix = self.matrix + other.matrix
        if self.centred and count:
            apart = self.mean - other.mean
            matrix.add_(torch.outer(apart, apart), alpha=self.count * other.count / count)
        quartic = None
        if self.quartic is not None and other.quartic is not None:
            quartic = Quartic(self.quartic.fourth + other.quartic.fourth, self.quartic.cubic + other.quartic.cubic)
        return Covariance(matrix, count, mean, self.rows + other.rows, self.centred, quartic)

    def shrinkage(self, method: Shrinkage = "oas") -> float:
        """The weight rho in [0, 1] of the identity in ``(1 - rho) S + rho (tr S / d) I``, S = matrix / count.

        "oas" (Chen et al., 2010) supposes normal rows and needs S, n = `rows` and d; "ledoit-wolf" (2004) supposes
        nothing of their distribution and needs sum |x|^4 as well: collect with ``shrinkage="ledoit-wolf"``. Both
        suppose independent rows: tokens of one image are not, so that the true need is larger. Raises `ValueError` for
        what is missing. Cost: one pass over the matrix.
        """
        if method not in ("oas", "ledoit-wolf"):
            raise ValueError(f"method: expected 'oas' or 'ledoit-wolf', got {method!r}")
        if not self.rows or not self.count:
            raise ValueError("rows: shrinkage depends on their number, which is unknown or 0")
        d, n = len(self.matrix), self.rows
        if d == 1:
            return 0.0  # whatever it were, the result is the same
        second = self.matrix.double() / self.count
        power, energy = float(second.trace()) / d, float(second.square().sum())
        if method == "oas":
            top, bottom = energy / d**2 + power**2, (n + 1) * (energy / d**2 - power**2 / d)
            return 1.0 if bottom == 0 else min(top / bottom, 1.0)
        noise, spread = (self._fourth() / n - energy) / (d * n), (energy - d * power**2) / d
        noise = min(noise, spread)
        return 0.0 if noise <= 0 else noise / spread

    def shrunk(self, method: Shrinkage = "oas") -> Covariance:
        """Pulled towards a multiple of the identity, with the same trace: ``(1 - rho) C + rho (tr C / d) I``.

        It matters when rows are few against the dimension (n below about 4 d): S then has n directions of energy and
        d - n of none, which look free only because nothing was seen there. Shrinking keeps the eigenvectors and their
        order, so `rules.Rank` chooses the same ones; it lifts the small eigenvalues by rho tr S / d, so that rules with
        a threshold (Energy, RatioToLargest, Threshold) protect unseen directions instead of giving them away. Shrink
        after merging tasks, never before: sums add up, shrunk ones do not. See `shrinkage` for methods and errors.
        """
        rho = self.shrinkage(method)
        matrix = self.matrix * (1 - rho)
        matrix.diagonal().add_(rho * float(self.matrix.double().trace()) / len(matrix))
        return Covariance(matrix, self.count, self.mean, self.rows, self.centred, None)

    def _fourth(self) -> float:
        if self.quartic is None:
            raise ValueError(
                "method: 'ledoit-wolf' needs the sum of |x|^4; collect with CovarianceCollector(..., "
                'shrinkage="ledoit-wolf"), or use "oas"'
            )
        if not self.centred:
            return self.quartic.fourth
        uncentred = self.matrix.double() + self.count * torch.outer(self.mean.double(), self.mean.double())
        return self.quartic.centred(uncentred, self.mean, self.rows)


@dataclass(frozen=True, eq=False)
class PromptCovariance:
    """What one prompted block protects: `left` [M, M] of the softmax mass, `right` [D, D] of queries x key weight."""

    left: Covariance
    right: Covariance

    def merge(self, other: PromptCovariance) -> PromptCovariance:
        """Both together, side by side."""
        return PromptCovariance(self.left.merge(other.left), self.right.merge(other.right))

    def shrunk(self, method: Shrinkage = "oas") -> PromptCovariance:
        """Both sides shrunk."""
        return PromptCovariance(self.left.shrunk(method), self.right.shrunk(method))
