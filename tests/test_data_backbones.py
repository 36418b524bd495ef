"""Backbones: the embedded one, files, timm names; and the script that trains the embedded one."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cl_kernels import data
from cl_kernels.data.architectures import architecture_of, build_backbone
from cl_kernels.data.backbones import EMBEDDED, embedded_weights
from cl_kernels.errors import CheckpointError

timm = pytest.importorskip("timm", reason="backbones are timm models")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pretrain_backbone.py"
SHAPE = {
    "img_size": 16,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "global_pool": "avg",
    "class_token": False,
}


def own_file(path: Path, shape: dict[str, object] | None = None, **metadata: str) -> dict[str, torch.Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    tensors = VisionTransformer(**SHAPE, num_classes=0).state_dict()
    save_file(tensors, path, {"architecture": json.dumps(shape or SHAPE), "mean": "0.5", "std": "0.25", **metadata})
    return tensors


def test_embedded_backbone() -> None:
    model, preprocessing = data.load_backbone()
    small, _ = data.load_backbone("embedded-small")
    assert small.num_features < model.num_features
    assert embedded_weights().stat().st_size <= 8 << 20
    assert not model.training
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        features = model(preprocessing(pixels))
    assert features.shape == (2, model.num_features)
    assert torch.isfinite(features).all()


def test_embedded_features_know_digits() -> None:
    """Nearest class mean on features of unseen real images knows nine in ten digits."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    model, preprocessing = data.load_backbone()
    digits = data.load("digits")
    with torch.no_grad():
        train, test = (
            torch.nn.functional.normalize(model(preprocessing(part.tensors())), dim=1)
            for part in (digits.train, digits.test)
        )
    means = torch.stack([train[digits.train.labels == label].mean(0) for label in range(10)])
    right = ((test @ torch.nn.functional.normalize(means, dim=1).T).argmax(1) == digits.test.labels).float().mean()
    assert right > 0.9  # 0.951 when the weights were made


def test_the_model_card_matches_the_weights() -> None:
    import hashlib

    card = next(embedded_weights().parent.glob("*.md")).read_text()
    for name in EMBEDDED:
        assert hashlib.sha256(embedded_weights(name).read_bytes()).hexdigest() in card


def test_own_file_carries_its_shape(tmp_path: Path) -> None:
    tensors = own_file(tmp_path / "b.safetensors")
    model, preprocessing = data.load_backbone(tmp_path / "b.safetensors")
    assert preprocessing == data.Preprocessing(16, (0.5,), (0.25,), 1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key])
    again, _ = data.load_backbone("embedded", weights=tmp_path / "b.safetensors")
    assert torch.equal(again.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    tensors = own_file(tmp_path / "b.safetensors")
    meta = {"architecture": json.dumps(SHAPE), "mean": "0.5", "std": "0.25"}
    save_file({key: value.half() for key, value in tensors.items()}, tmp_path / "h.safetensors", meta)
    model, _ = data.load_backbone(tmp_path / "h.safetensors")
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_timm_names_need_a_local_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights"):
        data.load_backbone("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"unknown backbone .*vit_tiny_patch16_224"):
        data.load_backbone("vit_tiny_patch16_242")
    with pytest.raises(ValueError, match="embedded"):
        data.load_backbone("embeded")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        data.load_backbone("vit_tiny_patch16_224", weights=tmp_path / "gone.safetensors")


def test_timm_weights_load_without_their_head_and_at_another_size(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    path = tmp_path / "tiny.safetensors"
    save_file(source.state_dict(), path)
    model, preprocessing = data.load_backbone("vit_tiny_patch16_224", weights=path)
    assert (preprocessing.size, preprocessing.channels, preprocessing.interpolation) == (224, 3, "bicubic")
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    images = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            model(preprocessing(images)),
            source.eval().forward_head(source.forward_features(preprocessing(images)), pre_logits=True),
        )
    small, preprocessing = data.load_backbone("vit_tiny_patch16_224", weights=path, image_size=64)
    assert preprocessing.size == 64
    assert small.pos_embed.shape == (1, 17, 192)
    assert torch.equal(small.pos_embed[:, 0], source.pos_embed[:, 0])  # the class token's is not resampled


def test_random_weights_are_asked_for_by_name() -> None:
    model, preprocessing = data.load_backbone("vit_tiny_patch16_224", weights="random", image_size=32)
    assert model(preprocessing(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))).shape == (1, 192)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    tensors = own_file(path)
    meta = {"architecture": json.dumps(SHAPE), "mean": "0.5", "std": "0.25"}
    cases = {
        "missing blocks.0.norm1.weight": {k: v for k, v in tensors.items() if k != "blocks.0.norm1.weight"},
        "unexpected other": tensors | {"other": torch.zeros(1)},
        "pos_embed is": tensors | {"pos_embed": torch.zeros(1, 9, 8)},
        "NaN": tensors | {"norm.bias": torch.full((8,), float("nan"))},
    }
    for word, content in cases.items():
        save_file(content, path, meta)
        with pytest.raises(CheckpointError, match=word):
            data.load_backbone(path)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9},
        {"depth": True},
        {"embed_dim": "8"},
        {"num_heads": 3},
        {"img_size": 0},
        {"global_pool": "nonsense"},
        {"extra": 1},
    ],
)
def test_hostile_architecture(tmp_path: Path, change: dict[str, object]) -> None:
    own_file(tmp_path / "b.safetensors", shape=SHAPE | change)
    with pytest.raises(CheckpointError, match="architecture"):
        data.load_backbone(tmp_path / "b.safetensors")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    own_file(path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-20], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"b\.safetensors"):
            data.load_backbone(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="pickle"):
        data.load_backbone(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        data.load_backbone(path)
    own_file(path, mean="half")
    with pytest.raises(CheckpointError, match="mean"):
        data.load_backbone(path)


# --- the training script -------------------------------------------------------------------------------------------


def ink_shard(path: Path) -> None:
    """Two hundred drawings of five 'characters', each a fixed random pattern with noise."""
    rng = np.random.default_rng(0)
    shapes = rng.random((5, 1, 21, 21)) < 0.3
    ink = np.concatenate([shapes ^ (rng.random((5, 4, 21, 21)) < 0.05) for _ in range(4)], axis=1).reshape(-1, 441)
    labels = np.repeat(np.arange(5), 16)
    np.savez(
        path,
        ink_bits=np.packbits(ink, axis=1),
        shape=np.array([21, 21]),
        labels=labels,
        is_test=np.arange(80) % 16 > 11,
        class_names=np.array([f"c{index}" for index in range(5)]),
    )


SMALL = ["--size=16", "--width=16", "--heads=2", "--depth=1", "--batch=16", "--epochs=6", "--save-every=2"]


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    return ["--data", str(folder / "ink.npz"), "--out", str(folder / out), *SMALL, *more]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it sets torch's threads, which are put back."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("pretrain_backbone", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


def test_pretraining_is_seeded_and_resumes_exactly(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    ink_shard(tmp_path / "ink.npz")
    script.main(arguments(tmp_path, "whole.safetensors"))
    command = [sys.executable, str(SCRIPT), *arguments(tmp_path, "half.safetensors")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("epoch    4"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.stdout.close()
    killed.wait()
    assert not (tmp_path / "half.safetensors").exists()
    capsys.readouterr()
    script.main(arguments(tmp_path, "half.safetensors"))
    assert "epoch    1" not in capsys.readouterr().out
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    model, _ = data.load_backbone(tmp_path / "half.safetensors")
    assert torch.equal(model.blocks[0].mlp.fc1.weight, whole["blocks.0.mlp.fc1.weight"])
    with pytest.raises(SystemExit, match="another command"):
        script.main(arguments(tmp_path, "half.safetensors", "--seed=1"))


@pytest.mark.parametrize("name", ["embedded-small", "vit_tiny_patch16_224"])
def test_a_described_backbone_is_built_again(name: str) -> None:
    model, _ = data.load_backbone(name, weights=None if name.startswith("embedded") else "random")
    description = json.loads(json.dumps(architecture_of(name, model)))
    again = build_backbone(description)
    again.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, description["img_size"], description["img_size"])
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))


def test_a_file_that_is_called_as_a_timm_model_is() -> None:
    model, _ = data.load_backbone("embedded-small")
    assert architecture_of("somewhere/vit_tiny_patch16_224.safetensors", model) == architecture_of("mine", model)
    assert architecture_of("vit_tiny_patch16_224.safetensors", model) == architecture_of("mine", model)


def test_what_no_description_fits_is_refused() -> None:
    model, _ = data.load_backbone("embedded-small")
    with pytest.raises(ValueError, match="not what its name"):
        architecture_of("vit_tiny_patch16_224", model)
    with pytest.raises(ValueError, match="describe"):
        architecture_of("mine", torch.nn.Linear(2, 2))
    shape = architecture_of("embedded-small", model)
    for wrong in ({**shape, "depth": True}, {**shape, "depth": 10**6}, {"timm": "os.system", "img_size": 3}, {}):
        with pytest.raises(ValueError, match="architecture"):
            build_backbone(wrong)
