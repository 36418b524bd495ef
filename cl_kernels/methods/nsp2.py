"""NSP2: visual prompt tuning in the null space of earlier tasks (Lu et al., NeurIPS 2024), as its official code does
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_kernels.methods._memory import Accumulated, Cut, Memory
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._projected import Collector, ProjectedPrompts
from cl_kernels.methods._prompts import PromptOptions
from cl_kernels.methods._refinement import GaussianReplay, RefineOptions
from cl_kernels.methods._subspaces import CutOptions, check_rule, parse_rule
from cl_kernels.methods._task import Batches, Task
from cl_kernels.subspace import CovarianceCollector

__all__ = ["NSP2", "NSP2Options", "ln_drift_loss", "prompt_moments"]


@dataclass(frozen=True, kw_only=True)
class NSP2Options(CutOptions, RefineOptions, PromptOptions):
    """Options of `nsp2`; the defaults of the projection are the official code's for 10-split CIFAR-100.

    * eta: weight of the normalised projector against the identity, both sides; eta_left: on the M x M side (None: eta).
    * normalize: "fro" divides each projector by its Frobenius norm, "none" does not.
    * edge: "hard" or "soft", both sides.
    * rule, rule_left: which directions are protected, see `parse_rule`; rule_left None: as `rule`.
    * weighting: "batches" sums the means of the batches of the statistics pass (official: 100 images), "rows" all.
    * accumulation: "sum" adds the statistics of the tasks, "mean" averages them by numbers of images (both official).
    * ln_weight: factor of the LayerNorm drift loss.
    * sides: "both", "left" or "right" alone.
    * refine and refine_*: see `RefineOptions`; off by default, as in the official code for plain vision transformers.
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
        fits = self.eta_left is None or number(self.eta_left, 0.0, 1.0)
        require("eta_left", fits, "None or a number in [0, 1]", self.eta_left)
        require("ln_weight", number(self.ln_weight, 0.0, 1e6), "a number in [0, 1e+06]", self.ln_weight)
        require("weighting", self.weighting in ("batches", "rows"), "batches or rows", self.weighting)
        require("accumulation", self.accumulation in ("sum", "mean"), "sum or mean", self.accumulation)
        require("sides", self.sides in ("both", "left", "right"), "both, left or right", self.sides)
        check_rule("rule_left", self.rule_left)
        left = self.rule if self.rule_left is None else self.rule_left
        if self.sides != "right" and self.prompts < 3 and "knee" in left:  # would fail after the first task
            raise ValueError(f"rule_left: {left} needs 3 prompts to have a bend, got {self.prompts}; try 'energy:0.95'")


class NSP2(ProjectedPrompts):
    """From task 2 on the prompts' Adam step u [M, D] becomes `B2 u B1`; heads are never projected.

    After each task but the last, one pass over its images adds to the sums `C1` (rows q_h W_k,h of the image queries)
    and `C2` (softmax columns of the prompts) of every prompted block; `B = eta U0 U0^T / ||U0 U0^T||_F + (1 - eta) I`
    with U0 the directions the rule leaves free (Eqs. 24-29). The loss adds the drift of the prompts' LayerNorm mean and
    std since the previous task, averaged over prompts as the official code does (Eq. 27 sums). State: L (D^2 + M^2)
    numbers, whatever the number of tasks. Timeline: train, keep the prompts' moments, pass, projectors, refinement of
    the heads if asked for, evaluate.
    """

    name: ClassVar[str] = "nsp2"
    options_type: ClassVar[type[Options]] = NSP2Options
    options: NSP2Options

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.replay = None if self.options.refine == "none" else GaussianReplay(self.options.refine_covariance)
        self._previous: tuple[Tensor, Tensor] | None = None

    def _new_memory(self) -> Memory:
        options = self.options
        left = Cut(
            parse_rule("rule_left", options.rule_left or options.rule),
            options.eta if options.eta_left is None else options.eta_left,
            options.norm,
            options.solver,
        )
        right = Cut(parse_rule("rule", options.rule), options.eta, options.norm, options.solver)
        cuts = {side: cut for side, cut in (("left", left), ("right", right)) if options.sides in ("both", side)}
        return Accumulated(cuts, "images" if options.accumulation == "mean" else "sum", self._folded)

    def _folded(self, name: str, side: str, moment: Tensor) -> Tensor:
        """A moment of one block, `left` [M, M] or `right` [D, D], as its projector sees it: unchanged here."""
        return moment

    def _collector(self) -> Collector:
        return CovarianceCollector(self.model, what="prompt", weighting=self.options.weighting)

    def _regulariser(self) -> Tensor | None:
        if self._previous is None or self.options.ln_weight == 0:
            return None
        return self.options.ln_weight * ln_drift_loss([prompt for _, prompt in self._body()], *self._previous)

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        self._previous = prompt_moments([prompt.detach() for _, prompt in self._body()])
        super()._finish(task, loader)
        if self.replay is not None:
            self.replay.remember((self.features(images), labels) for images, labels in task.batches())
            self.replay.refine(self.heads, self.options)

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "previous": None if self._previous is None else list(self._previous),
            "replay": None if self.replay is None else self.replay.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        previous = state["previous"]
        self._previous = None if previous is None else (previous[0].to(self.device), previous[1].to(self.device))
        if self.replay is not None:
            self.replay.load(state["replay"], self.device)


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
