"""Methods that train the weights of the backbone itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._features import FrozenFeatures
from cl_kernels.methods._groups import by_layer
from cl_kernels.methods._options import Options, number, require
from cl_kernels.optim import ProjectedAdamW

__all__ = ["LINEAR_TARGETS", "WeightMethod", "WeightOptions"]

LINEAR_TARGETS = ("blocks", "attention", "mlp")
"""What a projector of a layer's inputs can protect: a bias, norm or embedding passes by them."""


@dataclass(frozen=True, kw_only=True)
class WeightOptions(Options):
    """targets: "blocks" trains every linear weight inside the transformer blocks; "attention" and "mlp" a part of
    them; "all" everything that makes the feature, with biases, norms and embeddings. layer_decay: the learning rate of
    block l of L is lr * layer_decay^(L - l), of the embeddings lr * layer_decay^(L + 1); 1 is the same for all."""

    allowed_targets: ClassVar[tuple[str, ...]] = (*LINEAR_TARGETS, "all")
    targets: str = "blocks"
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = self.allowed_targets
        wanted = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        require("targets", self.targets in allowed, wanted, self.targets)
        fits = number(self.layer_decay, 1e-6, 1.0)
        require("layer_decay", fits, "a number in (0, 1]", self.layer_decay)


class TrainedFeatures(FrozenFeatures):
    """The backbone's feature with some weights unfrozen; still in eval mode, so that dropout and norms stay as they
    were."""


class WeightMethod(HeadMethod):
    """All weight matrices of the blocks' `nn.Linear` layers train through AdamW; biases, norms and embeddings stay.

    Only the weights by default: a bias update would pass by the input subspace that the projected variants protect.
    `targets="all"` trains every parameter that the feature is made of, a classifier's left out.
    """

    options_type: ClassVar[type[Options]] = WeightOptions
    default_lr: ClassVar[float] = 3e-4
    default_weight_decay: ClassVar[float] = 0.0
    options: WeightOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        chosen = _everything if self.options.targets == "all" else _linears
        self._weights = list(chosen(backbone, self.options.targets))
        if not self._weights:
            raise ValueError(f"backbone: no nn.Linear in `blocks` matches targets={self.options.targets!r}")

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        return TrainedFeatures(backbone)

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        return self._weights

    def _body_groups(self, body: list[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        if self.options.layer_decay == 1.0:
            return super()._body_groups(body, lr)
        return by_layer(body, lr, self._weight_decay(), self.options.layer_decay)

    def _undecayed(self) -> set[str]:
        return set(getattr(self.backbone, "no_weight_decay", set)())

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return ProjectedAdamW(groups, betas=self.options.betas, eps=self.options.eps)


def _linears(backbone: nn.Module, targets: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the `nn.Linear` layers of the blocks that `targets` names."""
    part = {"blocks": "", "attention": ".attn.", "mlp": ".mlp."}[targets]
    modules = dict(backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        if (
            name.startswith("blocks.")
            and part in name
            and name.endswith(".weight")
            and isinstance(modules[name.removesuffix(".weight")], nn.Linear)
        ):
            yield name, parameter


def _everything(backbone: nn.Module, targets: str) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters but those of the classifier, which features do not pass."""
    classifier = getattr(backbone, "get_classifier", nn.Identity)()
    left_out = {id(parameter) for parameter in classifier.parameters()}
    for name, parameter in backbone.named_parameters():
        if id(parameter) not in left_out:
            yield name, parameter
