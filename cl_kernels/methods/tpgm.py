"""TPGM: distances to the anchor that are learned on held-out images (Tian et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cl_kernels.methods._anchored import AnchoredWeights, AnchorOptions
from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._task import Batch, Batches, Task
from cl_kernels.ops.weight_projection import NORMS
from cl_kernels.optim import TPGM

__all__ = ["TPGMMethod", "TPGMOptions"]


@dataclass(frozen=True, kw_only=True)
class TPGMOptions(AnchorOptions):
    """As `AnchorOptions`, and:

    * held_out: share of each class's training images, at least one, that train the radii and nothing else.
    * project: "step" projects after every step, as published for DomainNet; "end" once after the task (ImageNet).
    * iterations: held-out batches that the radii learn from each time; None is 1 for "step", 200 for "end" (published).
    * every: with "step", learn only in every so manieth step and project with the same radii in between.
    * norm: "row_l1" (the paper's MARS norm), "row_l2", or "l2" of the whole tensor (published for ImageNet).
    * radius_lr: of the radii's Adam.
    """

    held_out: float = 0.1
    project: str = "step"
    iterations: int | None = None
    every: int = 1
    norm: str = "row_l1"
    radius_lr: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = number(self.held_out, 0.0, 1.0) and 0 < self.held_out < 1
        require("held_out", fits, "a number inside (0, 1)", self.held_out)
        require("project", self.project in ("step", "end"), "step or end", self.project)
        fits = self.iterations is None or count(self.iterations, 1, 10**9)
        require("iterations", fits, "None or a whole number from 1", self.iterations)
        require("every", count(self.every, 1, 10**9), "a whole number from 1", self.every)
        require("norm", self.norm in NORMS, f"one of {', '.join(NORMS)}", self.norm)
        require("radius_lr", number(self.radius_lr, 0.0, 1e3), "a number in [0, 1000]", self.radius_lr)


class TPGMMethod(AnchoredWeights):
    """`full` on all but the held-out images, whose gradient moves one radius a weight: W <- W_0 + min(gamma / n, 1)
    (W - W_0), see `optim.TPGM`.

    Timeline of a step: the optimizer's step; on the next held-out batch the loss at the projected weights; Adam on the
    radii; the weights projected. Heads have no radius. Radii begin anew with every task, unless the anchor is the
    pre-trained model: then they go on, since a fresh radius (half the smallest row norm) would undo the earlier tasks.
    A step costs one more forward and backward pass."""

    name: ClassVar[str] = "tpgm"
    options_type: ClassVar[type[Options]] = TPGMOptions
    options: TPGMOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.held_out = self.options.held_out
        self._tpgm: TPGM | None = None
        self._carried: dict[str, Any] | None = None  # radii of earlier tasks, or of a state that is being loaded
        self._steps = self._used = 0  # of this task: optimizer steps, held-out batches
        self._held: Iterator[Batch] = iter(())

    def _start(self, task: Task) -> None:
        super()._start(task)
        self._steps = self._used = 0
        self.resume_task(task)

    def resume_task(self, task: Task) -> None:
        """Take the held-out images up where the state left them."""
        passes = sum(1 for _ in task.held_out()) if self._used else 1
        self._held = islice(_again(task), self._used % max(passes, 1), None)

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = super()._build_optimizer(groups)
        self._tpgm = TPGM(
            self.backbone, anchors=self._anchors, norm=self.options.norm, radius_lr=self.options.radius_lr, exclude=()
        )
        if self._carried is not None:
            self._tpgm.load_state_dict(self._carried)
        if self.options.project == "step":
            optimizer.register_step_post_hook(lambda *_: self._after_step())
        return optimizer

    def _after_step(self) -> None:
        learns = self._steps % self.options.every == 0
        self._steps += 1
        self._project((self.options.iterations or 1) if learns else 0)

    def _project(self, iterations: int) -> None:
        if self._tpgm is None:
            raise RuntimeError("tpgm: no task has begun")
        self._tpgm.project(self.loss, self._held, iterations=iterations)
        self._used += iterations

    def end_task(self, task: Task, loader: Batches) -> None:
        """As every method; with project="end" the radii are learned and the weights projected first."""
        if self.options.project == "end":
            self._project(self.options.iterations or 200)
        tpgm = self._tpgm
        goes_on = self.options.anchor == "pretrained" and tpgm is not None
        self._carried = tpgm.state_dict() if goes_on and tpgm is not None else None
        super().end_task(task, loader)
        self._tpgm, self._held = None, iter(())

    def _holding(self) -> dict[str, dict[str, float]]:
        if self._tpgm is None:
            return {}
        radii, shares, rates = self._tpgm.radii(), self._tpgm.projected_fraction(), self._tpgm.fire_rate()
        return {name: {"radius": radii[name], "projected": shares[name], "fire_rate": rates[name]} for name in radii}

    def _state(self) -> dict[str, Any]:
        radii = self._carried if self._tpgm is None else self._tpgm.state_dict()
        return super()._state() | {"tpgm": radii, "steps": self._steps, "used": self._used}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._carried, self._steps, self._used = state["tpgm"], state["steps"], state["used"]


def _again(task: Task) -> Iterator[Batch]:
    """The held-out batches, again and again."""
    while True:
        empty = True
        for batch in task.held_out():
            empty = False
            yield batch
        if empty:
            raise ValueError("task: it holds no images out of its training, from which tpgm learns")
