"""Cached frozen features: what a head sees, layer by layer, computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cl_kernels import data
from cl_kernels.compare import features
from cl_kernels.compare.features import extract
from cl_kernels.data import Backbone
from cl_kernels.errors import NonFiniteError
from cl_kernels.methods._features import FrozenFeatures

pytest.importorskip("timm", reason="backbones are timm models")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return data.load_backbone("embedded-small")


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return data.load("digits").train.tensors()[:150]


def token_backbone() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0, reg_tokens=2)


def test_pooled_features_are_what_a_head_sees(backbone: Backbone, digits: Tensor) -> None:
    found = extract(backbone, digits, batch_size=64)
    with torch.no_grad():
        frozen = FrozenFeatures(backbone.model)
        wanted = torch.cat([frozen(backbone.preprocessing(batch)) for batch in digits.split(64)])
    assert torch.equal(found.pooled, wanted)
    assert found.pooled.dtype == torch.float32
    assert found.layers == {}
    assert torch.equal(extract(backbone.model, backbone.preprocessing(digits)).pooled, wanted)  # prepared already
    torch.testing.assert_close(extract(backbone, digits, batch_size=7).pooled, wanted, atol=1e-5, rtol=1e-5)


def test_layers_are_the_mean_of_the_patches_or_the_class_token(backbone: Backbone, digits: Tensor) -> None:
    found = extract(backbone, digits, layers="all")
    assert (found.kind, sorted(found.layers)) == ("mean", [0, 1, 2, 3])
    last = backbone.model.fc_norm(found.layers[3])  # average pooling: norm is the identity, fc_norm follows the mean
    torch.testing.assert_close(last, found.pooled, atol=1e-5, rtol=1e-5)
    images, token = torch.randn(9, 3, 16, 16), token_backbone()
    by_class = extract(token, images, layers=[1, 2])
    assert (by_class.kind, sorted(by_class.layers)) == ("cls", [1, 2])
    torch.testing.assert_close(token.norm(by_class.layers[2]), by_class.pooled, atol=1e-5, rtol=1e-5)
    averaged = token_backbone()
    averaged.global_pool = "avg"  # class token and registers are left out of the mean
    rows: list[Tensor] = []
    averaged.blocks[1].register_forward_hook(lambda _m, _i, out: rows.append(out))
    assert torch.equal(extract(averaged, images, layers=[1]).layers[1], rows[0][:, 3:].mean(dim=1))


def test_the_backbone_is_left_as_it_was() -> None:
    model = token_backbone().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = features.weight_hash(model)
    extract(model, torch.randn(3, 3, 16, 16), layers="all")
    assert [module.training for module in model.modules()] == modes
    assert features.weight_hash(model) == before
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_cache_is_read_back_and_never_for_other_data_or_weights(
    backbone: Backbone, digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = features._forward
    monkeypatch.setattr(features, "_forward", lambda *a: calls.append(1) or forward(*a))
    first = extract(backbone, digits, layers="all", cache=tmp_path)
    again = extract(backbone, digits, layers=[2], cache=tmp_path, batch_size=32)
    assert (first.cached, again.cached, len(calls)) == (False, True, 1)
    assert torch.equal(first.pooled, again.pooled)
    assert torch.equal(first.layers[2], again.layers[2])
    extract(backbone, 255 - digits, cache=tmp_path)
    other = data.load_backbone("embedded-small")
    with torch.no_grad():
        next(other.model.parameters())[0] += 1
    extract(other, digits, cache=tmp_path)
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cache_without_the_layers_and_a_damaged_one_are_made_anew(
    backbone: Backbone, digits: Tensor, tmp_path: Path
) -> None:
    extract(backbone, digits, cache=tmp_path)
    assert not extract(backbone, digits, layers="all", cache=tmp_path).cached
    assert extract(backbone, digits, layers="all", cache=tmp_path).cached
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert not extract(backbone, digits, cache=tmp_path).cached
    assert extract(backbone, digits, cache=tmp_path).cached


def test_rows_progress_and_empty_sets(backbone: Backbone, digits: Tensor) -> None:
    done: list[tuple[int, int]] = []
    found = extract(backbone, digits, layers=[0], on_batch=lambda *n: done.append(n))
    assert done == [(64, 150), (128, 150), (150, 150)]
    part = found.rows(torch.tensor([5, 2]))
    assert torch.equal(part.pooled, found.pooled[[5, 2]])
    assert torch.equal(part.layers[0], found.layers[0][[5, 2]])
    assert len(part) == 2
    assert extract(backbone, digits[:0], layers=[0]).layers[0].shape == (0, 64)


def test_images_decoded_once(backbone: Backbone) -> None:
    part = data.load("digits").train.subset(range(20))
    reads: list[int] = []
    source = part._images.read
    part._images.read = lambda index: reads.append(index) or source(index)  # type: ignore[method-assign]
    extract(backbone, part)
    extract(backbone, part, layers="all")
    assert len(reads) == 20


def test_wrong_input_is_named(backbone: Backbone, digits: Tensor) -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        extract(backbone.model, digits)
    with pytest.raises(ValueError, match=r"layers: the backbone has blocks 0\.\.3, got \[4\]"):
        extract(backbone, digits, layers=[4])
    with pytest.raises(ValueError, match=r"images: expected \[N, C, H, W\]"):
        extract(backbone, digits[0])
    with pytest.raises(ValueError, match="batch_size"):
        extract(backbone, digits, batch_size=0)
    bad = backbone.preprocessing(digits[:5])
    bad[3] = float("nan")
    with pytest.raises(NonFiniteError, match="image 3"):
        extract(backbone.model, bad)
