"""What a vision transformer looked at: attention, rollout, GradCAM and Integrated Gradients, and pictures of them.

Own code, because the libraries would cost more than they save: pytorch-grad-cam brings OpenCV, torchvision and
scikit-learn along, and its caller must say which rows are patches; captum (with whose Integrated Gradients ours agrees
to 2e-7) brings matplotlib, takes a fixed number of nodes, and would let a prompt pool choose other prompts along the
path. Neither knows of a prefix that has no rows. Nothing here trains: parameters, buffers, gradients, hooks and modes
are as they were afterwards.
"""

from cl_kernels.compare.attribution._patches import on_patches
from cl_kernels.compare.attribution.attention import AttentionMap, attention_map, attention_rollout
from cl_kernels.compare.attribution.cam import gradcam
from cl_kernels.compare.attribution.gallery import pictures
from cl_kernels.compare.attribution.path_gradients import Attribution, integrated_gradients
from cl_kernels.compare.attribution.sanity import deletion_insertion, randomised_head, spearman

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
