"""Continual runs: a stream of tasks, a trainer that feeds it to a method, metrics, checkpoints and exact resume."""

from cl_kernels.continual.config import RunConfig

__all__ = ["RunConfig"]
