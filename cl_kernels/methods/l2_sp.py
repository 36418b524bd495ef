"""L2-SP: a pull towards the anchor, proportional to the distance (Li, Grandvalet and Davoine, ICML 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from cl_kernels.methods._anchored import AnchorOptions, CountingWeights
from cl_kernels.methods._options import Options, number, require
from cl_kernels.optim import L2SPAdamW

__all__ = ["L2SP", "L2SPOptions"]


@dataclass(frozen=True, kw_only=True)
class L2SPOptions(AnchorOptions):
    """As `AnchorOptions`, and:

    * strength: alpha of the penalty alpha / 2 |W - W_0|^2, published 0.1; 0 is `full`.
    * coupled: True adds alpha (W - W_0) to the gradient, as published for SGD; False takes lr strength (W - W_0) from
      the weight beside Adam's step, as AdamW does with weight decay. Adam divides a coupled pull by the gradient's
      size.
    * head_weight_decay: the paper's beta, of new heads (published 0.01); `weight_decay` is the body's, towards zero.
    """

    strength: float = 0.1
    coupled: bool = True
    head_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("strength", number(self.strength, 0.0, 1e6), "a number in [0, 1e6]", self.strength)
        require("coupled", isinstance(self.coupled, bool), "true or false", self.coupled)
        decay = self.head_weight_decay
        require("head_weight_decay", number(decay, 0.0, 1e3), "a number in [0, 1000]", decay)


class L2SP(CountingWeights):
    """`full` through `L2SPAdamW`: every weight is pulled to its anchor in every step. Heads have an ordinary decay."""

    name: ClassVar[str] = "l2-sp"
    options_type: ClassVar[type[Options]] = L2SPOptions
    options: L2SPOptions

    def _head_weight_decay(self) -> float:
        return self.options.head_weight_decay

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return L2SPAdamW(
            groups, betas=self.options.betas, eps=self.options.eps, strength=self.options.strength,
            coupled=self.options.coupled, anchors=self._anchors, exclude=("heads.*",),
        )  # fmt: skip
