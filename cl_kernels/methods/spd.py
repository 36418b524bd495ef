"""SPD: weight decay towards the anchor, only where the gradient points back to it (Tian et al., NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from cl_kernels.methods._anchored import AnchorOptions, CountingWeights
from cl_kernels.methods._options import Options, number, require
from cl_kernels.optim import SPDAdamW

__all__ = ["SPD", "SPDOptions"]


@dataclass(frozen=True, kw_only=True)
class SPDOptions(AnchorOptions):
    """As `AnchorOptions`, and strength: the paper's lambda. 1 puts a weight that fires back on the sphere on which the
    step found it, 0 is `full`. It is no rate: the learning rate does not multiply it."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("strength", number(self.strength, 0.0, 1e3), "a number in [0, 1000]", self.strength)


class SPD(CountingWeights):
    """`full` through `SPDAdamW`: after AdamW's step, a weight that went further from its anchor although its gradient
    points back is scaled towards the anchor.

    With <G, W - W_0> > 0, r = max(0, (|c| - |d|) / |c|) and d, c the displacement before and after the step, W <- W_0 +
    (1 - strength r) c; else nothing happens. Results say in how many steps it acted (`fire_rate`)."""

    name: ClassVar[str] = "spd"
    options_type: ClassVar[type[Options]] = SPDOptions
    options: SPDOptions

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return SPDAdamW(
            groups, betas=self.options.betas, eps=self.options.eps, strength=self.options.strength,
            anchors=self._anchors, exclude=("heads.*",),
        )  # fmt: skip
