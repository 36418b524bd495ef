"""Norms of the rows of a parameter, also where its rows lie in several processes."""

from __future__ import annotations

from torch import Tensor

from cl_kernels.ops.weight_projection import NORMS
from cl_kernels.ops.weight_projection.reference import as_rows, row_norms
from cl_kernels.optim import _shards

__all__ = ["is_one_row", "largest", "mean"]


def is_one_row(parameter: Tensor, norm: str) -> bool:
    """A vector or a scalar is one row, and in the norm "l2" every tensor."""
    return parameter.ndim < 2 or norm == "l2"


def largest(values: Tensor, parameter: Tensor, norm: str) -> Tensor:
    """The largest row norm, 0-d; `values` is this process's part of something like `parameter`."""
    if is_one_row(parameter, norm):
        return _single(values, parameter, norm)
    norms = row_norms(as_rows(values, NORMS[norm]), NORMS[norm])
    top = norms.amax() if norms.numel() else values.new_zeros(())
    return _shards.summed(top[None], [parameter], largest=True)[0]


def mean(values: Tensor, parameter: Tensor, norm: str) -> Tensor:
    """The mean row norm, 0-d; `values` as in `largest`."""
    if is_one_row(parameter, norm):
        return _single(values, parameter, norm)
    total = row_norms(as_rows(values, NORMS[norm]), NORMS[norm]).sum()
    return _shards.summed(total[None], [parameter])[0] / max(parameter.shape[0], 1)


def _single(values: Tensor, parameter: Tensor, norm: str) -> Tensor:
    part = values.abs().sum() if norm == "row_l1" else values.square().sum()
    total = _shards.summed(part[None], [parameter])[0]
    return total if norm == "row_l1" else total.sqrt()
