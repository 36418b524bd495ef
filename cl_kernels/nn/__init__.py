"""Modules on frozen timm models: prompts, prompt pools, a distillation token, and stacks of low-rank adapters."""

from cl_kernels.nn._composition import COMPOSITIONS, Composition
from cl_kernels.nn._importance import Importance
from cl_kernels.nn._prompts import Prompts
from cl_kernels.nn.apt import APT
from cl_kernels.nn.coda_prompt import CODAPrompt
from cl_kernels.nn.kd_token import KDHead, KDToken
from cl_kernels.nn.lora_stack import LoRAStack
from cl_kernels.nn.peft_format import from_peft, olora_init, peft_config, to_peft_state_dict
from cl_kernels.nn.pooled_vit import Pooled, PooledViT
from cl_kernels.nn.pools import L2P, DualPrompt
from cl_kernels.nn.prompt_pool import LayerPrompt, PromptPool
from cl_kernels.nn.prompted_vit import PromptedViT

__all__ = [
    "APT",
    "COMPOSITIONS",
    "L2P",
    "CODAPrompt",
    "Composition",
    "DualPrompt",
    "Importance",
    "KDHead",
    "KDToken",
    "LayerPrompt",
    "LoRAStack",
    "Pooled",
    "PooledViT",
    "PromptPool",
    "PromptedViT",
    "Prompts",
    "from_peft",
    "olora_init",
    "peft_config",
    "to_peft_state_dict",
]
