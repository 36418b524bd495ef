"""Argument checks of the public functions. Each error names the argument, what was wanted and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError

__all__ = ["finite", "floating", "matrix", "no_overlap", "number", "same_device", "square", "tensor", "vector"]


def tensor(name: str, value: Any) -> Tensor:
    """`value` is a strided tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise RuntimeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


def floating(name: str, value: Any, *dtypes: torch.dtype) -> Tensor:
    """`value` is a real floating-point tensor, of one of `dtypes` if any is named."""
    checked = tensor(name, value)
    if not checked.is_floating_point() or (dtypes and checked.dtype not in dtypes):
        wanted = " or ".join(str(dtype) for dtype in dtypes) or "a real floating-point dtype"
        raise ValueError(f"{name}: expected {wanted}, got {checked.dtype}")
    return checked


def matrix(name: str, value: Any, *, rows: int | None = None, columns: int | None = None) -> Tensor:
    """`value` has shape [..., rows, columns]; None accepts any size."""
    checked = tensor(name, value)
    fits = checked.ndim >= 2 and rows in (None, checked.shape[-2]) and columns in (None, checked.shape[-1])
    if not fits:
        shape = f"[..., {'m' if rows is None else rows}, {'n' if columns is None else columns}]"
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(checked.shape)}")
    return checked


def square(name: str, value: Any) -> Tensor:
    """`value` has shape [..., d, d]."""
    checked = tensor(name, value)
    if checked.ndim < 2 or checked.shape[-1] != checked.shape[-2]:
        raise ValueError(f"{name}: expected shape [..., d, d], got {tuple(checked.shape)}")
    return checked


def vector(name: str, value: Any, size: int) -> Tensor:
    """`value` has shape [size]."""
    checked = tensor(name, value)
    if tuple(checked.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(checked.shape)}")
    return checked


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors are on one device."""
    if value.device != other.device:
        raise RuntimeError(
            f"{name} is on {value.device} but {other_name} is on {other.device}; move one with `.to(...)` first"
        )


def no_overlap(name: str, value: Tensor) -> None:
    """`value` can be written to: no two of its elements share memory (expanded tensors do)."""
    strides = value.stride()
    if 0 in strides and any(size > 1 and step == 0 for size, step in zip(value.shape, strides, strict=True)):
        raise ValueError(f"{name}: cannot be written to, it is expanded (strides {strides}); pass a `.clone()`")


def finite(name: str, value: Tensor) -> None:
    """No NaN or infinity. Reads one number from the device."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NonFiniteError(f"{name}: {bad} of {value.numel()} entries are NaN or infinite")


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf, *, closed: bool = True) -> float:
    """`value` is a number within [low, high], or within [low, high) when not `closed`; NaN never is."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (low <= value <= high) or (not closed and value == high):
        raise ValueError(f"Invalid {name} value: {value} (expected {low} <= {name} {'<=' if closed else '<'} {high})")
    return float(value)
