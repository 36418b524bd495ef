"""Other people's packages that install from the package index, as baselines where they are installed; never required.

`pip install "cl-kernels[peers]"` brings them. Dion, flash-muon and quack's symmetric products are not on the index.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["galore_adamw", "liger_kl"]


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def liger_kl() -> Callable[..., Any] | None:
    """Liger's kl_div on log-probabilities, a Triton kernel for GPUs; the softmaxes stay outside of it."""
    if not _there("liger_kernel"):
        return None
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    apply: Callable[..., Any] = LigerKLDivLossFunction.apply
    return apply


def galore_adamw() -> Callable[..., Any] | None:
    """GaLore's AdamW, gradients in a low-rank space found by an SVD every so many steps: `make(groups, lr=...)`.

    It is a yardstick: the projector of GaLore keeps the gradient's own directions, ours are given.
    """
    if not _there("galore_torch"):
        return None
    from galore_torch import GaLoreAdamW

    return functools.partial(GaLoreAdamW, no_deprecation_warning=True)
