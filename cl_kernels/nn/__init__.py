"""Modules on frozen timm models: prompts, and stacks of low-rank adapters."""

from cl_kernels.nn._composition import COMPOSITIONS, Composition
from cl_kernels.nn._importance import Importance
from cl_kernels.nn._prompts import Prompts
from cl_kernels.nn.lora_stack import LoRAStack
from cl_kernels.nn.peft_format import from_peft, olora_init, peft_config, to_peft_state_dict
from cl_kernels.nn.prompted_vit import PromptedViT

__all__ = [
    "COMPOSITIONS",
    "Composition",
    "Importance",
    "LoRAStack",
    "PromptedViT",
    "Prompts",
    "from_peft",
    "olora_init",
    "peft_config",
    "to_peft_state_dict",
]
