"""The values that rooms share: a projector `identity * I - span * V V^T`, and the pair that acts on a matrix."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Projector", "Sides"]

Side = Literal["left", "right"]


class Projector(NamedTuple):
    """`P = identity * I - span * V V^T` with orthonormal `V = basis` of shape [..., d, r], r may be 0.

    With `identity = span = 1` it removes the span of V (V holds protected directions); with `identity = 0, span = -1`
    it keeps only the span of V (V holds free directions). So the sign of `span` says what V holds, for r = 0 too: with
    `identity = 1 - mix, span = -mix` an empty V means that nothing is free, while c I with `span = 0` only scales.
    `identity` and `span` are numbers, or tensors of the batch shape. When `dense` is given, P is that matrix as it is
    and the other fields are ignored: see `from_dense`. Applying it costs 4 m d r operations for an [m, d] matrix,
    against 2 m d^2 for the dense product.
    """

    basis: Tensor
    identity: float | Tensor = 1.0
    span: float | Tensor = 1.0
    dense: Tensor | None = None

    @classmethod
    def from_dense(cls, matrix: Tensor) -> Projector:
        """Wrap a symmetric [..., d, d] matrix without decomposing it. Raises `ValueError` unless it is square."""
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"matrix: expected [..., d, d], got {tuple(matrix.shape)}")
        return cls(matrix.new_empty((*matrix.shape[:-1], 0)), 0.0, 0.0, matrix)

    @property
    def dim(self) -> int:
        """The size d of the space that P acts on."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        """The number of columns of V. It is the rank of neither P nor I - P when P is dense or V is zero-padded."""
        return self.basis.shape[-1]

    def matrix(self) -> Tensor:
        """P as a [..., d, d] tensor, for small d and for tests."""
        if self.dense is not None:
            return self.dense
        eye = torch.eye(self.dim, dtype=self.basis.dtype, device=self.basis.device)
        return _over(self.identity, self.basis) * eye - _over(self.span, self.basis) * (self.basis @ self.basis.mT)

    def apply(self, x: Tensor, side: Side = "right") -> Tensor:
        """`x P` for side "right" (x is [..., m, d]), `P x` for side "left" (x is [..., d, m])."""
        if side not in ("left", "right"):
            raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
        if self.dense is not None:
            return x @ self.dense if side == "right" else self.dense @ x
        scaled = _over(self.identity, self.basis) * x
        if self.rank == 0:
            return scaled
        v = self.basis
        inner = (x @ v) @ v.mT if side == "right" else v @ (v.mT @ x)
        return scaled - _over(self.span, self.basis) * inner

    def to(self, *args: Any, **kwargs: Any) -> Projector:
        """A copy converted as `Tensor.to` converts; numbers stay numbers."""
        identity, span = (
            scale.to(*args, **kwargs) if isinstance(scale, Tensor) else scale for scale in (self.identity, self.span)
        )
        dense = None if self.dense is None else self.dense.to(*args, **kwargs)
        return Projector(self.basis.to(*args, **kwargs), identity, span, dense)


class Sides(NamedTuple):
    """Projectors of an update U [m, d]: `left U right`; None leaves that side alone."""

    left: Projector | None = None
    right: Projector | None = None

    @classmethod
    def of(cls, value: Projector | Sides | tuple[Projector | None, Projector | None]) -> Sides:
        """A lone projector acts on the last dimension, that is on the right; a pair is (left, right)."""
        if isinstance(value, Sides):
            return value
        if isinstance(value, Projector):
            return cls(None, value)
        if isinstance(value, tuple) and len(value) == 2 and all(v is None or isinstance(v, Projector) for v in value):
            return cls(*value)
        raise TypeError(f"value: expected a Projector or a (left, right) pair of them, got {type(value).__name__}")


def _over(scale: float | Tensor, basis: Tensor) -> float | Tensor:
    """Broadcast a batch of scales over [..., rows, columns], in the basis' dtype."""
    if isinstance(scale, Tensor):
        return scale.to(basis)[..., None, None] if scale.ndim else scale.to(basis)
    return scale
