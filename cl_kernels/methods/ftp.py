"""FTP: every row of a weight stays within a learned distance of its anchor (Tian et al., NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cl_kernels.methods._anchored import AnchoredWeights, AnchorOptions
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._task import Batches, Task
from cl_kernels.ops.weight_projection import NORMS
from cl_kernels.optim import FTPAdamW

__all__ = ["FTP", "FTPOptions"]


@dataclass(frozen=True, kw_only=True)
class FTPOptions(AnchorOptions):
    """As `AnchorOptions`, and:

    * kappa: factor on the radius's gradient where moving outward raises the loss; 1 holds most, 0 never shrinks.
    * radius_lr: step of the radius's own Adam, in units of the norm.
    * norm: "row_l1" as published, "row_l2", or "l2" of the whole tensor.
    * masked: leave rows inside the ball out of the radius's gradient; the official code does not.
    * radius: a number fixes the radius of all weights (MARS-PGM) instead of learning it.
    """

    kappa: float = 1.0
    radius_lr: float = 1e-2
    norm: str = "row_l1"
    masked: bool = False
    radius: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("kappa", number(self.kappa, 0.0, 1.0), "a number in [0, 1]", self.kappa)
        require("radius_lr", number(self.radius_lr, 0.0, 1e3), "a number in [0, 1000]", self.radius_lr)
        require("norm", self.norm in NORMS, f"one of {', '.join(NORMS)}", self.norm)
        require("masked", isinstance(self.masked, bool), "true or false", self.masked)
        fits = self.radius is None or number(self.radius, 0.0, 1e30)
        require("radius", fits, "None or a number from 0", self.radius)


class FTP(AnchoredWeights):
    """`full` through `FTPAdamW`: after AdamW's step every row of W - W_0 that is longer than gamma is scaled to gamma.

    gamma, one for each weight, starts at 1e-8, which is the anchor, and learns by a small Adam from the gradient that
    the step has anyway. Guaranteed after every step: ||W - W_0||_1 <= gamma for each row, so that gamma bounds by how
    much a layer's output can have moved for each unit of its largest input (method-trainable-projection 5). Radii
    begin anew with every task, unless the anchor is the pre-trained model: then they go on, since a fresh radius would
    return the weights to the anchor in the first step. Moments are new in every task."""

    name: ClassVar[str] = "ftp"
    options_type: ClassVar[type[Options]] = FTPOptions
    options: FTPOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._radii: dict[str, float] = {}  # of the tasks before, where they go on

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        o = self.options
        return FTPAdamW(
            groups, betas=o.betas, eps=o.eps, anchors=self._anchors, exclude=("heads.*",), kappa=o.kappa,
            radius_lr=o.radius_lr, norm=o.norm, masked=o.masked, radius=o.radius,
        )  # fmt: skip

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = super()._build_optimizer(groups)
        if self._radii and isinstance(optimizer, FTPAdamW):
            optimizer.set_radii(self._radii)
        return optimizer

    def end_task(self, task: Task, loader: Batches) -> None:
        """As every method; radii that go on are kept."""
        if self.options.anchor == "pretrained" and isinstance(self.optimizer, FTPAdamW):
            self._radii = self.optimizer.radii()
        super().end_task(task, loader)

    def _holding(self) -> dict[str, dict[str, float]]:
        optimizer = self.optimizer
        if not isinstance(optimizer, FTPAdamW):
            return {}
        radii, rates, shares = optimizer.radii(), optimizer.fire_rate(), optimizer.projected_fraction()
        return {
            name: {"radius": radii[name], "projected": shares.get(name, 0.0), "fire_rate": rates.get(name, 0.0)}
            for name in radii
        }

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"radii": self._radii}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._radii = state["radii"]
