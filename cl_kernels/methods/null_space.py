"""Full-weight training in the null space of earlier tasks' inputs (Adam-NSCL with an energy rule and AdamW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_kernels.methods._options import Options, require
from cl_kernels.methods._subspaces import Report, check_rule, new_store, parse_rule, restored_store, side_report
from cl_kernels.methods._task import Batches, Task
from cl_kernels.methods._weights import WeightMethod, WeightOptions
from cl_kernels.ops import Sides
from cl_kernels.ops.null_space import null_space_projector
from cl_kernels.subspace import CovarianceCollector, SubspaceStore

__all__ = ["NullSpace", "NullSpaceOptions"]


@dataclass(frozen=True, kw_only=True)
class NullSpaceOptions(WeightOptions):
    """Options of `null-space`.

    * rule: which input directions are protected, "energy:0.95" by default, see `parse_rule`.
    * eta: weight of the projector against the identity.
    * normalize: "fro" is what Adam-NSCL does; it shrinks the step by 1 / sqrt(free directions).
    """

    rule: str = "energy:0.95"
    eta: float = 1.0
    normalize: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule("rule", self.rule)
        require("eta", isinstance(self.eta, (int, float)) and 0 <= self.eta <= 1, "a number in [0, 1]", self.eta)
        require("normalize", self.normalize in ("fro", "none"), "fro or none", self.normalize)


class NullSpace(WeightMethod):
    """From task 2 on every update dW [out, in] becomes `dW P`, P the projector off the protected input directions.

    After each task but the last, one pass over its images adds every layer's sum of `x x^T` over its inputs x to the
    sum of the earlier tasks; P leaves free what the rule does. On an input of the protected span the layer's output
    does not change. State: one [in, in] matrix per layer, whatever the number of tasks."""

    name: ClassVar[str] = "null-space"
    options_type: ClassVar[type[Options]] = NullSpaceOptions
    options: NullSpaceOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.statistics: dict[str, Tensor] = {}
        self.store: SubspaceStore | None = None
        self._report: Report = {}

    def _store(self) -> SubspaceStore | None:
        return self.store

    def _finish(self, task: Task, loader: Batches) -> None:
        if not self.tasks[-1].last:
            self._accumulate(loader)
            self.store = new_store(self._projectors(), self._report)

    @torch.no_grad()
    def _accumulate(self, loader: Batches) -> None:
        targets = [name.removesuffix(".weight") for name, _ in self._weights]
        with CovarianceCollector(self.backbone, targets=targets) as collector:
            for images, _ in loader:
                self.model(images)
        for name, covariance in collector.covariances().items():
            known = self.statistics.get(name)
            self.statistics[name] = covariance.matrix if known is None else known + covariance.matrix

    def _projectors(self) -> dict[str, Sides]:
        """A right-hand projector for every trained weight."""
        rule = parse_rule("rule", self.options.rule)
        normalize: Literal["fro"] | None = None if self.options.normalize == "none" else "fro"
        made, self._report = {}, {}
        for name, covariance in self.statistics.items():
            projector = null_space_projector(covariance, rule, mix=self.options.eta, normalize=normalize)
            self._report[name] = {"right": side_report(projector, covariance)}
            made[name] = Sides(None, projector.to(self._like.dtype))
        return made

    def subspace(self) -> Report:
        """Dimension, protected directions, RMS gain and protected energy by parameter."""
        return self._report

    def _state(self) -> dict[str, Any]:
        stored = None if self.store is None else self.store.state_dict()
        return {"statistics": self.statistics, "store": stored, "report": self._report}

    def _load_state(self, state: dict[str, Any]) -> None:
        self.statistics = {name: matrix.to(self.device) for name, matrix in state["statistics"].items()}
        self.store, self._report = restored_store(state["store"], self.device), state["report"]
