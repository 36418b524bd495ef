"""Drop-in optimizers whose updates are projected after the moments."""

from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim.project_updates import ProjectedUpdates, project_updates
from cl_kernels.optim.projected_adam import ProjectedAdam, ProjectedAdamW
from cl_kernels.optim.projected_sgd import ProjectedSGD

__all__ = [
    "ProjectedAdam",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "ProjectedSGD",
    "ProjectedUpdates",
    "project_updates",
]
