"""What `CovarianceCollector` may be asked for."""

from __future__ import annotations

import torch

__all__ = ["check_options"]


def check_options(
    what: str,
    weighting: str,
    dtype: torch.dtype,
    token_rate: float,
    row_dtype: torch.dtype | None,
    shrinkage: str | None,
) -> None:
    """Raise `ValueError`, naming the option, for what `CovarianceCollector` does not take."""
    if what not in ("input", "output_grad", "prompt"):
        raise ValueError(f"what: expected 'input', 'output_grad' or 'prompt', got {what!r}")
    if weighting not in ("rows", "batches"):
        raise ValueError(f"weighting: expected 'rows' or 'batches', got {weighting!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if not 0 < token_rate <= 1:
        raise ValueError(f"Invalid token_rate value: {token_rate} (expected 0 < token_rate <= 1)")
    if row_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"row_dtype: expected None, torch.bfloat16 or torch.float16, got {row_dtype}")
    if shrinkage not in (None, "oas", "ledoit-wolf"):
        raise ValueError(f"shrinkage: expected None, 'oas' or 'ledoit-wolf', got {shrinkage!r}")
    if shrinkage == "ledoit-wolf" and (what == "prompt" or weighting == "batches"):
        raise ValueError(
            "shrinkage: 'ledoit-wolf' needs the rows themselves, all of one weight; head Grams (what='prompt') and "
            "weighting='batches' go with 'oas'"
        )
