"""Drop-in optimizers: their updates are projected after the moments, or their weights stay near an anchor."""

from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim.ftp_adam import FTPAdamW
from cl_kernels.optim.ftp_sgd import FTPSGD
from cl_kernels.optim.l2_sp_adamw import L2SPAdamW
from cl_kernels.optim.project_updates import ProjectedUpdates, project_updates
from cl_kernels.optim.projected_adam import ProjectedAdam, ProjectedAdamW
from cl_kernels.optim.projected_sgd import ProjectedSGD
from cl_kernels.optim.spd_adamw import SPDAdamW
from cl_kernels.optim.tpgm import TPGM
from cl_kernels.optim.wise_ft import wise_ft

__all__ = [
    "FTPSGD",
    "TPGM",
    "FTPAdamW",
    "L2SPAdamW",
    "ProjectedAdam",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "ProjectedSGD",
    "ProjectedUpdates",
    "SPDAdamW",
    "project_updates",
    "wise_ft",
]
