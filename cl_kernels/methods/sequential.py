"""Sequential prompt tuning: every task trains the same prompts, and nothing protects the earlier ones."""

from __future__ import annotations

from typing import ClassVar

from cl_kernels.methods._prompts import PromptMethod

__all__ = ["Sequential"]


class Sequential(PromptMethod):
    """The lower line of the comparison (VPT-Seq of the NSP2 paper): NSP2 without projection and without its loss
    term."""

    name: ClassVar[str] = "sequential"
