"""The compiled CPU form of `projected_adam_step_` (csrc/projection_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops import _native
from cl_kernels.ops.projection.lists import Lists, distinct

__all__ = ["step_cpu"]


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
    calls: dict[torch.dtype, Lists] = {}
    for i, param in enumerate(params):
        work = torch.float64 if exp_avgs[i].dtype == torch.float64 else torch.float32
        lists = calls.get(work)
        if lists is None:
            lists = calls[work] = Lists(work, work)
        moments = (exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1])
        lists.add(param, grads[i], moments, steps[i], (left[i], right[i]), forms[2 * i : 2 * i + 2])
        lists.numbers += (*scales[4 * i : 4 * i + 4], 0.0)
    rate = lr if lr_tensor is None else float(lr_tensor)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    module = _native.load()
    for work, lists in calls.items():
        module.projected_adam_cpu(
            lists.pointers, lists.sizes, lists.numbers, _native.DTYPE[work], rate, beta1, beta2, eps, weight_decay,
            decoupled_weight_decay, project_decay, factor, torch.get_num_threads(),
        )  # fmt: skip
        lists.write_back()
