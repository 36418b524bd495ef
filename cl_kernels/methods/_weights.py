"""Methods that train the linear weights of the backbone itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._features import FrozenFeatures
from cl_kernels.methods._options import Options, require
from cl_kernels.optim import ProjectedAdamW

__all__ = ["WeightMethod", "WeightOptions"]


@dataclass(frozen=True, kw_only=True)
class WeightOptions(Options):
    """targets: "blocks" trains every linear weight inside the transformer blocks; "attention" and "mlp" a part of
    them."""

    targets: str = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("targets", self.targets in ("blocks", "attention", "mlp"), "blocks, attention or mlp", self.targets)


class TrainedFeatures(FrozenFeatures):
    """The backbone's feature with some weights unfrozen; still in eval mode, so that dropout and norms stay as they
    were."""


class WeightMethod(HeadMethod):
    """All weight matrices of the blocks' `nn.Linear` layers train through AdamW; biases, norms and embeddings stay.

    Only the weights: a bias update would pass by the input subspace that the projected variants protect.
    """

    options_type: ClassVar[type[Options]] = WeightOptions
    default_lr: ClassVar[float] = 3e-4
    default_weight_decay: ClassVar[float] = 0.0
    options: WeightOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        part = {"blocks": "", "attention": ".attn.", "mlp": ".mlp."}[self.options.targets]
        modules = dict(backbone.named_modules())
        self._weights = [
            (name, parameter)
            for name, parameter in backbone.named_parameters()
            if name.startswith("blocks.")
            and part in name
            and name.endswith(".weight")
            and isinstance(modules[name.removesuffix(".weight")], nn.Linear)
        ]
        if not self._weights:
            raise ValueError(f"backbone: no nn.Linear in `blocks` matches targets={self.options.targets!r}")

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        return TrainedFeatures(backbone)

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        return self._weights

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ProjectedAdamW(groups, betas=self.options.betas, eps=self.options.eps)

    @property
    def backbone(self) -> nn.Module:
        """The timm model whose weights train; its parameter names are the keys of the subspaces."""
        return self.model.get_submodule("backbone")
