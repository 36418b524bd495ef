"""Costs and diagnosis of trained arms, on numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from continual_tiny import tiny_model
from torch import Tensor

from cl_kernels.compare.cost import multiply_adds, task_bytes
from cl_kernels.compare.diagnosis import drift, linear_cka, overfitting, prompt_mass
from cl_kernels.nn import PromptedViT


def test_bytes_for_many_tasks() -> None:
    assert task_bytes(10, 1000, [1, 2, 5, 20]) == {"1": 1010, "2": 1020, "5": 1050, "20": 1200}
    assert task_bytes(1010, 1000, [20, 1]) == {"1": 1010, "20": 20_200}, "a full copy needs no backbone beside it"


def test_multiply_adds_of_a_vision_transformer_by_hand() -> None:
    """Width 32, two blocks, 2 heads, 4 patches of 8 x 8 x 3 and a class token: 5 rows."""
    model = tiny_model().eval()
    rows, width, patch = 5, 32, 8 * 8 * 3
    block = rows * 12 * width * width + 2 * rows * rows * width
    expected = 4 * patch * width + 2 * block
    with torch.no_grad():
        assert multiply_adds(model, torch.zeros(1, 3, 16, 16)) == expected


def test_multiply_adds_count_the_prompts() -> None:
    """A deep prompt adds a row to project to keys, values and queries, and a column for each of 5 rows to attend to."""
    counts = []
    for prompts in (1, 3):
        model = PromptedViT(tiny_model(), prompts=prompts).eval()
        counts.append(multiply_adds(model, torch.zeros(1, 3, 16, 16)))
    attended = 2 * 2 * (2 * 5 * 32)  # two more prompts in two blocks: q k^T and the product with v
    projected = 2 * 2 * 3 * 32 * 32
    assert attended <= counts[1] - counts[0] <= attended + projected


def curve(*losses: float, images: int = 100, spread: float = 0.3) -> tuple[dict[int, Tensor], Tensor]:
    """Test log-probabilities whose mean loss is `losses`, and labels."""
    noise = spread * torch.randn(images, generator=torch.Generator().manual_seed(0)).double()
    found = {}
    for epoch, loss in enumerate(losses, start=1):
        right = -(loss + noise * (1 + 0.1 * epoch) - (noise * (1 + 0.1 * epoch)).mean()).clamp(min=1e-3)
        found[epoch] = torch.stack([right, torch.log1p(-right.exp())], dim=1)
    return found, torch.zeros(images, dtype=torch.int64)


def test_overfitting_is_a_rise_above_two_standard_errors() -> None:
    assert overfitting(*curve(1.5, 1.2, 1.1)) == (False, 0.0, 3)
    flag, z, best = overfitting(*curve(1.5, 1.1, 1.3))
    assert flag
    assert z > 2
    assert best == 2
    flag, z, _ = overfitting(*curve(1.5, 1.100, 1.101, spread=0.5))
    assert not flag
    assert overfitting(*curve(1.5)) == (False, 0.0, 1)


def test_cka_is_blind_to_rotation_and_scale_and_sees_other_features() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    assert linear_cka(x, 3 * x @ turned + 1) == pytest.approx(1.0, abs=1e-6)
    other = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    assert linear_cka(x, other) < 0.2
    assert linear_cka(x, other) == pytest.approx(linear_cka(other, x))
    assert linear_cka(x, torch.ones(200, 8)) == 0.0


def test_drift_of_the_frozen_model_itself_is_none() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = drift(x, x)
    assert found["cka"] == pytest.approx(1.0)
    assert found["cosine"] == pytest.approx(1.0)
    assert drift(-x, x)["cosine"] == pytest.approx(-1.0)


def test_attention_to_prompts_by_block() -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PromptedViT(tiny_model(), prompts=4).eval()
    shares = prompt_mass(model, images)
    assert len(shares) == 2
    assert all(share is not None and 0 < share < 1 for share in shares)
    partly = prompt_mass(PromptedViT(tiny_model(), prompts=4, depth=[1]).eval(), images)
    assert partly[0] is None
    assert partly[1] is not None
    assert prompt_mass(tiny_model(), images) == []
    assert not math.isnan(sum(share or 0.0 for share in shares))
