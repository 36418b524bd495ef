"""Options of methods that come in two forms."""

from __future__ import annotations

from dataclasses import dataclass

from cl_kernels.methods._options import require
from cl_kernels.methods._prompts import PromptOptions
from cl_kernels.methods._weights import WeightOptions

__all__ = ["BodyOptions"]


@dataclass(frozen=True, kw_only=True)
class BodyOptions(PromptOptions, WeightOptions):
    """base: "prompts" trains visual prompts on a frozen backbone, "full" all linear weights of its blocks. The options
    of the other form are without effect."""

    base: str = "prompts"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("base", self.base in ("prompts", "full"), "prompts or full", self.base)
