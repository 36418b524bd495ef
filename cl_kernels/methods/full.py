"""Sequential fine-tuning of all linear weights: nothing protects the earlier tasks."""

from __future__ import annotations

from typing import ClassVar

from cl_kernels.methods._weights import WeightMethod

__all__ = ["Full"]


class Full(WeightMethod):
    """The lower line of the full-weight comparison; `null-space` is the same with projected updates."""

    name: ClassVar[str] = "full"
