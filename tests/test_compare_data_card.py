"""The data card: what the user's images are, what was left out, and what makes their accuracies wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cl_kernels import data
from cl_kernels.compare.data_card import data_card
from cl_kernels.data import ImageData, ImageSet
from cl_kernels.data.pictures import BrokenImageError
from cl_kernels.data.sets import TensorImages

pytest.importorskip("PIL", reason="picture files need Pillow")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
from PIL import Image


def save(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (12, 9)) -> None:
    """`count` pictures of their own noise, `size` = (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def made(train: torch.Tensor, labels: list[int], test: torch.Tensor, held: list[int], names: list[str]) -> ImageData:
    return ImageData(
        "made",
        ImageSet(TensorImages(train), torch.tensor(labels)),
        ImageSet(TensorImages(test), torch.tensor(held)),
        names,
    )


def noise(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 6, 6), generator=generator).to(torch.uint8)


def test_digits_say_how_they_were_split() -> None:
    card = data_card(data.load("digits", split_seed=3, image_size=32))
    assert (card["train"]["n"], card["test"]["n"], card["classes"]) == (1347, 450, 10)
    assert sum(card["train"]["counts"]) == 1347
    assert card["train"]["sizes"] == {
        "measured": 500, "distinct": 1, "commonest": [8, 8], "smallest": [8, 8], "largest": [8, 8],
    }  # fmt: skip
    assert card["imbalance"] == pytest.approx(137 / 130, abs=0.03)
    assert "held out of the training images by seed 3: the data has no test split" in card["test_from"]
    assert card["label_type"]["guess"] == "not guessed"
    assert card["warnings"] == []


def test_a_folder_with_broken_pictures_copies_and_a_leak(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat", 6)
    save(tmp_path / "train" / "dog", 5, first=20, size=(30, 40))
    save(tmp_path / "test" / "cat", 3, first=50)
    save(tmp_path / "test" / "dog", 3, first=60)
    (tmp_path / "train" / "cat" / "torn.png").write_bytes((tmp_path / "train" / "cat" / "0.png").read_bytes()[:60])
    for source, copy in (
        ("train/cat/1", "train/cat/copy"),
        ("train/cat/2", "train/dog/same"),
        ("train/cat/3", "test/cat/leak"),
    ):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{source}.png").read_bytes())
    for size in (None, 8):  # as stored, and scaled
        card = data_card(data.load(tmp_path, image_size=size))
        same = card["duplicates"]
        assert (same["inside_train"], same["inside_test"], same["across"], same["two_labels"]) == (2, 0, 1, 1)
        assert card["skipped"] == 1
        assert card["train"]["counts"] == [7, 6]
        assert card["train"]["sizes"]["smallest"] == [9, 12]
        assert card["train"]["sizes"]["largest"] == [40, 30]
        assert card["test_from"] == "the folder test that came with the data"
        text = "\n".join(card["warnings"])
        assert "1 of 7 test images also occur in the training set" in text
        assert "1 images occur under two labels" in text
        assert "1 broken images were left out" in text
        assert "only 7 test images" in text
    leak = card["duplicates"]["across_examples"][0]
    loaded = data.load(tmp_path)
    assert torch.equal(loaded.train[leak["train"]][0], loaded.test[leak["test"]][0])
    with pytest.raises(BrokenImageError, match=r"torn\.png"):
        data.load(tmp_path, strict=True)


def test_one_changed_pixel_is_no_copy() -> None:
    images = noise(8)
    near = images[:2].clone()
    near[:, 0, 0, 0] ^= 1
    card = data_card(made(images, [0, 1] * 4, near, [0, 1], ["a", "b"]))
    assert card["duplicates"]["across"] == 0
    card = data_card(made(images, [0, 1] * 4, images[:2], [0, 1], ["a", "b"]))
    assert card["duplicates"]["across"] == 2


def test_test_labels_can_be_left_unread() -> None:
    whole = data.load("digits", image_size=8)
    whole.test.labels = torch.full_like(whole.test.labels, -1)  # bincount would refuse them
    card = data_card(whole, read_test_labels=False)
    assert (card["test"]["n"], card["test"]["counts"]) == (450, None)
    with pytest.raises(RuntimeError):
        data_card(whole)


def test_imbalance_and_missing_classes_are_told() -> None:
    images = noise(140)
    names = ["many", "few", "absent"]
    card = data_card(made(images[:60], [0] * 57 + [1] * 3, images[60:], [0] * 80, names))
    assert card["imbalance"] == pytest.approx(19)
    text = "\n".join(card["warnings"])
    assert "the largest class (many, 57) has 19 times the training images of the smallest (few, 3)" in text
    assert "1 classes have no training images: absent" in text
    assert "2 classes have no test images: few, absent" in text


def test_guesses_only_what_the_names_say() -> None:
    images = noise(12)

    def guess(names: list[str]) -> str:
        labels = [index % len(names) for index in range(12)]
        found: str = data_card(made(images, labels, noise(12, 1), labels, names))["label_type"]["guess"]
        return found

    assert guess(["facing left", "facing right", "facing_up_north"]) == "structured"
    assert guess(["0-10", "10-20", "20-30"]) == "structured"
    assert guess(["30°", "60°", "90°"]) == "structured"
    assert guess([f"{kind}_Warbler" for kind in ("Hooded", "Yellow", "Pine", "Palm", "Cape May")]) == "fine-grained"
    assert guess(["airplane", "bird", "cat", "deer", "top"]) == "not guessed"
    assert guess([str(n) for n in range(10)]) == "not guessed"


def test_data_that_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    images = noise(4)
    with pytest.raises(ValueError, match="the test set has no images"):
        data_card(made(images, [0, 1, 0, 1], images[:0], [], ["a", "b"]))
    with pytest.raises(ValueError, match="the training set has no images"):
        data_card(made(images[:0], [], images, [0, 1, 0, 1], ["a", "b"]))
    with pytest.raises(ValueError, match="training images of at least two classes, has b"):
        data_card(made(images, [1] * 4, images, [1] * 4, ["a", "b"]))
    with pytest.raises(ValueError, match="at least two class folders, found 0"):
        data.load(tmp_path)
    save(tmp_path / "only", 3)
    with pytest.raises(ValueError, match="at least two class folders, found 1: only"):
        data.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"fewer than 2 readable pictures: empty \(0\)"):
        data.load(tmp_path)


def test_real_photographs(data_dir: Path) -> None:
    loaded = data.load(data_dir / "grocery64.npz")
    part = ImageData("grocery", loaded.train.subset(range(300)), loaded.test.subset(range(200)), loaded.class_names)
    card = data_card(part)
    assert card["train"]["channels"] == 3
    assert card["train"]["sizes"]["commonest"] == [64, 64]
    assert any("classes have no training images" in warning for warning in card["warnings"])
    assert loaded.test_from == "the test split that came with the data"
