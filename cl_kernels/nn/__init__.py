"""Modules: prompts on frozen timm models."""

from cl_kernels.nn._prompts import Prompts
from cl_kernels.nn.prompted_vit import PromptedViT

__all__ = ["PromptedViT", "Prompts"]
