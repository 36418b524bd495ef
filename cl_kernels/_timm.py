"""The one place that imports timm, and the reason it is one place: torchvision beside a CPU build of torch.

timm imports torchvision. A torchvision wheel built for CUDA cannot load its operators beside a CPU torch; its import
then fails with ``operator torchvision::nms does not exist``, although nothing here (nor in timm's ViTs) uses those
operators. Declaring their two schemas is enough for the import to pass. That is done only when torch has no CUDA and
torchvision has already failed for this very reason.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["import_timm"]

_INSTALL = 'pip install "cl-kernels[timm]"'
_SHIM: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def _declare_torchvision_operators() -> None:
    """Declare the schemas that torchvision's import looks up, once for the process."""
    if _SHIM:
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SHIM.append(library)


def _forget(package: str) -> None:
    """Drop the halves that a failed import leaves in ``sys.modules``."""
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]


def import_timm() -> ModuleType:
    """Import timm, beside a CPU torch too, and return the module.

    Raises ``ImportError`` with the install line when timm or torchvision is missing or cannot be loaded.
    """
    loaded = sys.modules.get("timm")
    if loaded is not None and hasattr(loaded, "create_model"):
        return loaded
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::" not in str(error):
            raise ImportError(f"torchvision, which timm needs, does not load: {error}; try: {_INSTALL}") from error
        _forget("torchvision")
        _declare_torchvision_operators()
    except ImportError as error:
        raise ImportError(
            f"timm needs torchvision, which is not there ({error}); install both with: {_INSTALL}"
        ) from error
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        _forget("timm")
        raise ImportError(f"timm cannot be imported ({error}); install it with: {_INSTALL}") from error
    return timm
