"""Adam-NSCL: Adam steps in the null space of earlier tasks' inputs (Wang et al., CVPR 2021)."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._bodies import BodyOptions
from cl_kernels.methods._memory import Accumulated, Cut, Memory
from cl_kernels.methods._options import Options, number, require
from cl_kernels.methods._projected import Collector, Projected, ProjectedPrompts, ProjectedWeights
from cl_kernels.methods._subspaces import CutOptions, parse_rule
from cl_kernels.methods._weights import LINEAR_TARGETS
from cl_kernels.optim import ProjectedAdam
from cl_kernels.subspace import CovarianceCollector

__all__ = ["AdamNSCLOptions", "create_adam_nscl"]


@dataclass(frozen=True, kw_only=True)
class AdamNSCLOptions(CutOptions, BodyOptions):
    """Options of `adam-nscl`.

    * base: "full" as published, or "prompts", with the statistics of NSP2 and this method's rule and step.
    * rule: "times:1000" leaves free eigenvalues up to 1000 times the smallest; see `parse_rule`. Published is 10 or 30,
      for convolutions: of a transformer's layers that leaves a quarter of the directions, and less is learned.
    * floor: the smallest eigenvalue counts as at least this times the largest.
    * normalize: "fro" as the official code, "none" as the paper.
    * eta: weight of the projector against the identity, 1 as published.
    * statistic: "rows" is every row of a layer's input (paper); "batch-mean" averages each batch first (official code;
      full only): cheaper by the batch size, of lower rank, and blind to what the average cancels.
    * accumulation: "mean" over all rows of all tasks (paper) or "sum" (code). Only a "threshold" rule tells them apart
      unless statistic is "batch-mean".
    * later_scale: factor on the body's learning rate from task 2 on (published: 0.5).
    * head_weight_decay: of the heads; `weight_decay` is the body's, added to the gradient.
    """

    allowed_targets: ClassVar[tuple[str, ...]] = LINEAR_TARGETS
    base: str = "full"
    rule: str = "times:1000"
    floor: float = 1e-10
    statistic: str = "rows"
    accumulation: str = "mean"
    later_scale: float = 1.0
    head_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("floor", number(self.floor, 0.0, 1.0), "a number in [0, 1]", self.floor)
        require("statistic", self.statistic in ("rows", "batch-mean"), "rows or batch-mean", self.statistic)
        if self.statistic == "batch-mean" and self.base == "prompts":
            raise ValueError("statistic: batch-mean is of layer inputs; base='prompts' has none, use 'rows'")
        require("accumulation", self.accumulation in ("sum", "mean"), "sum or mean", self.accumulation)
        require("later_scale", number(self.later_scale, 0.0, 1e3), "a number in [0, 1000]", self.later_scale)
        decay = self.head_weight_decay
        require("head_weight_decay", number(decay, 0.0, 1e3), "a number in [0, 1000]", decay)
        if self.base == "prompts" and self.prompts < 3 and "knee" in self.rule:
            raise ValueError(f"rule: {self.rule} needs 3 prompts to have a bend, got {self.prompts}")


class AdamNSCL(Projected):
    """From task 2 on Adam's step u becomes `u P`, P onto the eigenvectors of the inputs' second moment C with
    `lambda <= c lambda_min`; for prompts `P_left u P_right`.

    Timeline: train, pass over the task's images without augmentation in eval mode, C averaged or summed over tasks, P
    made anew, new Adam. Guaranteed: the sum of any number of steps stays in the null space, weight decay included, so
    for old inputs X, |X dW^T| <= sqrt(c lambda_min rows) |dW|, and about 1e-6 |X| |dW| in float32 where the inputs are
    of exactly low rank; the state has a constant size. Not guaranteed: anything about inputs outside C, and for
    prompts what the LayerNorm does between prompt and key (see `nsp2-exact`).

    Traps of the official code that cannot occur (method-null-space.md 15.1):

    1. Nothing depends on gradients being zero instead of None: projectors are found by parameter name, and a trained
       parameter without one raises. In the official code a `zero_grad` of torch 2 disables all projection silently.
    2. The smallest eigenvalue of a rank-deficient C is rounding noise, which leaves 5 of 4608 directions in the
       official logs; here it counts as at least `floor` times the largest, so the numerical null space is free.
    3. One-dimensional parameters do not crash the step: none is trained, and one would pass unprojected.
    4. The Frobenius norm, a hidden factor 1/sqrt(free) on the learning rate, is an option, and the report shows the
       gain.

    The paper's EWC penalty on BatchNorm's gain and bias, and its running statistics, have no counterpart: a vision
    transformer has LayerNorm, which keeps no statistics and does not train here."""

    name: ClassVar[str] = "adam-nscl"
    options_type: ClassVar[type[Options]] = AdamNSCLOptions
    default_weight_decay: ClassVar[float] = 5e-5
    options: AdamNSCLOptions

    def _new_memory(self) -> Memory:
        options = self.options
        cut = Cut(parse_rule("rule", options.rule, options.floor), options.eta, options.norm, options.solver)
        return Accumulated({"left": cut, "right": cut}, "rows" if options.accumulation == "mean" else "sum")

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ProjectedAdam(groups, betas=self.options.betas, eps=self.options.eps)

    def _body_scale(self) -> float:
        return self.options.later_scale if len(self.tasks) > 1 else 1.0

    def _head_weight_decay(self) -> float:
        return self.options.head_weight_decay


class AdamNSCLPrompts(AdamNSCL, ProjectedPrompts):
    """Adam-NSCL on visual prompts."""

    options: AdamNSCLOptions


class AdamNSCLWeights(AdamNSCL, ProjectedWeights):
    """Adam-NSCL on the linear layers of the blocks."""

    options: AdamNSCLOptions

    def _collector(self) -> Collector:
        if self.options.statistic == "batch-mean":
            return BatchMeans(self.backbone, self._layers())
        return super()._collector()


class BatchMeans(AbstractContextManager["BatchMeans"]):
    """Second moments of each layer's input averaged over the images of a batch, as Adam-NSCL's code has them."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self._layers = {name: model.get_submodule(name) for name in layers}
        self._sums = CovarianceCollector()
        self._hooks = ExitStack()

    def __enter__(self) -> BatchMeans:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.register_forward_pre_hook(self._hook(f"{name}.weight")).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            wide = torch.promote_types(args[0].dtype, torch.float32)
            self._sums.update(name, args[0].detach().mean(dim=0, dtype=wide))

        return hook

    def covariances(self) -> dict[str, Any]:
        """`Covariance` by parameter name."""
        return self._sums.covariances()


def create_adam_nscl(backbone: nn.Module, options: AdamNSCLOptions) -> HeadMethod:
    """The form that `options.base` names."""
    return AdamNSCLWeights(backbone, options) if options.base == "full" else AdamNSCLPrompts(backbone, options)
