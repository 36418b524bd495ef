"""Drop-in optimizers: their updates are projected after the moments, or their weights stay near an anchor."""

from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim.ftp_adam import FTPAdamW
from cl_kernels.optim.ftp_sgd import FTPSGD
from cl_kernels.optim.project_updates import ProjectedUpdates, project_updates
from cl_kernels.optim.projected_adam import ProjectedAdam, ProjectedAdamW
from cl_kernels.optim.projected_sgd import ProjectedSGD

__all__ = [
    "FTPSGD",
    "FTPAdamW",
    "ProjectedAdam",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "ProjectedSGD",
    "ProjectedUpdates",
    "project_updates",
]
