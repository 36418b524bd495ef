"""Flat argument lists for csrc/weight_projection_cpu.cpp and csrc/weight_projection.cu.

The kernels take parameters as rows of contiguous memory, gradients of the parameters' type, moments in float32, float64
or the parameters' 16-bit type, anchors in the parameters' type or 16 bits. Channels-last weights are taken as they lie
where all their tensors lie so: a row is still one stretch of memory, and its sums do not care for the order within.
Whatever else comes (other views, mixed types) is worked on in a copy and written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops.weight_projection.arguments import Step, compute_dtype, is_absent
from cl_kernels.ops.weight_projection.reference import NORMS

__all__ = ["KINDS", "Lists", "kind_of", "lists_of"]

_16 = (torch.float16, torch.bfloat16)
# (parameter, moment) types that the kernels take as they are.
KINDS = frozenset(
    [(torch.float32, torch.float32), (torch.float64, torch.float64)] + [(w, m) for w in _16 for m in (torch.float32, w)]
)
_FIELDS = 8  # csrc/weight_projection.h: weights, gradients, firsts, seconds, largests, anchors, steps, radii


@dataclass(slots=True)
class Lists:
    """What one call of the native module works on, and copies to write back."""

    pointers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def write_back(self) -> None:
        """Copy results into the tensors that the kernels could not write themselves."""
        for target, value in self.copies:
            target.copy_(value)

    def written(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value`, or a copy that the kernels can write."""
        if value.dtype == dtype and value.is_contiguous():
            return value
        copy = value.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self.copies.append((value, copy))
        return copy

    def read(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value`, or a copy that the kernels can read."""
        if value.dtype == dtype and value.is_contiguous():
            return value
        copy = value.to(dtype).contiguous()
        self.held.append(copy)
        return copy


def kind_of(s: Step, i: int) -> tuple[torch.dtype, torch.dtype]:
    """The types of parameter and moments that a kernel works with."""
    weight = s.params[i].dtype
    moment = s.firsts[i].dtype if s.firsts else weight
    if (weight, moment) in KINDS and (not s.seconds or s.seconds[i].dtype == moment):
        return weight, moment
    return (compute_dtype(s, i),) * 2


def lists_of(s: Step, which: Sequence[int], *, host_steps: bool = False) -> Lists:
    """The lists for the parameters `which`, none of them empty. `host_steps`: the caller counts the steps.

    All copies are made here, before anything is written.
    """
    lists, codes = Lists(), _native.DTYPE
    columns: list[list[int]] = [[] for _ in range(_FIELDS)]
    whole, infinite = s.rule.norm == NORMS["l2"], nan
    for i in which:
        param, step, radius = s.params[i], s.steps[i], s.radii[i]
        weight, moment = kind_of(s, i)
        anchor = None if is_absent(s.anchors[i], param) else s.anchors[i]
        state = [values[i] if values else None for values in (s.firsts, s.seconds, s.largests)]
        base = weight if anchor is None or weight == torch.float64 or anchor.dtype not in _16 else anchor.dtype
        tensors = [param, s.grads[i], *state, anchor]
        if not _as_they_lie(tensors, [weight, weight, moment, moment, moment, base]):
            tensors = [
                lists.written(param, weight),
                lists.read(s.grads[i], weight),
                *(None if value is None else lists.written(value, moment) for value in state),
                None if anchor is None else lists.written(anchor, base),
            ]
        if not host_steps and step.dtype is not torch.float32:
            step = lists.written(step, torch.float32)
        kind = radius.dtype if radius.is_contiguous() else torch.float32
        pointers = [0 if value is None else value.data_ptr() for value in tensors]
        pointers += [0 if host_steps else step.data_ptr(), lists.written(radius, kind).data_ptr()]
        for column, pointer in zip(columns, pointers, strict=True):
            column.append(pointer)
        rows = 1 if whole or param.ndim < 2 else param.shape[0]
        lists.sizes += (rows, param.numel() // rows, codes[weight], codes[moment], codes[base], codes[kind])
        fixed = s.rule.fixed_radius(i)
        lists.numbers += (s.rule.radius_lr(i), infinite if fixed is None else fixed, float(step) if host_steps else 0.0)
    lists.pointers = [pointer for column in columns for pointer in column]
    return lists


def _as_they_lie(tensors: list[Tensor | None], dtypes: list[torch.dtype]) -> bool:
    """Whether all are of their types and dense in one order of elements whose outermost dimension is the first."""
    for value, dtype in zip(tensors, dtypes, strict=True):
        if value is not None and value.dtype != dtype:
            return False
    present = [value for value in tensors if value is not None]
    if all(value.is_contiguous() for value in present):
        return True
    return present[0].ndim == 4 and all(value.is_contiguous(memory_format=torch.channels_last) for value in present)
