"""The compiled CPU form of `projected_adam_step_` (csrc/projection_cpu.cpp)."""

from __future__ import annotations

from typing import Any

import torch

from cl_kernels.ops import _native
from cl_kernels.ops.projection.arguments import Step, distinct
from cl_kernels.ops.projection.lists import lists_of

__all__ = ["step_cpu"]


def step_cpu(*arguments: Any) -> None:
    """All parameters in one call; blocks of rows are spread over torch's threads."""
    s = Step(*arguments)
    if s.found_inf is not None and s.found_inf.item():
        return
    distinct(s)
    lists = lists_of(s)
    scales = s.scales if s.device_scales is None else s.device_scales.flatten().tolist()
    rate = s.lr if s.lr_tensor is None else float(s.lr_tensor)
    factor = (-1.0 if s.maximize else 1.0) / (1.0 if s.grad_scale is None else float(s.grad_scale))
    _native.load().projected_adam_cpu(
        lists.pointers, lists.sizes, [*scales, *[0.0] * len(s.params)], rate, s.beta1, s.beta2, s.eps, s.weight_decay,
        s.decoupled_weight_decay, s.project_decay, factor, torch.get_num_threads(),
    )  # fmt: skip
    lists.write_back()
