"""The compiled CUDA form of the FTP steps (csrc/weight_projection.cu): three launches for all parameters of a type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops._registry import Unsupported
from cl_kernels.ops.weight_projection.arguments import Step, adam_step, compute_dtype, distinct, sgd_step
from cl_kernels.ops.weight_projection.lists import Lists, kind_of, lists_of
from cl_kernels.ops.weight_projection.native import base_fields

__all__ = ["ftp_adam_cuda", "ftp_sgd_cuda"]

_PART = 8192  # csrc/weight_projection_rows.h: kPart
_ROW_BYTES, _VERDICT_BYTES = 16, 8
_SIZES = 6  # csrc/weight_projection.h: kAnchoredSizes
_Key = tuple[torch.device, torch.dtype, torch.dtype, bool]


def ftp_adam_cuda(*arguments: Any) -> None:
    """Never waits for the device: learning rate, steps, scale and found_inf are read there if they live there."""
    _step(adam_step(*arguments))


def ftp_sgd_cuda(*arguments: Any) -> None:
    """As `ftp_adam_cuda`."""
    _step(sgd_step(*arguments))


def _step(s: Step) -> None:
    if any(compute_dtype(s, i) is torch.float64 for i in range(len(s.params))):
        raise Unsupported("the CUDA kernels compute in float32, some parameter or moment is float64")
    if any(radius.dtype is not torch.float32 for radius in s.radii):
        raise Unsupported("the CUDA kernels keep radii in float32")
    if s.found_inf is not None and not all(map(_is_there, s.steps)):
        raise Unsupported("found_inf on the device needs the step counts there too")
    distinct(s)
    kinds: dict[_Key, list[int]] = {}
    for i, param in enumerate(s.params):
        if param.numel():
            kinds.setdefault((param.device, *kind_of(s, i), _is_there(s.steps[i])), []).append(i)
    calls = []
    for key, which in kinds.items():  # all memory is taken before the first write
        lists = lists_of(s, which, host_steps=not key[3])
        calls.append((key[0], lists, torch.empty(_workspace(lists), dtype=torch.uint8, device=key[0])))
    for device, lists, workspace in calls:
        with torch.cuda.device(device):
            _launch(s, device, lists, workspace)
        lists.write_back()
    for param, step in zip(s.params, s.steps, strict=True):
        if not _is_there(step):
            step += 1
        elif not param.numel():
            step += 1 if s.found_inf is None else (s.found_inf == 0).reshape(())


def _workspace(lists: Lists) -> int:
    rows, columns = lists.sizes[::_SIZES], lists.sizes[1::_SIZES]
    slots = sum(r * -(-c // _PART) for r, c in zip(rows, columns, strict=True))
    return slots * _ROW_BYTES + len(rows) * _VERDICT_BYTES


def _launch(s: Step, device: torch.device, lists: Lists, workspace: Tensor) -> None:
    rate, lr = None, s.lr
    if s.lr_tensor is not None:
        if _is_there(s.lr_tensor):
            rate = s.lr_tensor.to(device)
            rate = rate if rate.dtype in (torch.float32, torch.float64) else rate.double()
        else:
            lr = float(s.lr_tensor)
    scale, found = (None if t is None else t.to(device, torch.float32) for t in (s.grad_scale, s.found_inf))
    _native.load().ftp_step_cuda(
        lists.pointers, lists.sizes, lists.numbers, *base_fields(s, lr, -1.0 if s.maximize else 1.0), _address(rate),
        rate is not None and rate.dtype is torch.float64, _address(scale), _address(found), workspace.data_ptr(),
        torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip


def _is_there(number: Tensor) -> bool:
    """Whether the kernels can read a count or a rate themselves."""
    return number.is_cuda


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
