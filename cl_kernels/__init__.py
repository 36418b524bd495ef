"""cl_kernels: fused kernels for projection-based continual learning and robust fine-tuning.

Importing it compiles nothing, starts no CUDA context and imports no optional dependency.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cl_kernels import errors, ops
from cl_kernels._version import __version__
from cl_kernels.errors import (
    BackendUnavailableError,
    CheckpointError,
    NonFiniteError,
    SolverError,
    SubspaceError,
    SubspaceMismatchError,
)
from cl_kernels.ops._projector import Projector, Sides
from cl_kernels.ops._registry import explain, use_backend

if TYPE_CHECKING:
    from cl_kernels import continual, data, integrations, methods, nn, optim, subspace
    from cl_kernels.ops import rules
    from cl_kernels.subspace import CovarianceCollector, SubspaceStore

# Upper floors load on first use, so that `import cl_kernels` costs little more than `import torch`.
_MODULES = ("continual", "data", "integrations", "methods", "nn", "optim", "subspace")
_NAMES = {"CovarianceCollector": "subspace", "SubspaceStore": "subspace", "rules": "ops"}

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "CovarianceCollector",
    "NonFiniteError",
    "Projector",
    "Sides",
    "SolverError",
    "SubspaceError",
    "SubspaceMismatchError",
    "SubspaceStore",
    "__version__",
    "continual",
    "data",
    "errors",
    "explain",
    "integrations",
    "methods",
    "nn",
    "ops",
    "optim",
    "rules",
    "subspace",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"cl_kernels.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"cl_kernels.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'cl_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
