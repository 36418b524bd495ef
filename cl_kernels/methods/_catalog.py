"""The methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._options import Options, option_defaults
from cl_kernels.methods._protocol import Method
from cl_kernels.methods.adam_nscl import AdamNSCLOptions, create_adam_nscl
from cl_kernels.methods.class_mean import ClassMean
from cl_kernels.methods.coda_prompt import CODAPrompt
from cl_kernels.methods.dualprompt import DualPrompt
from cl_kernels.methods.ftp import FTP
from cl_kernels.methods.full import Full
from cl_kernels.methods.gpm import GPMOptions, create_gpm
from cl_kernels.methods.inf_lora import InfLoRA
from cl_kernels.methods.joint import JointOptions, create_joint
from cl_kernels.methods.kdp import KDP
from cl_kernels.methods.l2_sp import L2SP
from cl_kernels.methods.l2p import L2P
from cl_kernels.methods.linear import Linear
from cl_kernels.methods.lora import OLoRA, SDLoRA, SequentialLoRA
from cl_kernels.methods.lorac import LoRAC, LoRACIPC
from cl_kernels.methods.matched_lr import MatchedOptions, create_matched
from cl_kernels.methods.nsp2 import NSP2
from cl_kernels.methods.nsp2_exact import NSP2Exact
from cl_kernels.methods.null_space import NullSpace
from cl_kernels.methods.sequential import Sequential
from cl_kernels.methods.spd import SPD
from cl_kernels.methods.tpgm import TPGMMethod
from cl_kernels.methods.vpt import VPTDeep, VPTShallow
from cl_kernels.methods.wise_ft import WiSEFT

__all__ = ["check", "create", "names", "options", "published"]

Factory = Callable[[nn.Module, Any], HeadMethod]

_METHODS: dict[str, tuple[Factory, type[Options]]] = {
    "class-mean": (ClassMean, ClassMean.options_type),
    "linear": (Linear, Linear.options_type),
    "sequential": (Sequential, Sequential.options_type),
    "vpt-shallow": (VPTShallow, VPTShallow.options_type),
    "vpt-deep": (VPTDeep, VPTDeep.options_type),
    "matched-lr": (create_matched, MatchedOptions),
    "nsp2": (NSP2, NSP2.options_type),
    "nsp2-exact": (NSP2Exact, NSP2Exact.options_type),
    "full": (Full, Full.options_type),
    "null-space": (NullSpace, NullSpace.options_type),
    "adam-nscl": (create_adam_nscl, AdamNSCLOptions),
    "gpm": (create_gpm, GPMOptions),
    "ftp": (FTP, FTP.options_type),
    "tpgm": (TPGMMethod, TPGMMethod.options_type),
    "spd": (SPD, SPD.options_type),
    "l2-sp": (L2SP, L2SP.options_type),
    "wise-ft": (WiSEFT, WiSEFT.options_type),
    "sequential-lora": (SequentialLoRA, SequentialLoRA.options_type),
    "lorac": (LoRAC, LoRAC.options_type),
    "lorac-ipc": (LoRACIPC, LoRACIPC.options_type),
    "o-lora": (OLoRA, OLoRA.options_type),
    "inf-lora": (InfLoRA, InfLoRA.options_type),
    "sd-lora": (SDLoRA, SDLoRA.options_type),
    "l2p": (L2P, L2P.options_type),
    "dualprompt": (DualPrompt, DualPrompt.options_type),
    "coda-prompt": (CODAPrompt, CODAPrompt.options_type),
    "kdp": (KDP, KDP.options_type),
    "joint": (create_joint, JointOptions),
}

_NSP2_RECIPE = {
    "head": "linear",
    "head_init": "official",
    "temperature": 28.0,
    "lr": 0.01,
    "head_lr": None,
    "weight_decay": 5e-5,
    "schedule": "steps-official",
}
_LORAC_RECIPE = {  # augmented ViT-B/16 of ImageNet-21k; without the official code's clipping and head re-alignment
    "rank": 16,
    "alpha": 1.0,
    "clusters": 4,
    "lr": 0.0015,  # 0.006 scaled by 64 / 256
    "head_lr": None,
    "schedule": "cosine",
    "head": "linear",
    "head_init": "default",
}
_POOL_RECIPE = {"lr": 1e-3, "head_lr": None, "schedule": "quarter-cosine", "head": "linear", "head_init": "default"}
_FINE_TUNING_RECIPE = {"targets": "all", "head_lr": None, "head": "linear", "head_init": "default"}
_VPT_RECIPE = {  # 100 epochs, batches of 64, the learning rate picked from 0.0125 to 12.5 for each task
    "optimizer": "sgd",
    "lr": 1.25,
    "head_lr": None,
    "weight_decay": 1e-3,
    "schedule": "warmup-cosine",
    "head": "linear",
    "head_init": "kaiming",
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "vpt-shallow": _VPT_RECIPE,
    "vpt-deep": _VPT_RECIPE,
    "sequential": _NSP2_RECIPE,
    "matched-lr": _NSP2_RECIPE,
    "nsp2": _NSP2_RECIPE,
    "nsp2-exact": _NSP2_RECIPE,
    "null-space": {"rule": "times:10", "normalize": "fro", "lr": 5e-5, "head_lr": 1e-3, "head": "linear"},
    "adam-nscl": {
        "base": "full",
        "rule": "times:10",
        "normalize": "fro",
        "statistic": "batch-mean",
        "accumulation": "sum",
        "lr": 1e-4,
        "later_scale": 0.5,
        "head_lr": 1e-3,
        "weight_decay": 5e-5,
        "schedule": "halves",
        "head": "linear",
        "head_init": "default",
    },
    "gpm": {
        "base": "full",
        "threshold": 0.97,
        "increment": 0.003,
        "mode": "repository",
        "samples_per_task": 125,
        "lr": 0.01,
        "head_lr": None,
        "head": "linear",
        "head_init": "default",
    },
    "ftp": {**_FINE_TUNING_RECIPE, "lr": 1e-4, "schedule": "cosine"},  # CLIP ResNet-50, 50 epochs of DomainNet
    "tpgm": _FINE_TUNING_RECIPE,
    "spd": _FINE_TUNING_RECIPE,
    "l2-sp": {**_FINE_TUNING_RECIPE, "head_weight_decay": 0.01},
    "wise-ft": {**_FINE_TUNING_RECIPE, "lr": 3e-5, "weight_decay": 0.1, "schedule": "cosine"},  # CLIP, 10 epochs
    "lorac": _LORAC_RECIPE,
    "lorac-ipc": _LORAC_RECIPE,
    "inf-lora": {"rank": 10, "gram_power": 2},
    "sd-lora": {"positions": "q v"},
    "l2p": _POOL_RECIPE,
    "dualprompt": _POOL_RECIPE | {"candidates": "all"},
    "coda-prompt": _POOL_RECIPE | {"orthogonalize": "published"},
    "kdp": _POOL_RECIPE | {"pool_options": {"orthogonalize": "published"}},
}


def names() -> list[str]:
    """Every method, controls first."""
    return list(_METHODS)


def options(name: str) -> dict[str, Any]:
    """The options of method `name` with their defaults. Raises `ValueError` offering the nearest names."""
    return option_defaults(_find(name)[1])


def published(name: str) -> dict[str, Any]:
    """The options that differ from the defaults in the published recipe (ViT-B/16, 10-split CIFAR-100); {} for none.

    The defaults start cosine heads at the class means, which holds on weak backbones too; the recipe's linear heads do
    not. Raises `ValueError` offering the nearest names."""
    _find(name)
    return dict(_PUBLISHED.get(name, {}))


def check(name: str, **options: Any) -> None:
    """What `create` checks before it touches a backbone: name, option names, values. Raises `ValueError`."""
    _options(name, options)


def create(name: str, backbone: nn.Module, **options: Any) -> Method:
    """The method `name` on a timm vision transformer, which it takes over (and may train in place).

    Raises `ValueError` for an unknown name or option, offering the nearest ones, and for a value out of range.
    """
    return _find(name)[0](backbone, _options(name, options))


def _options(name: str, given: dict[str, Any]) -> Options:
    kind = _find(name)[1]
    known = option_defaults(kind)
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ValueError(f"options: {name} has no option {unknown[0]!r}; nearest: {_nearest(unknown[0], list(known))}")
    return kind(**given)


def _find(name: str) -> tuple[Factory, type[Options]]:
    if name not in _METHODS:
        raise ValueError(f"method: unknown name {name!r}; nearest: {_nearest(name, names())}")
    return _METHODS[name]


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)
