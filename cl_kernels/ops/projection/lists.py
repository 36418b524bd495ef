"""Flat argument lists for csrc/projection_cpu.cpp and csrc/projection.cu.

The kernels take contiguous parameters of one element type. Whatever else comes (channels-last weights, transposed
views, 16-bit parameters on the CPU) is worked on in a copy and written back: a pass more for those, the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.projection.arguments import Step
from cl_kernels.ops.projection.reference import NONE, matrix_shape

__all__ = ["Lists"]


@dataclass(slots=True)
class Lists:
    """What one call of the native module works on: flat lists (csrc/projection.h), and copies to write back."""

    weight: torch.dtype
    moment: torch.dtype
    pointers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, s: Step, i: int, step: Tensor | None) -> tuple[int, int, int]:
        """Append parameter `i` but for its numbers; returns how it is seen, (batch, rows, columns).

        `step` is None if the host counts.
        """
        weight, moment, written = self.weight, self.moment, self._written
        param, grad, left, right = s.params[i], s.grads[i], s.left[i], s.right[i]
        if grad.dtype != weight or not grad.is_contiguous():
            grad = grad.to(weight).contiguous()
            self.held.append(grad)
        largest = written(s.max_exp_avg_sqs[i], moment) if s.max_exp_avg_sqs else 0
        self.pointers += (
            written(param, weight), grad.data_ptr(), written(s.exp_avgs[i], moment), written(s.exp_avg_sqs[i], moment),
            largest, 0 if step is None else written(step, torch.float32),
        )  # fmt: skip
        shape = matrix_shape(
            param.shape, None if left is None else left.shape[-2], None if right is None else right.shape[-2]
        )
        if shape is None:
            raise ValueError(f"projectors do not fit shape {tuple(param.shape)}")
        self.sizes += shape
        self._side(left, s.forms[2 * i])
        self._side(right, s.forms[2 * i + 1])
        return shape

    def write_back(self) -> None:
        """Copy results into the tensors that the kernels could not write themselves."""
        for target, value in self.copies:
            target.copy_(value)

    def _written(self, value: Tensor, dtype: torch.dtype) -> int:
        if value.dtype == dtype and value.is_contiguous():
            return value.data_ptr()
        copy = value.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self.copies.append((value, copy))
        return copy.data_ptr()

    def _side(self, matrix: Tensor | None, form: int) -> None:
        if matrix is None:
            self.pointers.append(0)
            self.sizes += (NONE, 0, 0, 0)
            return
        if matrix.ndim != 2:
            raise Unsupported("a batch of projectors for one parameter has no kernel")
        compute = torch.float64 if self.moment == torch.float64 else torch.float32
        if matrix.dtype != compute:
            matrix = matrix.to(compute)
            self.held.append(matrix)
        rows, columns = matrix.stride()
        if columns != 1 and rows != 1:
            matrix = matrix.contiguous()
            self.held.append(matrix)
            rows, columns = matrix.stride()
        self.pointers.append(matrix.data_ptr())
        self.sizes += (form, matrix.shape[1], rows, columns)
