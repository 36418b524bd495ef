"""What a vision transformer looked at: attention, rollout, GradCAM and Integrated Gradients, and pictures of them.

Own code rather than captum or pytorch-grad-cam: captum requires numpy < 2 and pytorch-grad-cam imports torchvision's
models, and neither knows of prompt rows, of a prefix that has no rows at all, or of a pooled feature without a class
token; the procedures are a hook and a quadrature. Nothing here trains: parameters, buffers, their gradients, hooks and
modes are as they were afterwards.
"""

from cl_kernels.compare.attribution.attention import AttentionMap, attention_map, attention_rollout
from cl_kernels.compare.attribution.cam import gradcam
from cl_kernels.compare.attribution.gallery import pictures
from cl_kernels.compare.attribution.path_gradients import Attribution, integrated_gradients
from cl_kernels.compare.attribution.sanity import deletion_insertion, on_patches, randomised_head, spearman

__all__ = [
    "AttentionMap",
    "Attribution",
    "attention_map",
    "attention_rollout",
    "deletion_insertion",
    "gradcam",
    "integrated_gradients",
    "on_patches",
    "pictures",
    "randomised_head",
    "spearman",
]
