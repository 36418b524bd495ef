"""Continual runs: a stream of tasks, a trainer that feeds it to a method, metrics, checkpoints and exact resume."""

from cl_kernels.continual import metrics, stream, transforms
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.trainer import RunStopped, run

__all__ = ["RunConfig", "RunStopped", "metrics", "run", "stream", "transforms"]
