"""Flat argument lists for csrc/weight_projection_cpu.cpp and csrc/weight_projection.cu.

The kernels take parameters as rows of contiguous memory, gradients of the parameters' type, moments in float32, float64
or the parameters' 16-bit type, anchors in the parameters' type or 16 bits. Channels-last weights are taken as they lie
where all their tensors lie so: a row is still one stretch of memory, and its sums do not care for the order within.
Whatever else comes (other views, mixed types) is worked on in a copy and written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import nan
from operator import attrgetter

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
# (parameter, anchor) types, likewise.
_ANCHORED = frozenset([(w, w) for w, _ in KINDS] + [(torch.float32, a) for a in _16])
_FIELDS = 8  # csrc/weight_projection.h: weights, gradients, firsts, seconds, largests, anchors, steps, radii

_dtype = attrgetter("dtype")
_address = Tensor.data_ptr
_contiguous = Tensor.is_contiguous


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
    as_they_are = _all_as_they_are(s, which, host_steps)
    if as_they_are is not None:
        return as_they_are
    lists, codes = Lists(), _native.DTYPE
    columns: list[list[int]] = [[] for _ in range(_FIELDS)]
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
        lists.sizes += (*_rows(s, param), codes[weight], codes[moment], codes[base], codes[kind])
    lists.pointers = [pointer for column in columns for pointer in column]
    lists.numbers = _numbers(s, which, host_steps)
    return lists


def _all_as_they_are(s: Step, which: Sequence[int], host_steps: bool) -> Lists | None:
    """The lists where no parameter needs a copy, made field by field: a third of the host's time for 152 tensors."""
    every = len(which) == len(s.params)

    def pick(values: list[Tensor]) -> list[Tensor]:
        return values if every or not values else [values[i] for i in which]

    params, grads, anchors = pick(s.params), pick(s.grads), pick(s.anchors)
    state, steps, radii = [pick(values) for values in (s.firsts, s.seconds, s.largests)], pick(s.steps), pick(s.radii)
    weights, bases = list(map(_dtype, params)), list(map(_dtype, anchors))
    moments = list(map(_dtype, state[0])) if state[0] else weights
    records = set(map(_dtype, radii))
    usual = (
        KINDS.issuperset(zip(weights, moments, strict=True))
        and weights == list(map(_dtype, grads))
        and all(not values or moments == list(map(_dtype, values)) for values in state[1:])
        and (bases == weights or _ANCHORED.issuperset(zip(weights, bases, strict=True)))
        and len(records) <= 1
        and (host_steps or all(step.dtype is torch.float32 for step in steps))
        and all(map(_contiguous, chain(params, grads, *state, anchors, radii)))
    )
    if not usual:
        return None
    none = [0] * len(params)
    fields = [params, grads, *state, anchors, [] if host_steps else steps, radii]  # zero anchors have the address 0
    lists, codes = Lists(), _native.DTYPE
    lists.pointers = [pointer for values in fields for pointer in (map(_address, values) if values else none)]
    record = codes[next(iter(records), torch.float32)]
    for param, weight, moment, base in zip(params, weights, moments, bases, strict=True):
        lists.sizes += (*_rows(s, param), codes[weight], codes[moment], codes[base], record)
    lists.numbers = _numbers(s, which, host_steps)
    return lists


def _rows(s: Step, param: Tensor) -> tuple[int, int]:
    """Rows and their length."""
    rows = 1 if s.rule.norm == NORMS["l2"] or param.ndim < 2 else param.shape[0]
    return rows, param.numel() // rows


def _numbers(s: Step, which: Sequence[int], host_steps: bool) -> list[float]:
    rule = s.rule
    if len(rule.radius_lrs) == 1 and len(rule.fixed) <= 1 and not host_steps:
        return [rule.radius_lrs[0], rule.fixed[0] if rule.fixed else nan, 0.0] * len(which)
    out: list[float] = []
    for i in which:
        fixed = rule.fixed_radius(i)
        out += (rule.radius_lr(i), nan if fixed is None else fixed, float(s.steps[i]) if host_steps else 0.0)
    return out


def _as_they_lie(tensors: list[Tensor | None], dtypes: list[torch.dtype]) -> bool:
    """Whether all are of their types and dense in one order of elements whose outermost dimension is the first."""
    for value, dtype in zip(tensors, dtypes, strict=True):
        if value is not None and value.dtype != dtype:
            return False
    present = [value for value in tensors if value is not None]
    if all(value.is_contiguous() for value in present):
        return True
    return present[0].ndim == 4 and all(value.is_contiguous(memory_format=torch.channels_last) for value in present)
