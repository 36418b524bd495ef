"""Why an arm did as it did: overfitting, generalisation, drift of features, and what its prompts are looked at with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.continual import Deployed
from cl_kernels.nn import PromptedViT

__all__ = ["diagnose", "drift", "linear_cka", "overfitting", "prompt_mass"]

IMAGES = 256  # whose features and attention are compared


def diagnose(
    arm: str, model: Deployed, frozen: Tensor, images: Tensor, test_curve: Mapping[int, Tensor], labels: Tensor,
    train_loss: float | None, train_accuracy: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The entry of results["diagnosis"] of one arm, at the largest size.

    `frozen` are the frozen backbone's features of `images` (prepared test images), `test_curve` epoch -> test
    log-probabilities, `labels` the test labels, which are open by now. `generalisation_gap` is the training accuracy
    minus the test accuracy of the last epoch."""
    last = test_curve[max(test_curve)]
    accuracy = float((last.argmax(dim=1) == labels).double().mean())
    loss = float(F.nll_loss(last.double(), labels))
    flag, z, best = overfitting(test_curve, labels)
    with torch.no_grad():
        features = torch.cat([model.method.features(part) for part in images.split(64)])
    return {
        "arm": arm,
        "overfit": flag,
        "overfit_z": z,
        "least_test_loss_epoch": best,
        "test_loss": loss,
        "generalisation_gap": None if train_accuracy is None else train_accuracy - accuracy,
        "loss_gap": None if train_loss is None else loss - train_loss,
        "drift": drift(features, frozen),
        "prompt_mass": prompt_mass(model.method.modules()[0], images),
    }


def overfitting(test_curve: Mapping[int, Tensor], labels: Tensor) -> tuple[bool, float, int]:
    """(flag, z, epoch of least loss): final minus minimal test loss in standard errors of the paired difference over
    images; flagged above 2. 0 where the last epoch is the best one, or the only one."""
    epochs = sorted(test_curve)
    losses = {epoch: -test_curve[epoch].double().gather(1, labels[:, None]).squeeze(1) for epoch in epochs}
    best = min(epochs, key=lambda epoch: float(losses[epoch].mean()))
    difference = losses[epochs[-1]] - losses[best]
    error = float(difference.std(unbiased=True)) / math.sqrt(len(labels)) if len(labels) > 1 else 0.0
    z = float(difference.mean()) / error if error > 0 else 0.0
    return z > 2, z, best


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features [N, D], [N, E] of the same images: 1 up to rotation and
    scale. ``|A^T B|_F^2 / (|A^T A|_F |B^T B|_F)``, columns centred, float64. 0 where one side is constant."""
    x, y = (value.double() - value.double().mean(dim=0) for value in (a, b))
    cross = float((x.mT @ y).square().sum())
    scale = float((x.mT @ x).norm() * (y.mT @ y).norm())
    return cross / scale if scale > 0 else 0.0


def drift(features: Tensor, frozen: Tensor) -> dict[str, float]:
    """How near trained features are to those of the frozen model, image by image: linear CKA and mean cosine."""
    cosine = F.cosine_similarity(features.double(), frozen.double(), dim=1)
    return {"cka": linear_cka(features, frozen), "cosine": float(cosine.mean())}


def prompt_mass(model: nn.Module, images: Tensor) -> list[float | None]:
    """By block, the mean share of the attention of image tokens that goes to prompts; None for a block without prompts
    of its own, empty for a model without any."""
    if not isinstance(model, PromptedViT):
        return []
    sums: dict[int, list[float]] = {}

    def watch(block: int, _queries: Tensor, shares: Tensor) -> None:
        sums.setdefault(block, []).append(float(shares.sum(dim=-1).double().mean()))

    with torch.no_grad(), model.observe(watch):
        for part in images.split(64):
            model(part)
    depth = len(model.backbone.blocks) if isinstance(model.backbone.blocks, Sequence | nn.Sequential) else 0
    return [sum(sums[block]) / len(sums[block]) if block in sums else None for block in range(depth)]
