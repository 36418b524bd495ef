"""The compiled forms of `projected_adam_step_`: argument lists for csrc/projection_cpu.cpp and projection.cu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_kernels.ops._registry import Unsupported

__all__ = ["step_cpu", "step_cuda"]


def step_cpu(params: list[Tensor], *args: Any) -> None:
    raise Unsupported("not there yet")


def step_cuda(params: list[Tensor], *args: Any) -> None:
    raise Unsupported("not there yet")
