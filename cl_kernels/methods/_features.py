"""The feature that heads look at, straight from a timm vision transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["FrozenFeatures", "feature_dim"]


class FrozenFeatures(nn.Module):
    """The pooled, normalised feature of a timm vision transformer, before its classifier; frozen and in eval mode."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        forward_features: Any = self.backbone.forward_features
        forward_head: Any = self.backbone.forward_head
        features: Tensor = forward_head(forward_features(images), pre_logits=True)
        return features

    def train(self, mode: bool = True) -> FrozenFeatures:
        return super().train(False)


def feature_dim(backbone: nn.Module) -> int:
    """The width of the feature that the classifier would see."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise TypeError(f"backbone: expected a timm model with `num_features`, got {type(backbone).__name__}")
    return width
