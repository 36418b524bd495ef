"""The compiled forms of `projected_adam_step_`: argument lists for csrc/projection_cpu.cpp and projection.cu.

The kernels take contiguous parameters of one element type. Whatever else comes (channels-last weights, transposed
views, 16-bit parameters) is worked on in a copy and written back: a pass more for those parameters, the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.projection.reference import NONE, matrix_shape

__all__ = ["step_cpu", "step_cuda"]


@dataclass(slots=True)
class _Batch:
    """What one call of the native module works on: flat lists (csrc/projection.h), and copies to write back."""

    pointers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def step_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    left: list[Tensor | None],
    right: list[Tensor | None],
    forms: list[int],
    scales: list[float],
    device_scales: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    project_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """All parameters in one call for each element type; blocks of rows are spread over torch's threads."""
    if found_inf is not None and found_inf.item():
        return
    if device_scales is not None:
        scales = device_scales.flatten().tolist()
    distinct([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs], grads)
    batches: dict[torch.dtype, _Batch] = {}
    for i, param in enumerate(params):
        work = torch.float64 if exp_avgs[i].dtype == torch.float64 else torch.float32
        batch = batches.get(work)
        if batch is None:
            batch = batches[work] = _Batch()
        largest = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        written = [param, exp_avgs[i], exp_avg_sqs[i], largest]
        _add(batch, work, written, grads[i], steps[i], (left[i], right[i]), forms[2 * i : 2 * i + 2])
        batch.numbers += (*scales[4 * i : 4 * i + 4], 0.0)
    rate = lr if lr_tensor is None else float(lr_tensor)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    module = _native.load()
    for work, batch in batches.items():
        module.projected_adam_cpu(
            batch.pointers, batch.sizes, batch.numbers, _native.DTYPE[work], rate, beta1, beta2, eps, weight_decay,
            decoupled_weight_decay, project_decay, factor, torch.get_num_threads(),
        )  # fmt: skip
        for target, value in batch.copies:
            target.copy_(value)


def _add(
    batch: _Batch,
    work: torch.dtype,
    written: Sequence[Tensor | None],
    grad: Tensor,
    step: Tensor,
    sides: tuple[Tensor | None, Tensor | None],
    forms: list[int],
) -> None:
    param = written[0]
    if param is None:  # never: the first of the written tensors
        return
    for value in written:
        if value is None:
            batch.pointers.append(0)
            continue
        if value.dtype != work or not value.is_contiguous():
            copy = value.to(work, memory_format=torch.contiguous_format, copy=True)
            batch.copies.append((value, copy))
            value = copy
        batch.pointers.append(value.data_ptr())
    if grad.dtype != work or not grad.is_contiguous():
        grad = grad.to(work).contiguous()
        batch.held.append(grad)
    batch.pointers.insert(len(batch.pointers) - 3, grad.data_ptr())
    if step.dtype != torch.float32:
        copy = step.float()
        batch.copies.append((step, copy))
        step = copy
    batch.pointers.append(step.data_ptr())
    shape = matrix_shape(param.shape, *(None if side is None else side.shape[-2] for side in sides))
    if shape is None:
        raise ValueError(f"projectors do not fit shape {tuple(param.shape)}")
    batch.sizes += shape
    for matrix, form in zip(sides, forms, strict=True):
        if matrix is None or form == NONE:
            batch.pointers.append(0)
            batch.sizes += (NONE, 0, 0, 0)
            continue
        if matrix.ndim != 2:
            raise Unsupported("a batch of projectors for one parameter has no kernel")
        if matrix.dtype != work:
            matrix = matrix.to(work)
            batch.held.append(matrix)
        rows, columns = matrix.stride()
        if columns != 1 and rows != 1:
            matrix = matrix.contiguous()
            batch.held.append(matrix)
            rows, columns = matrix.stride()
        batch.pointers.append(matrix.data_ptr())
        batch.sizes += (form, matrix.shape[1], rows, columns)


def distinct(written: list[Tensor], read: list[Tensor]) -> None:
    """No tensor is written twice, and no gradient is written: kernels run parameters side by side."""
    outputs = [t.data_ptr() for t in written if t.numel()]
    if len(set(outputs)) != len(outputs) or not set(outputs).isdisjoint(t.data_ptr() for t in read if t.numel()):
        raise ValueError("params, moments and gradients: the same memory appears twice")


def step_cuda(params: list[Tensor], *args: Any) -> None:
    raise Unsupported("not there yet")
