"""What torch may do to a float32 product behind the caller's back."""

from __future__ import annotations

import torch

__all__ = ["float32_products_are_exact"]


def float32_products_are_exact(device: torch.device) -> bool:
    """False where torch may shorten float32 products on this device to TF32 or bfloat16; then use float64."""
    try:
        allowed = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return not allowed and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer fp32_precision names, which refuse to be read through the older ones
        return False
