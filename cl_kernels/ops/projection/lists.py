"""Flat argument lists for csrc/projection_cpu.cpp and csrc/projection.cu.

The kernels take contiguous parameters, gradients of the parameters' type, and moments in float32, float64 or the
parameters' 16-bit type. Whatever else comes (channels-last weights, transposed views, mixed types) is worked on in a
copy and written back: a pass more for those, the same result. Lists are made with `map` over whole fields because the
host time of twelve small parameters is otherwise longer than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.projection.arguments import Step
from cl_kernels.ops.projection.reference import BASIS, NONE, TWICE, matrix_shape

__all__ = ["KINDS", "Lists", "compute_dtype", "lists_of"]

_16 = (torch.float16, torch.bfloat16)
# (parameter, moment) types that the kernels of both devices take as they are.
KINDS = frozenset(
    [(torch.float32, torch.float32), (torch.float64, torch.float64)] + [(w, m) for w in _16 for m in (torch.float32, w)]
)
_ABSENT = (NONE, 0, 0, 0, 0)
_T = TypeVar("_T")
_dtype = attrgetter("dtype")
_address = Tensor.data_ptr
_contiguous = Tensor.is_contiguous


@dataclass(slots=True)
class Lists:
    """What one call of the native module works on: flat lists (csrc/projection.h), and copies to write back."""

    pointers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # (batch, rows, columns) of each parameter
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

    def side(self, matrix: Tensor, compute: torch.dtype) -> Tensor:
        """A matrix, or a copy, of a type that the kernels read, with one stride of 1."""
        if matrix.ndim != 2:
            raise Unsupported("a batch of projectors for one parameter has no kernel")
        if matrix.dtype != compute and matrix.dtype not in _16:  # the CPU kernels read 16 bits themselves
            matrix = matrix.to(compute)
            self.held.append(matrix)
        if 1 not in matrix.stride():
            matrix = matrix.contiguous()
            self.held.append(matrix)
        return matrix


def compute_dtype(moment: torch.dtype) -> torch.dtype:
    """The type that a step with such moments is computed in."""
    return torch.float64 if moment == torch.float64 else torch.float32


def lists_of(
    s: Step,
    which: Sequence[int] | None = None,
    *,
    host_steps: bool = False,
    sides: bool = True,
    widen: bool = False,
) -> Lists:
    """The lists of the parameters `which` (None: all). `host_steps`: the caller counts the steps, the kernels do not.
    `sides` off: the caller multiplies by them. `widen`: 16-bit bases come in the compute type, copied in one launch.

    Raises `Unsupported` for what the kernels do not cover, `ValueError` for projectors that do not fit. All copies are
    made here, before anything is written.
    """

    def pick(values: list[_T]) -> list[_T]:
        return values if which is None or not values else [values[i] for i in which]

    params, grads, first, second, largest = (
        pick(values) for values in (s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, s.max_exp_avg_sqs)
    )
    left, right = pick(s.left), pick(s.right)
    lists = Lists()
    weights, moments = list(map(_dtype, params)), list(map(_dtype, first))
    if not (
        KINDS.issuperset(zip(weights, moments, strict=True))
        and weights == list(map(_dtype, grads))
        and moments == list(map(_dtype, second))
        and (not largest or moments == list(map(_dtype, largest)))
        and all(map(_contiguous, chain(params, grads, first, second, largest)))
    ):
        params, grads, first, second, largest = _converted(lists, [params, grads, first, second, largest])
        weights, moments = list(map(_dtype, params)), list(map(_dtype, first))
    lists.pointers = list(map(_address, chain(params, grads, first, second)))
    lists.pointers += map(_address, largest) if largest else [0] * len(params)
    if host_steps:
        lists.pointers += [0] * len(params)
    else:
        steps = pick(s.steps)
        if not all(step.dtype is torch.float32 and step.is_contiguous() for step in steps):
            steps = [lists.written(step, torch.float32) for step in steps]
        lists.pointers += map(_address, steps)
    forms: Sequence[int] = s.forms if which is None else [s.forms[2 * i + k] for i in which for k in (0, 1)]
    if widen and sides:
        both = [matrix for pair in zip(left, right, strict=True) for matrix in pair]
        forms = [TWICE if _narrow(m) and f == BASIS else f for m, f in zip(both, forms, strict=True)]
        left, right = _widened(lists, left, moments), _widened(lists, right, moments)
    _sides(lists, forms, params, left, right, list(zip(weights, moments, strict=True)), sides)
    return lists


def _converted(lists: Lists, fields: list[list[Tensor]]) -> list[list[Tensor]]:
    """The fields with copies in place of what the kernels cannot take."""
    out: list[list[Tensor]] = [[] for _ in fields]
    for param, grad, *state in zip(*fields[: 5 if fields[4] else 4], strict=True):
        weight, moment = param.dtype, state[0].dtype
        if (weight, moment) not in KINDS:
            weight = moment = compute_dtype(moment)
        out[0].append(lists.written(param, weight))
        if grad.dtype != weight or not grad.is_contiguous():
            grad = grad.to(weight).contiguous()
            lists.held.append(grad)
        out[1].append(grad)
        for target, value in zip(out[2:], state, strict=False):
            target.append(lists.written(value, moment))
    return out


def _sides(
    lists: Lists,
    forms: Sequence[int],
    params: list[Tensor],
    left: list[Tensor | None],
    right: list[Tensor | None],
    types: list[tuple[torch.dtype, torch.dtype]],
    wanted: bool,
) -> None:
    """Sizes of all parameters and addresses of their matrices; `forms` has two entries for each parameter."""
    codes, sizes, shapes = _native.DTYPE, lists.sizes, lists.shapes
    single, double, f32, f64 = torch.float32, torch.float64, codes[torch.float32], codes[torch.float64]
    columns: tuple[list[int], list[int]] = ([], [])
    at = 0
    for param, a, b, (weight, moment) in zip(params, left, right, types, strict=True):
        a_shape, b_shape = None if a is None else a.shape, None if b is None else b.shape
        shape = matrix_shape(
            param.shape, None if a_shape is None else a_shape[-2], None if b_shape is None else b_shape[-2]
        )
        if shape is None:
            raise ValueError(f"projectors do not fit shape {tuple(param.shape)}")
        shapes.append(shape)
        sizes += (*shape, codes[weight], codes[moment])
        compute, code = (double, f64) if moment is double else (single, f32)
        for addresses, matrix, size in ((columns[0], a, a_shape), (columns[1], b, b_shape)):
            form = forms[at]
            at += 1
            if matrix is None or size is None or not wanted:
                addresses.append(0)
                sizes += _ABSENT
                continue
            strides = matrix.stride()
            if matrix.dtype is compute and len(strides) == 2 and 1 in strides:  # what the optimizers keep
                addresses.append(_address(matrix))
                sizes += (form, size[1], *strides, code)
                continue
            if form == BASIS and matrix.dtype in _16:
                form = TWICE
            matrix = lists.side(matrix, compute)
            addresses.append(_address(matrix))
            sizes += (form, size[1], *matrix.stride(), codes[matrix.dtype])
    lists.pointers += columns[0]
    lists.pointers += columns[1]


def _narrow(matrix: Tensor | None) -> bool:
    return matrix is not None and matrix.dtype in _16


def _widened(lists: Lists, matrices: list[Tensor | None], moments: list[torch.dtype]) -> list[Tensor | None]:
    """The matrices with 16-bit ones in the compute type."""
    at = [i for i, matrix in enumerate(matrices) if _narrow(matrix)]
    if not at:
        return matrices
    out, narrow = list(matrices), [matrix for i in at if (matrix := matrices[i]) is not None]
    wide = [torch.empty_like(m, dtype=compute_dtype(moments[i])) for i, m in zip(at, narrow, strict=True)]
    torch._foreach_copy_(wide, narrow)
    lists.held += wide
    for i, matrix in zip(at, wide, strict=True):
        out[i] = matrix
    return out
