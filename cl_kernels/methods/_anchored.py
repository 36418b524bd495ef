"""Robust fine-tuning: the weights train and are held near an anchor, what they were before the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.methods._options import Options, require
from cl_kernels.methods._task import Batches, Task
from cl_kernels.methods._weights import WeightMethod, WeightOptions
from cl_kernels.optim import L2SPAdamW, SPDAdamW

__all__ = ["AnchorOptions", "AnchoredWeights", "CountingWeights"]


@dataclass(frozen=True, kw_only=True)
class AnchorOptions(WeightOptions):
    """As `WeightOptions`, and anchor: "previous" holds the weights near what they were when the task began, the
    pre-trained ones in the first; "pretrained" near the pre-trained ones in every task."""

    anchor: str = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("anchor", self.anchor in ("previous", "pretrained"), "previous or pretrained", self.anchor)


class AnchoredWeights(WeightMethod):
    """`full` with anchors, one for each trained weight of the backbone; heads have none.

    The anchors are one more copy of the weights. What they were before the run is known from the backbone, so that
    only anchors of a later task go into a checkpoint."""

    options: AnchorOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._anchors = {name: parameter.detach().clone() for name, parameter in self._body()}
        self._report: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def _start(self, task: Task) -> None:
        if self.options.anchor == "previous":
            for name, parameter in self._body():
                self._anchors[name].copy_(parameter)

    @torch.no_grad()
    def _distances(self) -> dict[str, dict[str, float]]:
        """By parameter the distance to the anchor, by itself and as a share of the anchor's norm."""
        found = {}
        for name, parameter in self._body():
            anchor = self._anchors[name].double()
            moved = float((parameter.double() - anchor).norm())
            found[name] = {"distance": moved, "relative": moved / max(float(anchor.norm()), 1e-30)}
        return found

    def _holding(self) -> dict[str, dict[str, float]]:
        """What held each parameter in the task that ends; read while its optimizer is still there."""
        return {}

    def end_task(self, task: Task, loader: Batches) -> None:
        """As every method; how far the weights went is measured at the end."""
        held = self._holding()
        super().end_task(task, loader)
        self._report = {name: values | held.get(name, {}) for name, values in self._distances().items()}

    def anchoring(self) -> dict[str, dict[str, float]]:
        """By parameter, how far the last task went from its anchor, and what held it; for results.json."""
        return self._report

    def _state(self) -> dict[str, Any]:
        moved = self.options.anchor == "previous" and len(self.tasks) > 1 and self.optimizer is not None
        return {"anchors": self._anchors if moved else {}, "report": self._report}

    @torch.no_grad()
    def _load_state(self, state: dict[str, Any]) -> None:
        anchors: dict[str, Tensor] = state["anchors"]
        for name, anchor in anchors.items():
            self._anchors[name].copy_(anchor)
        self._report = state["report"]


class CountingWeights(AnchoredWeights):
    """Of an optimizer that counts the steps in which it acted."""

    def _holding(self) -> dict[str, dict[str, float]]:
        optimizer = self.optimizer
        if not isinstance(optimizer, (L2SPAdamW, SPDAdamW)):
            return {}
        return {name: {"fire_rate": rate} for name, rate in optimizer.fire_rate().items()}
