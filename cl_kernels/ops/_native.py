"""The native module: loaded once, on first use, never a reason for an import to fail.

``load()`` gives the compiled module or None, ``why_missing()`` the reason in words. The module knows no torch: it
takes addresses, sizes, strides, dtype codes and a stream. torch is imported before it on purpose: both use OpenMP, and
the library that torch brings must be the one that both share.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["ABI", "DTYPE", "build_record", "cuda_built", "load", "why_missing"]

ABI = 3  # csrc/common/abi.h: kAbi
DTYPE: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def build_record() -> dict[str, Any]:
    """What the build wrote about itself: compilers, flags, architectures, reasons; empty when nothing was built."""
    path = Path(__file__).resolve().parents[1] / "_build_info.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@functools.cache
def _find() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("cl_kernels._C")
        found = module.abi_version()
    except ModuleNotFoundError as error:
        if error.name != "cl_kernels._C":
            return None, f"the native module does not load: {error}"
        reason = build_record().get("native_reason") or "it was not built (run `make native`, or install the package)"
        return None, f"no native module: {reason}"
    except Exception as error:  # a foreign libstdc++, a half-written file, a CUDA driver that is too old: anything
        return None, f"the native module does not load: {error}"
    if found != ABI:
        return None, f"the native module has ABI {found}, this package needs {ABI}; build it again (`make native`)"
    return module, None


def load() -> Any:
    """The compiled module, or None; the answer is found once and kept."""
    return _find()[0]


def why_missing() -> str | None:
    """Why ``load()`` gives None, in words; None when it gives the module."""
    return _find()[1]


def cuda_built() -> bool:
    """Whether the module is there and has its CUDA half; says nothing about a device or a driver."""
    module = load()
    return module is not None and bool(module.build_info()["cuda"])
