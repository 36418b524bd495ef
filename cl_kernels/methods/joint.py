"""Joint training on all tasks seen so far: the upper line of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._bodies import BodyOptions
from cl_kernels.methods._options import Options
from cl_kernels.methods._prompts import PromptMethod
from cl_kernels.methods._task import Task
from cl_kernels.methods._weights import WeightMethod

__all__ = ["JointOptions", "create_joint"]


@dataclass(frozen=True, kw_only=True)
class JointOptions(BodyOptions):
    """restart: start every task from the pre-trained model, so that the last row of the accuracy matrix is training on
    all data at once; otherwise go on from the previous task."""

    restart: bool = True


class _Joint(HeadMethod):
    """All classes seen compete in the loss, and all heads train."""

    name: ClassVar[str] = "joint"
    options_type: ClassVar[type[Options]] = JointOptions
    options: JointOptions
    scope = "seen"

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._origin: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _start(self, task: Task) -> None:
        if not self.options.restart:
            return
        if not self._origin:
            self._origin = {name: parameter.detach().clone() for name, parameter in self._body()}
        for name, parameter in self._body():
            parameter.copy_(self._origin[name])

    def _init_head(self, task: Task, new: bool) -> None:
        if self.options.restart:
            self._init_heads(range(len(self.heads.parts)), task.batches, task.index)
        else:
            super()._init_head(task, new)

    def _state(self) -> dict[str, Any]:
        return {"origin": self._origin}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._origin = {name: tensor.to(self.device) for name, tensor in state["origin"].items()}


class JointPrompts(_Joint, PromptMethod):
    """Joint training of prompts."""

    options: JointOptions


class JointFull(_Joint, WeightMethod):
    """Joint training of all linear weights."""

    options: JointOptions


def create_joint(backbone: nn.Module, options: JointOptions) -> HeadMethod:
    """The joint method of the base that `options` names."""
    return JointFull(backbone, options) if options.base == "full" else JointPrompts(backbone, options)
