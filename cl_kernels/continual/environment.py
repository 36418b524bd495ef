"""Where a run ran: versions and devices, the same for every run on one machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from cl_kernels._version import __version__
from cl_kernels.errors import BackendUnavailableError

__all__ = ["environment", "pick_device", "pick_precision"]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where a kernel runs on it. Raises `ValueError` or
    `BackendUnavailableError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("device: cuda was asked for, but torch sees no CUDA device; use device='cpu'")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of training; float32 means no autocast, and is all there is on the CPU."""
    if device.type != "cuda" or name == "float32":
        return torch.float32
    if name == "float16":
        return torch.float16
    return torch.bfloat16 if name == "bfloat16" or torch.cuda.is_bf16_supported() else torch.float32


def environment(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """The section of results.json."""
    return {
        "cl_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
    }
