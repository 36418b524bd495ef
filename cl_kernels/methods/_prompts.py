"""Methods that train visual prompts on a frozen backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._options import Options, count, require
from cl_kernels.nn import PromptedViT
from cl_kernels.optim import ProjectedAdam

__all__ = ["PromptMethod", "PromptOptions"]


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Options):
    """Options of methods with prompts.

    * prompts: number per prompted block.
    * depth: "deep", "shallow", or a number: the first so many blocks.
    * placement: "append" after the image tokens, or "prepend".
    """

    prompts: int = 4
    depth: str | int = "deep"
    placement: str = "append"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("prompts", count(self.prompts, 1, 4096), "an int in [1, 4096]", self.prompts)
        ok = self.depth in ("deep", "shallow") or count(self.depth, 1, 4096)
        require("depth", ok, "deep, shallow or a number of blocks", self.depth)
        require("placement", self.placement in ("append", "prepend"), "append or prepend", self.placement)


class PromptMethod(HeadMethod):
    """Prompts of every block train through Adam with L2 decay."""

    options_type: ClassVar[type[Options]] = PromptOptions
    options: PromptOptions
    model: PromptedViT

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        depth = self.options.depth
        blocks = len(getattr(backbone, "blocks", ()))
        fits = not isinstance(depth, int) or depth <= blocks
        require("depth", fits, f"at most the {blocks} blocks of the backbone", depth)
        return PromptedViT(
            backbone,
            prompts=self.options.prompts,
            depth=range(depth) if isinstance(depth, int) else depth,
            placement=self.options.placement,
        )

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if name.startswith("prompts.")]

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ProjectedAdam(groups, betas=self.options.betas, eps=self.options.eps)
