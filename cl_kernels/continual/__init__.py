"""Continual runs: a stream of tasks, a trainer that feeds it to a method, metrics, checkpoints and exact resume."""

from cl_kernels.continual import metrics, stream, transforms
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.deployed import Deployed, load_model, save_model
from cl_kernels.continual.reopened import load_run
from cl_kernels.continual.trainer import RunStopped, run

__all__ = [
    "Deployed",
    "RunConfig",
    "RunStopped",
    "load_model",
    "load_run",
    "metrics",
    "run",
    "save_model",
    "stream",
    "transforms",
]
