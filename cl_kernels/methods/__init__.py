"""Published continual learning methods, one per file, and the controls they are measured against."""

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._catalog import check, create, names, options, published
from cl_kernels.methods._options import Options
from cl_kernels.methods._protocol import Method
from cl_kernels.methods._schedule import multipliers
from cl_kernels.methods._task import Batch, Batches, Task, TaskRecord

__all__ = [
    "Batch",
    "Batches",
    "HeadMethod",
    "Method",
    "Options",
    "Task",
    "TaskRecord",
    "check",
    "create",
    "multipliers",
    "names",
    "options",
    "published",
]
