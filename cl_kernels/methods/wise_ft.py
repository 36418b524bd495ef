"""WiSE-FT: fine-tune, then go part of the way back to the weights before (Wortsman et al., CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_kernels.methods._anchored import AnchoredWeights, AnchorOptions
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._task import Batches, Task
from cl_kernels.ops.weight_projection import rescale_

__all__ = ["WiSEFT", "WiSEFTOptions"]


@dataclass(frozen=True, kw_only=True)
class WiSEFTOptions(AnchorOptions):
    """As `AnchorOptions`, and alpha: the share of the way from the anchor (0) to the fine-tuned weights (1)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("alpha", number(self.alpha, 0.0, 1.0), "a number in [0, 1]", self.alpha)


class WiSEFT(AnchoredWeights):
    """`full`, and at the end of each task W <- W_0 + alpha (W - W_0) for every trained weight of the backbone.

    The interpolated model is the model: it is evaluated, saved, and what the next task starts from. With
    `anchor="previous"` a task's own change is multiplied by alpha, with "pretrained" so are the changes of the tasks
    before it, once more after each. Heads stay as they were trained: their classes have no earlier head to average
    with (the paper's zero-shot head comes from text)."""

    name: ClassVar[str] = "wise-ft"
    options_type: ClassVar[type[Options]] = WiSEFTOptions
    options: WiSEFTOptions

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        names, params = zip(*self._body(), strict=True)
        alpha = self.options.alpha
        rescale_(params, [self._anchors[name] for name in names], [alpha] * len(params), norm="l2")
