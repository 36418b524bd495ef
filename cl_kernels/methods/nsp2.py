"""NSP2: visual prompt tuning in the null space of earlier tasks (Lu et al., NeurIPS 2024), as its official code does
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_kernels.methods._options import Options, require
from cl_kernels.methods._prompts import PromptMethod, PromptOptions
from cl_kernels.methods._subspaces import Report, check_rule, new_store, parse_rule, restored_store, side_report
from cl_kernels.methods._task import Batches, Task
from cl_kernels.ops import Projector, Sides
from cl_kernels.ops.null_space import null_space_projector
from cl_kernels.subspace import CovarianceCollector, SubspaceStore

__all__ = ["NSP2", "NSP2Options", "ln_drift_loss", "prompt_moments"]


@dataclass(frozen=True, kw_only=True)
class NSP2Options(PromptOptions):
    """Options of `nsp2`; the defaults of the projection are the official code's for 10-split CIFAR-100.

    * eta: weight of the normalised projector against the identity, both sides; eta_left: on the M x M side (None: eta).
    * normalize: "fro" divides each projector by its Frobenius norm, "none" does not.
    * rule, rule_left: which directions are protected, see `parse_rule`; rule_left None: as `rule`.
    * weighting: "batches" sums the means of the batches of the statistics pass (official: 100 images), "rows" all.
    * accumulation: "sum" adds the statistics of the tasks, "mean" averages them by numbers of images (both official).
    * ln_weight: factor of the LayerNorm drift loss.
    * sides: "both", "left" or "right" alone.
    """

    eta: float = 0.97
    eta_left: float | None = None
    normalize: str = "fro"
    rule: str = "knee"
    rule_left: str | None = None
    weighting: Literal["rows", "batches"] = "batches"
    accumulation: str = "sum"
    ln_weight: float = 1.0
    sides: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eta", "eta_left", "ln_weight"):
            value = getattr(self, name)
            high = 1e6 if name == "ln_weight" else 1.0
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= high
            require(name, fits or (name == "eta_left" and value is None), f"a number in [0, {high:g}]", value)
        require("normalize", self.normalize in ("fro", "none"), "fro or none", self.normalize)
        require("weighting", self.weighting in ("batches", "rows"), "batches or rows", self.weighting)
        require("accumulation", self.accumulation in ("sum", "mean"), "sum or mean", self.accumulation)
        require("sides", self.sides in ("both", "left", "right"), "both, left or right", self.sides)
        check_rule("rule", self.rule)
        check_rule("rule_left", self.rule_left)
        left = self.rule if self.rule_left is None else self.rule_left
        if self.sides != "right" and self.prompts < 3 and "knee" in left:  # would fail after the first task
            raise ValueError(f"rule_left: {left} needs 3 prompts to have a bend, got {self.prompts}; try 'energy:0.95'")


class NSP2(PromptMethod):
    """From task 2 on the prompts' Adam step u [M, D] becomes `B2 u B1`; heads are never projected.

    After each task but the last, one pass over its images adds to the sums `C1` (rows q_h W_k,h of the image queries)
    and `C2` (softmax columns of the prompts) of every prompted block; `B = eta U0 U0^T / ||U0 U0^T||_F + (1 - eta) I`
    with U0 the directions the rule leaves free (Eqs. 24-29). The loss adds the drift of the prompts' LayerNorm mean and
    std since the previous task, averaged over prompts as the official code does (Eq. 27 sums). State: L (D^2 + M^2)
    numbers, whatever the number of tasks. Timeline: train, keep the prompts' moments, pass, projectors, evaluate.
    """

    name: ClassVar[str] = "nsp2"
    options_type: ClassVar[type[Options]] = NSP2Options
    options: NSP2Options

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.store: SubspaceStore | None = None
        self._images = 0  # behind the statistics
        self._previous: tuple[Tensor, Tensor] | None = None
        self._report: Report = {}

    def _store(self) -> SubspaceStore | None:
        return self.store

    def _regulariser(self) -> Tensor | None:
        if self._previous is None or self.options.ln_weight == 0:
            return None
        return self.options.ln_weight * ln_drift_loss([prompt for _, prompt in self._body()], *self._previous)

    def _finish(self, task: Task, loader: Batches) -> None:
        self._previous = prompt_moments([prompt.detach() for _, prompt in self._body()])
        if not self.tasks[-1].last:
            self._accumulate(loader)
            self.store = new_store(self._projectors(), self._report)

    @torch.no_grad()
    def _accumulate(self, loader: Batches) -> None:
        with CovarianceCollector(self.model, what="prompt", weighting=self.options.weighting) as collector:
            seen = 0
            for images, _ in loader:
                self.model(images)
                seen += len(images)
        before, self._images = self._images, self._images + seen
        mean = self.options.accumulation == "mean"
        old_share, share = (before / self._images, seen / self._images) if mean else (1.0, 1.0)
        for name, covariance in collector.covariances().items():
            left, right = covariance.left.matrix, covariance.right.matrix
            if name in self.statistics:
                old_left, old_right = self.statistics[name]
                left, right = share * left + old_share * old_left, share * right + old_share * old_right
            self.statistics[name] = (left, right)

    def _projectors(self) -> dict[str, Sides]:
        """The pair of every prompted block, from the statistics as they are."""
        self._report = {}
        return {name: self._pair(name, *self._folded(name)) for name in self.statistics}

    def _folded(self, name: str) -> tuple[Tensor, Tensor]:
        """C2 [M, M] and C1 [D, D] of one block as the projectors see them: unchanged here."""
        return self.statistics[name]

    def _pair(self, name: str, left: Tensor, right: Tensor) -> Sides:
        options, report = self.options, {}
        made: dict[str, Projector | None] = {"left": None, "right": None}
        for side, covariance in (("left", left), ("right", right)):
            if options.sides not in ("both", side):
                continue
            rule = (options.rule_left or options.rule) if side == "left" else options.rule
            eta = options.eta if side == "right" or options.eta_left is None else options.eta_left
            normalize: Literal["fro"] | None = None if options.normalize == "none" else "fro"
            projector = null_space_projector(covariance, parse_rule("rule", rule), mix=eta, normalize=normalize)
            report[side] = side_report(projector, covariance)
            made[side] = projector.to(self._like.dtype)
        self._report[name] = report
        return Sides(made["left"], made["right"])

    def subspace(self) -> Report:
        """Dimension, protected directions, RMS gain and protected energy by parameter and side."""
        return self._report

    def _state(self) -> dict[str, Any]:
        return {
            "statistics": {name: list(pair) for name, pair in self.statistics.items()},
            "images": self._images,
            "store": None if self.store is None else self.store.state_dict(),
            "previous": None if self._previous is None else list(self._previous),
            "report": self._report,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        moved = {name: [tensor.to(self.device) for tensor in pair] for name, pair in state["statistics"].items()}
        self.statistics = {name: (pair[0], pair[1]) for name, pair in moved.items()}
        self._images = state["images"]
        self.store = restored_store(state["store"], self.device)
        previous = state["previous"]
        self._previous = None if previous is None else (previous[0].to(self.device), previous[1].to(self.device))
        self._report = state["report"]


def prompt_moments(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population std of every prompt: two tensors [L, M] for L parameters [1, M, D]."""
    var, mean = torch.var_mean(torch.cat([prompt.flatten(0, -2)[None] for prompt in prompts]), dim=-1, correction=0)
    return mean, var.sqrt()


def ln_drift_loss(prompts: list[Tensor], mean: Tensor, std: Tensor) -> Tensor:
    """`1/M sum_layers sum_i |mean(P_i) - mean_i| + |std(P_i) - std_i|` (Eq. 27, averaged over prompts as the official
    code).

    prompts: L tensors [1, M, D]; mean, std [L, M]: the moments at the end of the previous task. Population std. The
    subgradient at the reference is 0. A handful of launches whatever L.
    """
    now_mean, now_std = prompt_moments(prompts)
    return ((now_mean - mean).abs() + (now_std - std).abs()).sum() / mean.shape[1]
