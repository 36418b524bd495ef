"""examples/pretrain_backbone.py on photographs: seeded, resumable, and read by `load_backbone`."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cl_kernels import data

pytest.importorskip("timm", reason="the example trains a timm model")
pytest.importorskip("PIL", reason="picture files need Pillow")
from PIL import Image

CLASSES = 3
SMALL = ["--size=16", "--width=16", "--heads=2", "--depth=1", "--batch=16", "--epochs=4", "--lr=1e-2", "--ema=0.9"]
RICH = ["--patch=4", "--crop=0.4", "--operations=3", "--mixup=0.4", "--cutmix=0.4", "--drop-path=0.1"]


def shard(path: Path) -> Path:
    """Photographs whose class is their colour."""
    made: dict[str, object] = {"class_names": np.array([f"class {index}" for index in range(CLASSES)])}
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 30)):
        labels = np.arange(count) % CLASSES
        pixels = rng.integers(0, 120, (count, 16, 16, 3))
        pixels[np.arange(count), :, :, labels] += 120
        files = []
        for picture in pixels.astype(np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="JPEG")
            files.append(buffer.getvalue())
        made[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        made[f"{split}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int64)
        made[f"{split}_labels"] = labels.astype(np.int64)
    np.savez(path, **made)  # type: ignore[arg-type]
    return path


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    if spec is None or spec.loader is None:
        pytest.fail("the example is not where it should be")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def probe() -> ModuleType:
    pytest.importorskip("sklearn", reason="the probe is scikit-learn's")
    return example("probe_backbone")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it sets torch's threads, which are put back."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = example("pretrain_backbone")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def augment(script: ModuleType) -> ModuleType:
    return sys.modules["pretraining.photo_augment"]


@pytest.mark.parametrize("recipe", [[], RICH, ["--precision=bf16"]], ids=["light", "rich", "bf16"])
def test_a_cut_run_ends_with_the_same_weights(
    recipe: list[str], tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", str(shard(tmp_path / "photos.npz")), "--device=cpu", *SMALL, *recipe]
    script.main([*command, "--out", str(tmp_path / "whole.safetensors")])
    kept, cut = script.photos.PhotoTask.epoch, []

    def epoch(task: object, run: object) -> float:
        cut.append(1)
        if len(cut) == 3:
            raise KeyboardInterrupt
        return float(kept(task, run))

    monkeypatch.setattr(script.photos.PhotoTask, "epoch", epoch)
    half = [*command, "--out", str(tmp_path / "half.safetensors")]
    with pytest.raises(KeyboardInterrupt):
        script.main(half)
    assert not (tmp_path / "half.safetensors").exists()
    script.main(half)
    assert len(cut) == 5, "epochs that were done have been done again"
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(SystemExit, match="another command"):
        script.main([*half, "--label-smoothing=0.2"])


def test_photographs_are_learned_and_the_file_is_a_backbone(tmp_path: Path, script: ModuleType) -> None:
    out = tmp_path / "vit.safetensors"
    script.main(["--data", str(shard(tmp_path / "photos.npz")), "--device=cpu", "--out", str(out), *SMALL])
    with safe_open(out, framework="pt") as file:
        meta = file.metadata()
    assert float(meta["test_accuracy"]) > 0.6  # chance is a third
    assert json.loads(meta["command"])["profile"] == "cpu"
    stored = load_file(out)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert not [name for name in stored if name.startswith("head.")]
    model, _ = data.load_backbone(out)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, 16)


def test_the_profile_sets_the_defaults_and_an_option_wins(tmp_path: Path, script: ModuleType) -> None:
    command = ["--data", str(shard(tmp_path / "photos.npz")), "--out", "x.safetensors", "--device=cpu"]
    cpu, gpu = (script.parse([*command, f"--profile={name}", "--epochs=7"]) for name in ("cpu", "gpu"))
    assert (cpu.patch, cpu.operations, cpu.epochs, cpu.precision) == (8, 0, 7, "float32")
    assert (gpu.patch, gpu.operations, gpu.epochs, gpu.width) == (4, 2, 7, 192)
    assert script.parse([*command[:-1], "--device=cuda"]).precision == "bf16"
    assert script.parse(command).profile == "cpu"


def photographs(n: int = 64) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_shifts_move_whole_pixels(augment: ModuleType) -> None:
    images = photographs()
    moved = augment.flip_and_shift(images, 2, torch.Generator().manual_seed(0))
    inside = moved[:, :, 2:-2, 2:-2]  # nothing from outside reaches these
    found = torch.zeros(len(images), dtype=torch.int64)
    for source in (images, images.flip(3)):
        for top in range(5):
            for left in range(5):
                window = source[:, :, top : top + 12, left : left + 12]
                found += (window == inside).flatten(1).all(1)
    assert bool((found == 1).all())
    still = augment.flip_and_shift(images, 0, torch.Generator().manual_seed(0))
    mirrored = (still != images).flatten(1).any(1)
    assert torch.equal(still[mirrored], images.flip(3)[mirrored])
    assert 0.25 < float(mirrored.float().mean()) < 0.75


def test_crops_and_colours_stay_in_range_and_are_drawn_again(augment: ModuleType) -> None:
    images = photographs()
    for change in (
        lambda g: augment.crop_and_turn(images, 0.3, 0.5, 2, g),
        lambda g: augment.colour(images, 0.5, 3, g),
    ):
        first, again, other = (change(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == images.shape
        assert 0 <= float(first.min()) <= float(first.max()) <= 1 + 1e-6
    whole = augment.crop_and_turn(images, 1.0, 0.0, 0, torch.Generator().manual_seed(0))
    assert whole.std() > 0.5 * images.std()


def test_colour_changes_the_share_of_images_that_it_says(augment: ModuleType) -> None:
    images = photographs(2000)
    changed = augment.colour(images, 0.5, 2, torch.Generator().manual_seed(0)) != images
    expected = 1 - (1 - 2 / 12) ** 7
    assert float(changed.flatten(1).any(1).float().mean()) == pytest.approx(expected, abs=0.05)


def test_a_cut_box_is_the_share_that_the_labels_get(augment: ModuleType) -> None:
    zeros, ones = torch.zeros(4, 3, 32, 32), torch.ones(4, 3, 32, 32)
    host = random.Random(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        for _ in range(20):
            mixed, kept = augment.cut_in(zeros, ones, share, host)
            assert float(mixed.mean()) == pytest.approx(1 - kept, abs=1e-6)
            assert kept >= share - 0.05
    assert augment.cut_in(zeros, ones, 1.0, host)[1] == 1.0
    assert float(zeros.max()) == 0


CARD = ROOT / "benchmarks" / "backbones"


@pytest.mark.parametrize("path", sorted(CARD.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_trained_backbones_are_what_their_card_says(path: Path) -> None:
    """The file is the one of the card, loads, and tells classes that it has never seen apart."""
    card = (CARD / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    with safe_open(path, framework="pt") as file:
        accuracy = float(file.metadata()["test_accuracy"])
    assert f"{100 * accuracy:.1f} %" in card
    model, preprocessing = data.load_backbone(path)
    assert preprocessing.size == 32
    with torch.no_grad():
        assert bool(model(torch.rand(2, 3, 32, 32)).isfinite().all())


def test_a_trained_backbone_knows_photographs(data_dir: Path, probe: ModuleType) -> None:
    if not (CARD / "vit_tin32_small.safetensors").is_file():
        pytest.skip("the trained backbones are in the repository alone, not in the source archive")
    backbone = data.load_backbone(CARD / "vit_tin32_small.safetensors")
    loaded = data.load(data_dir / "cifar10_1000x200.npz")
    train = loaded.train.subset(probe.first_of_each(loaded.train.labels, 20))
    test = loaded.test.subset(probe.first_of_each(loaded.test.labels, 30))
    found, held = probe.features(backbone, train), probe.features(backbone, test)
    right = probe.class_means(found, train.labels, held) == test.labels
    assert float(right.float().mean()) > 0.3  # chance 0.1; by logistic regression below too
    assert float((probe.logistic(found, train.labels, held, 0.01) == test.labels).float().mean()) > 0.3
