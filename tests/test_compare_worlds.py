"""Worlds in which it is known who must win: PB17 on made-up labels, PB18 on CIFAR-100 where real weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import tiny_model
from torch import Tensor, nn

from cl_kernels import data as image_data
from cl_kernels.compare.subsets import subset
from cl_kernels.compare.trial import train_trial


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def accuracy(arm: str, options: dict[str, Any], model: nn.Module, train: Any, test: Any, **how: Any) -> float:
    images, labels = test
    classes = int(train[1].max()) + 1
    trial = train_trial(arm, options, model, *train, classes=classes, seed=0, test_images=images, **how)
    assert trial.final is not None
    return float((trial.final.argmax(dim=1) == labels).double().mean())


@pytest.mark.slow
def test_labels_that_are_linear_in_frozen_features_are_for_prompts_and_the_linear_probe() -> None:
    """PB17, first half: 100 images. Measured: linear 0.87, prompts 0.82, full 0.73 at the best of three rates."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model().eval()
    images = torch.randn(1100, 3, 16, 16, generator=generator)
    with torch.no_grad():
        features = model(images)
    score = (features - features.mean(dim=0)) @ torch.randn(32, generator=generator)
    labels = (score > score.median()).long()
    train, test = (images[:100], labels[:100]), (images[100:], labels[100:])
    how: dict[str, Any] = {"epochs": 100, "batch_size": 16}
    full = max(accuracy("full", {"lr": lr}, model, train, test, **how) for lr in (3e-4, 1e-3, 3e-3))
    assert accuracy("linear", {"lr": 1e-2}, model, train, test, **how) >= full
    assert accuracy("vpt-deep", {"prompts": 2, "lr": 1e-2}, model, train, test, **how) >= full


def parity(count: int) -> tuple[Tensor, Tensor]:
    """Noise with two marked squares; the label is whether their signs differ, which no linear feature shows."""
    generator = torch.Generator().manual_seed(1)
    images = 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
    signs = torch.randint(0, 2, (2, count), generator=generator)
    for place, sign in enumerate(signs):
        square = slice(4 * place, 4 * place + 4)
        images[:, :, square, square] += (2.0 * sign - 1)[:, None, None, None]
    return images, signs[0] ^ signs[1]


@pytest.mark.slow
def test_labels_in_what_the_backbone_discards_are_for_full_fine_tuning() -> None:
    """PB17, second half: the parity of a block of pixels, 20,000 images. Measured: full 1.00, prompts 0.78."""
    images, labels = parity(21_000)
    train, test = (images[:20_000], labels[:20_000]), (images[20_000:], labels[20_000:])
    how: dict[str, Any] = {"epochs": 3, "batch_size": 128}
    full = accuracy("full", {"lr": 1e-3}, tiny_model(), train, test, **how)
    prompts = accuracy("vpt-deep", {"prompts": 2, "lr": 1e-2}, tiny_model(), train, test, **how)
    assert full > prompts + 0.05
    assert full > 0.95


@pytest.mark.slow
def test_cifar_100_on_a_real_vit_b(data_dir: Path) -> None:
    """PB18: 800 + 200 images, VPT-deep with 10 prompts 75 to 80, full fine-tuning 62 to 71, a gap of 6 or more."""
    weights, shard = data_dir / "vit_base_patch16_224.augreg_in21k.safetensors", data_dir / "cifar100.npz"
    for path in (weights, shard):
        if not path.exists():
            pytest.skip(f"needs {path.name} in the data folder")
    backbone = image_data.load_backbone("vit_base_patch16_224.augreg_in21k", weights)
    data = image_data.load(shard, image_size=224)
    rows = subset(data.train.labels, 1000, 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = (backbone.preprocessing(data.train.subset(rows).tensors()), data.train.labels[rows])
    test = (backbone.preprocessing(data.test.tensors()), data.test.labels)
    model = backbone.model.to(device)
    how: dict[str, Any] = {"epochs": 100, "batch_size": 64}
    prompts = accuracy("vpt-deep", {"prompts": 10, "lr": 3e-3}, model, train, test, **how)
    full = accuracy("full", {"lr": 3e-5}, model, train, test, **how)
    assert 0.75 <= prompts <= 0.80
    assert 0.62 <= full <= 0.71
    assert prompts - full >= 0.06
