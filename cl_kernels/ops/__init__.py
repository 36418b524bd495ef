"""Operations: tensors in, tensors out, no objects with state. One room per operation."""

from cl_kernels.ops import rules
from cl_kernels.ops._projector import Projector, Sides
from cl_kernels.ops._registry import backend, explain, use_backend

__all__ = ["Projector", "Sides", "backend", "explain", "rules", "use_backend"]
