"""The compiled CPU forms of the primitives (csrc/weight_projection_rows_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops.weight_projection.arguments import apart, is_absent
from cl_kernels.ops.weight_projection.reference import NORMS

__all__ = ["displacement_products_cpu", "project_to_anchor_cpu", "rescale_cpu"]

_PROJECT, _PRODUCTS, _RESCALE = range(3)  # csrc/weight_projection.h: RowsTask
_16 = (torch.float16, torch.bfloat16)


def project_to_anchor_cpu(weight: Tensor, anchor: Tensor | None, radius: Tensor, norm: int) -> Tensor:
    """One pass over the weight and its anchor; blocks of rows are spread over torch's threads."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    if weight.numel():
        held = _readable(weight, anchor)
        radii = radius.to(torch.float64).contiguous()
        _run([_fields(weight, held, out.data_ptr(), radii, norm)], _PROJECT, norm)
    return out


def displacement_products_cpu(grads: list[Tensor], params: list[Tensor], anchors: list[Tensor]) -> Tensor:
    """All parameters in one call, one pass."""
    out = torch.zeros(len(params), 5, dtype=torch.float64)
    fields, held = [], []
    for i, param in enumerate(params):
        if not param.numel():
            continue
        weight = param.contiguous()
        grad = grads[i].to(weight.dtype).contiguous() if grads else None
        anchor = _readable(weight, None if is_absent(anchors[i], param) else anchors[i])
        held += [weight, grad, anchor]
        fields.append(_fields(weight, anchor, 0 if grad is None else grad.data_ptr(), out[i], 0))
    _run(fields, _PRODUCTS, 0)
    return out


def rescale_cpu(params: list[Tensor], anchors: list[Tensor], scales: list[Tensor], norm: int) -> None:
    """All parameters in one call, one pass; rows whose scale is 1 are not touched."""
    if not apart(params):
        raise ValueError("params: the same memory appears twice")
    fields, held = [], []
    copies: list[tuple[Tensor, Tensor]] = []
    for param, anchor, scale in zip(params, anchors, scales, strict=True):
        if not param.numel():
            continue
        weight = param.contiguous()
        if weight is not param:
            copies.append((param, weight))
        base = _readable(weight, None if is_absent(anchor, param) else anchor)
        wide = scale.to(torch.float64).contiguous()
        held += [weight, base, wide]
        fields.append(_fields(weight, base, 0, wide, norm))
    _run(fields, _RESCALE, norm)
    for target, value in copies:
        target.copy_(value)


def _readable(weight: Tensor, anchor: Tensor | None) -> Tensor | None:
    """The anchor, or a copy that the kernels read beside such a weight."""
    if anchor is None:
        return None
    taken = anchor.dtype == weight.dtype or (weight.dtype == torch.float32 and anchor.dtype in _16)
    return anchor.contiguous() if taken else anchor.to(weight.dtype).contiguous()


def _fields(weight: Tensor, anchor: Tensor | None, other: int, numbers: Tensor, norm: int) -> tuple[int, ...]:
    rows = 1 if norm == NORMS["l2"] or weight.ndim < 2 else weight.shape[0]
    return (
        _native.DTYPE[weight.dtype],
        _native.DTYPE[weight.dtype if anchor is None else anchor.dtype],
        weight.data_ptr(),
        0 if anchor is None else anchor.data_ptr(),
        other,
        numbers.data_ptr(),
        rows,
        weight.numel() // rows,
        1 if numbers.ndim and rows > 1 else 0,
    )


def _run(fields: list[tuple[int, ...]], task: int, norm: int) -> None:
    _native.load().anchored_rows_cpu(fields, task, norm, torch.get_num_threads())
