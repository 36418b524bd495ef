"""What a model remembers: second moments of what its layers see, and the projectors made from them."""

from cl_kernels.subspace._covariance import Covariance, PromptCovariance
from cl_kernels.subspace.build import build_store
from cl_kernels.subspace.collector import CovarianceCollector
from cl_kernels.subspace.covariance_files import load_covariances, save_covariances
from cl_kernels.subspace.growth import Growth, grow_basis
from cl_kernels.subspace.layernorm import fold_gain_and_centring, fold_sigma, sphere_update, tangent_update
from cl_kernels.subspace.prompts import PromptMoments
from cl_kernels.subspace.store import SideReport, SubspaceStore

__all__ = [
    "Covariance",
    "CovarianceCollector",
    "Growth",
    "PromptCovariance",
    "PromptMoments",
    "SideReport",
    "SubspaceStore",
    "build_store",
    "fold_gain_and_centring",
    "fold_sigma",
    "grow_basis",
    "load_covariances",
    "save_covariances",
    "sphere_update",
    "tangent_update",
]
