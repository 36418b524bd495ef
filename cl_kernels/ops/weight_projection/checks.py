"""What the public functions demand of their arguments. Each error names the argument, what was wanted and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops.weight_projection.reference import NORMS

__all__ = ["anchor", "entry", "lengths", "norm_code", "one_number", "per_parameter", "rule_numbers"]

_16 = (torch.float16, torch.bfloat16)


def norm_code(norm: str) -> int:
    """The number of a norm's name."""
    if norm not in NORMS:
        raise ValueError(f"Invalid norm value: {norm!r} (expected one of {', '.join(map(repr, NORMS))})")
    return NORMS[norm]


def lengths(count: int, **fields: Sequence[Any] | None) -> None:
    """Every list has one entry for each parameter; None stands for no list."""
    for name, values in fields.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected {count} entries, one for each parameter, got {len(values)}")


def one_number(**fields: Any) -> None:
    """Tensors among the fields hold one number."""
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")


def per_parameter(name: str, value: float | Sequence[float] | None, count: int, low: float) -> list[float]:
    """A number as a list of one, a list as it is; None is an empty list."""
    if value is None:
        return []
    if isinstance(value, Sequence):
        lengths(count, **{name: value})
        return [_checks.number(f"{name}[{i}]", x, low) for i, x in enumerate(value)]
    return [_checks.number(name, value, low)]


def rule_numbers(kappa: float, radius_floor: float) -> None:
    """kappa within [0, 1] and a positive, finite floor."""
    _checks.number("kappa", kappa, 0.0, 1.0)
    _checks.number("radius_floor", radius_floor, 0.0, math.inf, closed=False)
    if radius_floor < torch.finfo(torch.float32).tiny:  # the radius is a float32, and 0 means that it is fresh
        raise ValueError(f"Invalid radius_floor value: {radius_floor} (expected a positive float32)")


def anchor(name: str, value: Tensor | None, param_name: str, param: Tensor) -> None:
    """An anchor has its parameter's shape and device, and its dtype or a 16-bit one that is exact in it."""
    if value is None:
        return
    _checks.floating(name, value)
    _checks.same_device(name, value, param_name, param)
    if value.shape != param.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, but {param_name} has {tuple(param.shape)}")
    if value.dtype != param.dtype and (value.dtype not in _16 or param.dtype in _16):
        wanted = param.dtype if param.dtype in _16 else f"{param.dtype}, torch.bfloat16 or torch.float16"
        raise ValueError(f"{name}: expected {wanted}, like {param_name}, got {value.dtype}")


def entry(i: int, param: Tensor, grad: Tensor, state: list[Tensor], step: Tensor, base: Any, radius: Tensor) -> None:
    """One parameter of a step, with its gradient, moments, step count, anchor and radius."""
    name = f"params[{i}]"
    _checks.floating(name, param)
    _checks.floating(f"grads[{i}]", grad)
    _checks.floating(f"steps[{i}]", step)
    if step.numel() != 1:
        raise ValueError(f"steps[{i}]: expected one number, got shape {tuple(step.shape)}")
    for value in (grad, *state):
        _checks.floating(f"the gradient or moment of {name}", value)
        if value.shape != param.shape:
            raise ValueError(f"{name}: shape {tuple(param.shape)}, but its gradient or moment has {tuple(value.shape)}")
        _checks.same_device(name, param, "its gradient or moment", value)
    anchor(f"anchors[{i}]", base, name, param)
    _checks.floating(f"radii[{i}]", radius, torch.float32, torch.float64)
    _checks.vector(f"radii[{i}]", radius, 8)
    _checks.same_device(f"radii[{i}]", radius, name, param)
    for label, value in ((name, param), *((name, value) for value in state), (f"radii[{i}]", radius)):
        _checks.no_overlap(label, value)
    if base is not None:
        _checks.no_overlap(f"anchors[{i}]", base)
