"""The compiled CUDA form of `projected_adam_step_` (csrc/projection.cu).

Small parameters (prompts, adapters) go through one launch, a block of threads for each. Large weights take three parts:
one launch makes all their updates, grouped matrix products project them (large.py), one launch adds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.projection.arguments import Step, distinct
from cl_kernels.ops.projection.large import Bucket, buckets
from cl_kernels.ops.projection.lists import KINDS, Lists, compute_dtype, lists_of
from cl_kernels.ops.projection.reference import BASIS, matrix_shape

__all__ = ["step_cuda"]

_SMALL_ROWS, _SMALL_ELEMENTS = 128, 1 << 17  # one block does 4 m d r operations alone: beyond this, far too many


@dataclass(slots=True)
class _Call:
    """Parameters of one device, of one pair of element types, and of one size class."""

    device: torch.device
    compute: torch.dtype
    small: bool
    which: list[int]
    lists: Lists
    workspace: Tensor
    buckets: list[Bucket] = field(default_factory=list)


def step_cuda(*arguments: Any) -> None:
    """Never waits for the device: learning rate, steps, scale and found_inf are read there if they live there."""
    s = Step(*arguments)
    if s.found_inf is not None and not all(step.is_cuda for step in s.steps):
        raise Unsupported("found_inf on the device needs the step counts there too")
    distinct(s)
    calls = [_call(s, key, which) for key, which in _kinds(s).items()]  # all memory is taken before the first write
    for call in calls:
        with torch.cuda.device(call.device):
            _launch(call, s)
        call.lists.write_back()
    for step in s.steps:
        if not step.is_cuda:
            step += 1


def _kinds(s: Step) -> dict[tuple[Any, ...], list[int]]:
    """The parameters that one call takes, by its kind; large ones of one shape stand beside each other."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, param in enumerate(s.params):
        moment = s.exp_avgs[i].dtype
        types = (param.dtype, moment) if (param.dtype, moment) in KINDS else (compute_dtype(moment),) * 2
        small = _is_small(param, s.left[i], s.right[i], s.forms[2 * i + 1])
        kinds.setdefault((param.device, *types, small, s.steps[i].is_cuda), []).append(i)
    for key, which in kinds.items():
        if not key[3]:
            which.sort(key=lambda i: _order(s, i))
    return kinds


def _order(s: Step, i: int) -> tuple[Any, ...]:
    sides = [() if m is None else (*m.shape, *m.stride(), str(m.dtype)) for m in (s.left[i], s.right[i])]
    return (*s.params[i].shape, -1, *sides[0], -1, *(-2 if isinstance(x, str) else x for x in sides[1]))


def _is_small(param: Tensor, left: Tensor | None, right: Tensor | None, right_form: int) -> bool:
    shape = matrix_shape(
        param.shape, None if left is None else left.shape[-2], None if right is None else right.shape[-2]
    )
    inner = 0 if right is None else right.shape[-1] if right_form == BASIS else param.shape[-1]
    return shape is None or (shape[1] <= _SMALL_ROWS and param.numel() <= _SMALL_ELEMENTS and inner <= 1024)


def _call(s: Step, key: tuple[Any, ...], which: list[int]) -> _Call:
    device, _, moment, small, on_device = key
    lists, compute = lists_of(s, which, host_steps=not on_device, sides=small, widen=True), compute_dtype(moment)
    values = 0
    for i, (batch, rows, columns) in zip(which, lists.shapes, strict=True):
        size = rows * columns
        if small:
            ranks = [0 if side is None else side.shape[-1] for side in (s.left[i], s.right[i])]
            size = (3 if _twice(s, i) else 2) * size + max(rows * ranks[1], ranks[0] * columns)
        values += batch * size
    workspace = torch.empty(max(values, 1), dtype=compute, device=device)
    return _Call(
        device, compute, small, which, lists, workspace, [] if small else buckets(s, which, lists.shapes, workspace)
    )


def _twice(s: Step, i: int) -> bool:
    sides = zip((s.left[i], s.right[i]), s.forms[2 * i : 2 * i + 2], strict=True)
    return any(m is not None and form == BASIS and m.dtype.itemsize == 2 for m, form in sides)


def _launch(call: _Call, s: Step) -> None:
    rate, lr = None, s.lr
    if s.lr_tensor is not None:
        if s.lr_tensor.is_cuda:
            rate = s.lr_tensor if s.lr_tensor.dtype in (torch.float32, torch.float64) else s.lr_tensor.double()
        else:
            lr = float(s.lr_tensor)
    read = [None if t is None else t.to(call.device, torch.float32) for t in (s.grad_scale, s.found_inf)]
    given, which = s.device_scales, call.which
    if given is not None:  # a selection sends its indices to the device
        given = (given if which == list(range(len(s.params))) else given[which]).contiguous()
    numbers = [x for i in which for x in (s.scales[4 * i : 4 * i + 4] or (1.0, 0.0, 1.0, 0.0))]
    numbers += [0.0 if s.steps[i].is_cuda else float(s.steps[i]) for i in which]
    args = (
        call.lists.pointers, call.lists.sizes, numbers, lr, s.beta1, s.beta2, s.eps, s.weight_decay,
        s.decoupled_weight_decay, s.project_decay, -1.0 if s.maximize else 1.0,
        0 if rate is None else rate.data_ptr(), rate is not None and rate.dtype == torch.float64,
        *(0 if t is None else t.data_ptr() for t in read), 0 if given is None else given.data_ptr(), not call.small,
        call.workspace.data_ptr(), torch.cuda.current_stream(call.device).cuda_stream,
    )  # fmt: skip
    module = _native.load()
    if call.small:
        module.projected_adam_cuda(0, *args)
        return
    module.projected_adam_cuda(1, *args)
    for bucket in call.buckets:
        bucket.project(given)
    module.projected_adam_cuda(2, *args)
