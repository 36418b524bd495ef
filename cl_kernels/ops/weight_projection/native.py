"""The compiled CPU forms of the steps (csrc/weight_projection_cpu.cpp)."""

from __future__ import annotations

from typing import Any

import torch

from cl_kernels.ops import _native
from cl_kernels.ops.weight_projection.arguments import Adam, Step, adam_step, distinct, sgd_step
from cl_kernels.ops.weight_projection.lists import lists_of

__all__ = ["base_fields", "ftp_adam_cpu", "ftp_sgd_cpu"]

_ADAM, _SGD = 0, 1  # csrc/weight_projection.h: BaseKind


def ftp_adam_cpu(*arguments: Any) -> None:
    """All parameters in one call; blocks of rows are spread over torch's threads."""
    _run(adam_step(*arguments))


def ftp_sgd_cpu(*arguments: Any) -> None:
    """All parameters in one call; blocks of rows are spread over torch's threads."""
    _run(sgd_step(*arguments))


def base_fields(s: Step, rate: float, grad_factor: float) -> tuple[Any, ...]:
    """Base step and rule as the module takes them: BaseKind, the fields of BaseSettings, those of RadiusRule."""
    base, rule = s.base, s.rule
    if isinstance(base, Adam):
        numbers: tuple[Any, ...] = (base.beta1, base.beta2, base.eps, base.decoupled)
    else:
        numbers = (base.momentum, base.dampening, 0.0, base.nesterov)
    kind = _ADAM if isinstance(base, Adam) else _SGD
    return kind, rate, s.weight_decay, *numbers, grad_factor, rule.kappa, rule.floor, rule.masked, rule.norm


def _run(s: Step) -> None:
    if s.found_inf is not None and s.found_inf.item():
        return
    distinct(s)
    lists = lists_of(s, [i for i, param in enumerate(s.params) if param.numel()])
    rate = s.lr if s.lr_tensor is None else float(s.lr_tensor)
    factor = (-1.0 if s.maximize else 1.0) / (1.0 if s.grad_scale is None else float(s.grad_scale))
    fields = base_fields(s, rate, factor)
    _native.load().ftp_step_cpu(lists.pointers, lists.sizes, lists.numbers, *fields, torch.get_num_threads())
    lists.write_back()
    for param, step in zip(s.params, s.steps, strict=True):
        if not param.numel():
            step += 1
