"""Operations: tensors in, tensors out, no objects with state. One room per operation."""

from cl_kernels.ops import rules
from cl_kernels.ops._projector import Projector, Sides
from cl_kernels.ops._registry import backend, explain, use_backend
from cl_kernels.ops.covariance import (
    expand_head_grams,
    update_covariance_,
    update_covariances_,
    update_head_grams_,
)
from cl_kernels.ops.distillation import distillation_loss, dkd_loss, jsd_loss, kl_loss, linear_kl_loss
from cl_kernels.ops.null_space import log_odds_filter, null_space_projector, spectral_projector, symmetric_eigh
from cl_kernels.ops.orthogonal_qr import extend_basis, orthogonality_penalty, polar, qr
from cl_kernels.ops.prefix_attention import prefix_attention
from cl_kernels.ops.projection import project, projected_adam_step_
from cl_kernels.ops.weight_projection import ftp_adam_step_, ftp_sgd_step_, project_to_anchor

__all__ = [
    "Projector",
    "Sides",
    "backend",
    "distillation_loss",
    "dkd_loss",
    "expand_head_grams",
    "explain",
    "extend_basis",
    "ftp_adam_step_",
    "ftp_sgd_step_",
    "jsd_loss",
    "kl_loss",
    "linear_kl_loss",
    "log_odds_filter",
    "null_space_projector",
    "orthogonality_penalty",
    "polar",
    "prefix_attention",
    "project",
    "project_to_anchor",
    "projected_adam_step_",
    "qr",
    "rules",
    "spectral_projector",
    "symmetric_eigh",
    "update_covariance_",
    "update_covariances_",
    "update_head_grams_",
    "use_backend",
]
