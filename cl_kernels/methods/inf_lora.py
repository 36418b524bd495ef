"""InfLoRA: the down-projection is chosen before a task so that old inputs do not see it (Liang and Li, CVPR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_kernels.methods._lora import LoRAMethod, LoRAOptions
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._subspaces import Report, side_report
from cl_kernels.methods._task import Batches, Task
from cl_kernels.ops import Projector, symmetric_eigh
from cl_kernels.subspace import CovarianceCollector, grow_basis

__all__ = ["InfLoRA", "InfLoRAOptions"]


@dataclass(frozen=True, kw_only=True)
class InfLoRAOptions(LoRAOptions):
    """As `LoRAOptions`, and:

    * positions: "k v" as published.
    * threshold, increment: task t (from 0) protects directions until threshold + increment t (at most 1) of the energy
      of its inputs is held (published: 0.95 rising to 1 over the tasks).
    * gram_power: 1 counts energy as sigma^2, as GPM; 2 as sigma^4, as the official code does by taking the SVD of the
      Gram matrix: 0.95 then keeps 221 instead of 352 of 768 directions of a linearly falling spectrum.
    """

    positions: str = "k v"
    threshold: float = 0.95
    increment: float = 0.005
    gram_power: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", number(self.threshold, 0.0, 1.0), "a number in [0, 1]", self.threshold)
        require("increment", number(self.increment, 0.0, 1.0), "a number in [0, 1]", self.increment)
        require("gram_power", self.gram_power in (1, 2), "1 or 2", self.gram_power)


class InfLoRA(LoRAMethod):
    """dW = sum A_i B_i where only B_t trains: A_t = the r leading eigenvectors of (I - M M^T) C (I - M M^T), divided by
    sqrt(3), C the Gram matrix of the new task's inputs and M a basis of what earlier tasks' inputs used.

    Then x A_t = 0 for every old input x inside M, so the new adapter does not touch it whatever B_t becomes; what lies
    outside M, the share beyond the threshold, it may touch. One pass over the task's images before training and one
    after it (M <- [M, leading directions of the residual]). The adapters of earlier tasks stay and all add up.

    Traps of the official code that cannot occur (method-lora-composition.md 12): energy of sigma^4 (an option); the
    last direction dropped; Gram matrices of every image apart on the GPU, copied to the CPU every batch. Where fewer
    than r directions are free, the rest of A_t is zero."""

    name: ClassVar[str] = "inf-lora"
    options_type: ClassVar[type[Options]] = InfLoRAOptions
    composition: ClassVar[str] = "inf-lora"
    options: InfLoRAOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.bases: dict[str, Tensor] = {}
        self._report: Report = {}

    def _enforcement(self) -> Any:
        return None

    @torch.no_grad()
    def _initial(self, task: Task) -> dict[str, Tensor]:
        chosen = {}
        for name, gram in self._grams(task.batches()).items():
            basis = self.bases.get(name)
            if basis is not None:
                gram = gram - basis @ (basis.mT @ gram)
                gram = gram - (gram @ basis) @ basis.mT
            values, vectors = symmetric_eigh((gram + gram.mT) / 2)
            found = vectors[:, : self.options.rank]
            if basis is not None:  # twice is enough: what rounding left of the old span
                found = found - basis @ (basis.mT @ found)
            real = values[: self.options.rank] > torch.finfo(values.dtype).eps * len(values) * values.clamp_min(0).sum()
            chosen[name] = torch.where(real, found, 0.0) / math.sqrt(3.0)
        return self._by_place(chosen)

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        super()._finish(task, loader)
        if self.tasks[-1].last:
            return
        keep = min(self.options.threshold + self.options.increment * self.model.task, 1.0)
        report: Report = {}  # a new one: a caller may have kept the last
        for name, gram in self._grams(task.batches()).items():  # the inference may have used up `loader`
            powered = gram if self.options.gram_power == 1 else gram @ gram / gram.trace()
            self.bases[name] = basis = grow_basis(self.bases.get(name), (powered + powered.mT) / 2, keep).basis
            before = self._report.get(name, {}).get("right")
            report[name] = {"right": side_report(Projector(basis), gram, before)}
        self._report = report

    def _grams(self, batches: Batches) -> dict[str, Tensor]:
        """Sum of x x^T over the inputs of every adapted layer, by the layer's name."""
        layers = [f"backbone.{name}.base" for name, _ in self.model.layers()]
        with CovarianceCollector(self.model, targets=layers) as collector:
            for images, _ in batches:
                self.model(images)
        found = collector.covariances()
        return {name: found[f"backbone.{name}.base.weight"].matrix.double() for name, _ in self.model.layers()}

    def _by_place(self, by_layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """q, k and v of one layer see the same inputs and start from the same directions."""
        return {layer.place(name, part): by_layer[name] for name, layer in self.model.layers() for part in layer.slices}

    def subspace(self) -> Report:
        """Of every adapted layer's inputs: dimension, protected directions, energy, and how many tasks still fit."""
        return self._report

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"bases": dict(self.bases), "report": self._report}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.bases = {name: basis.to(self.device) for name, basis in state["bases"].items()}
        self._report = state["report"]
