"""Data sets: what `load` returns, what it leaves out, what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_kernels import data
from cl_kernels.data.preprocess import Preprocessing, convert_channels, cover, normalise
from cl_kernels.data.sets import stratified_split

pytest.importorskip("PIL", reason="picture files need Pillow")
from PIL import Image


def colour(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (9, 7)) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        colour(first + index, size).save(folder / f"{index}.png")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two classes, one with a name outside ASCII, already split."""
    for split, count in (("train", 4), ("test", 2)):
        fill(tmp_path / split / "кот", count)
        fill(tmp_path / split / "dog", count, first=50)
    return tmp_path


# --- digits --------------------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_images_split_by_seed() -> None:
    sklearn_data = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    first, again, other = data.load("digits"), data.load("digits"), data.load("digits", split_seed=1)
    assert len(first.train) + len(first.test) == 1797
    assert first.class_names == [str(digit) for digit in range(10)]
    pixels, label = first.train[0]
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 8, 8)
    assert isinstance(label, int)
    assert torch.equal(first.train.tensors(), again.train.tensors())
    assert not torch.equal(first.train.labels, other.train.labels)
    rows = {bytes(image.flatten().tolist()) for image in first.train.tensors()}
    assert sum(bytes(image.flatten().tolist()) in rows for image in first.test.tensors()) < 5  # no leak
    whole = torch.from_numpy(sklearn_data.load_digits().images)
    assert first.train.tensors().float().div(255 / 16).round().sum() + first.test.tensors().float().div(
        255 / 16
    ).round().sum() == pytest.approx(float(whole.sum()))
    held = torch.bincount(first.test.labels) / (torch.bincount(first.train.labels) + torch.bincount(first.test.labels))
    assert ((held - 0.25).abs() < 0.01).all()


def test_image_size_makes_every_item_that_size() -> None:
    assert data.load("digits", image_size=32).train.tensors().shape[1:] == (1, 32, 32)


# --- sets ----------------------------------------------------------------------------------------------------------


def test_subset_keeps_order_and_labels(zoo: Path) -> None:
    train = data.load(zoo).train
    chosen = train.subset([5, 0, 7])
    assert chosen.labels.tolist() == [int(train.labels[index]) for index in (5, 0, 7)]
    for item, index in zip(range(3), (5, 0, 7), strict=True):
        assert torch.equal(chosen[item][0], train[index][0])
    assert torch.equal(chosen.tensors(), train.tensors()[[5, 0, 7]])
    assert torch.equal(train.subset([5, 0, 7]).tensors(), chosen.tensors())  # now cut from decoded pixels
    assert set(train.of_classes([1]).labels.tolist()) == {1}
    assert len(train.subset([])) == 0
    assert train.subset([]).tensors().shape[0] == 0
    with pytest.raises(IndexError):
        chosen[3]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_split_is_a_partition_with_every_class_on_both_sides(share: float) -> None:
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] * 3)
    train, test = stratified_split(labels, share, seed=3)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(45))
    assert set(labels[train].tolist()) == set(labels[test].tolist()) == {0, 1, 2}


# --- folders -------------------------------------------------------------------------------------------------------


def test_split_folder_and_unicode_names(zoo: Path) -> None:
    loaded = data.load(zoo)
    assert loaded.class_names == ["dog", "кот"]
    assert loaded.skipped == 0
    assert (len(loaded.train), len(loaded.test)) == (8, 4)
    assert torch.equal(loaded.train.tensors()[0], torch.from_numpy(np.array(colour(50))).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_be_called_train(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "bus", 4)
    fill(tmp_path / name, 4, first=50)
    loaded = data.load(tmp_path)
    assert loaded.class_names == ["bus", name]
    assert (len(loaded.train), len(loaded.test)) == (6, 2)


def test_one_folder_is_split_by_seed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fill(tmp_path / name, 8, first=ord(name) * 10)
    parts = data.load(tmp_path, split_seed=4)
    assert (len(parts.train), len(parts.test)) == (18, 6)
    assert torch.bincount(parts.test.labels).tolist() == [2, 2, 2]
    again = data.load(tmp_path, split_seed=4, image_size=5)
    assert torch.equal(parts.test.labels, again.test.labels)
    assert again.test.tensors().shape == (6, 3, 5, 5)


def test_images_of_different_sizes_need_image_size(tmp_path: Path) -> None:
    fill(tmp_path / "a", 3, size=(9, 7))
    fill(tmp_path / "b", 3, size=(5, 30))
    with pytest.raises(ValueError, match="image_size"):
        data.load(tmp_path).train.tensors()
    assert data.load(tmp_path, image_size=6).train.tensors().shape == (4, 3, 6, 6)


def broken_files(folder: Path) -> int:
    """Files that no decoder can read, one of each kind; returns how many."""
    whole = io.BytesIO()
    colour(1, (64, 64)).save(whole, format="JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpeg").write_text("not a picture")
    png = io.BytesIO()
    colour(1, (64, 64)).save(png, format="PNG")
    (folder / "cut.png").write_bytes(png.getvalue()[:-4000])
    Image.fromarray(np.zeros((3, 3), dtype=np.float32)).save(folder / "float.tiff")
    return 5


@pytest.mark.parametrize("image_size", [None, 8])
def test_broken_pictures_are_counted_and_skipped(zoo: Path, image_size: int | None) -> None:
    count = broken_files(zoo / "train" / "dog")
    loaded = data.load(zoo, image_size=image_size)
    assert loaded.skipped == count
    assert len(loaded.train) == 8
    assert loaded.train.tensors().shape[0] == 8


def test_strict_names_the_broken_file(zoo: Path) -> None:
    (zoo / "test" / "dog" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"bad\.png"):
        data.load(zoo, strict=True)


def test_decompression_bomb_is_skipped_under_pillows_limit(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (300, 300)).save(zoo / "train" / "dog" / "warned.png")  # 90,000: between the limit and twice it
    Image.new("1", (900, 900)).save(zoo / "train" / "dog" / "refused.png")
    assert data.load(zoo).skipped == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert data.load(zoo).skipped == 2


def test_other_files_and_hidden_folders_are_ignored(zoo: Path) -> None:
    (zoo / "train" / "dog" / "notes.txt").write_text("x")
    (zoo / "train" / "dog" / "._0.png").write_bytes(b"x")
    (zoo / "train" / ".cache").mkdir()
    loaded = data.load(zoo)
    assert loaded.skipped == 0
    assert len(loaded.train) == 8


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("L", (77, 77, 77)),
        ("RGB", (200, 40, 90)),
        ("CMYK", (200, 40, 90)),
        ("P", (204, 51, 102)),
        ("1", (255, 255, 255)),
    ],
)
def test_picture_modes_become_rgb(tmp_path: Path, mode: str, wanted: tuple[int, int, int]) -> None:
    fill(tmp_path / "a", 2)
    picture = Image.new("RGB", (4, 6), wanted).convert(mode)  # 204, 51, 102 is in the web palette
    picture.save(tmp_path / "a" / ("z.tiff" if mode == "CMYK" else "z.png"))
    fill(tmp_path / "b", 3)
    loaded = data.load(tmp_path)
    everything = [*loaded.train.subset(range(len(loaded.train))), *loaded.test]
    flat = [image for image, _ in everything if image.shape == (3, 6, 4)]
    assert len(flat) == 1
    assert (flat[0].float() - torch.tensor(wanted).view(3, 1, 1)).abs().max() <= 1


def test_deep_greys_transparency_and_orientation(tmp_path: Path) -> None:
    from cl_kernels.data.pictures import read_picture

    deep = np.array([[0, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[:, 0].tolist() == [[0, 128, 255]] * 3
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    turned = Image.new("RGB", (8, 4), (9, 9, 9))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held sideways
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (3, 8, 4)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert read_picture(tmp_path / "dot.png").flatten().tolist() == [1, 2, 3]


def test_folders_that_cannot_serve(tmp_path: Path, zoo: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least two class folders, found 0"):
        data.load(tmp_path / "empty")
    fill(tmp_path / "one" / "only", 3)
    with pytest.raises(ValueError, match=r"found 1: only"):
        data.load(tmp_path / "one")
    fill(tmp_path / "thin" / "many", 3)
    fill(tmp_path / "thin" / "single", 1)
    with pytest.raises(ValueError, match=r"fewer than 2 readable pictures: single \(1\)"):
        data.load(tmp_path / "thin")
    (zoo / "train" / "void").mkdir()
    with pytest.raises(ValueError, match=r"void \(0\)"):
        data.load(zoo)


def test_a_class_only_in_the_test_folder_is_refused(zoo: Path) -> None:
    fill(zoo / "test" / "cow", 1)
    with pytest.raises(ValueError, match="without training pictures: cow"):
        data.load(zoo)


def test_many_classes(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"c{index:05d}").mkdir()
        for copy in range(2):
            Image.new("L", (1, 1), index % 256).save(tmp_path / f"c{index:05d}" / f"{copy}.png")
    loaded = data.load(tmp_path, image_size=2)
    assert len(loaded.class_names) == 300
    assert len(loaded.train) == len(loaded.test) == 300
    assert torch.equal(loaded.test.labels, torch.arange(300))


# --- names ---------------------------------------------------------------------------------------------------------


def test_unknown_names_offer_the_nearest(monkeypatch: pytest.MonkeyPatch, zoo: Path) -> None:
    with pytest.raises(ValueError, match="did you mean digits"):
        data.load("digit")
    monkeypatch.setenv("CL_KERNELS_DATA", str(zoo.parent))
    assert zoo.name in data.names()
    assert data.load(zoo.name).class_names == ["dog", "кот"]
    monkeypatch.delenv("CL_KERNELS_DATA")
    assert data.names() == ["digits"]


@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_image_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="image_size"):
        data.load("digits", image_size=size)


# --- preprocessing -------------------------------------------------------------------------------------------------


def test_cover_scales_the_short_side_and_cuts_the_centre() -> None:
    images = torch.zeros(2, 3, 40, 100, dtype=torch.uint8)
    images[..., 30:70] = 200
    out = cover(images, 20)
    assert out.dtype == torch.uint8
    assert out.shape == (2, 3, 20, 20)
    assert (out[..., 2:-2] == 200).all()
    assert cover(images[..., :40], 40).data_ptr() == images.data_ptr()  # nothing to do
    flat = cover(torch.full((1, 1, 33, 57), 91, dtype=torch.uint8), 16)
    assert (flat == 91).all()
    assert cover(torch.rand(1, 1, 1, 500), 8).shape == (1, 1, 8, 8)


def test_shrinking_is_antialiased() -> None:
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 1
    assert (cover(stripes, 8) - 0.5).abs().max() < 0.05


def test_channels() -> None:
    grey = torch.rand(2, 1, 3, 3)
    assert torch.equal(convert_channels(grey, 3), grey.expand(-1, 3, -1, -1))
    assert torch.allclose(convert_channels(grey.expand(-1, 3, -1, -1), 1), grey, atol=1e-6)
    with pytest.raises(ValueError, match="4 channels"):
        convert_channels(torch.zeros(1, 4, 2, 2), 3)


def test_preprocessing_matches_its_formula() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    made = Preprocessing(8, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), 3)(images)
    wanted = torch.cat([(images / 255 - m) / s for m, s in ((0.1, 0.5), (0.2, 1.0), (0.3, 2.0))], dim=1)
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(normalise(images / 255, (0.5,), (0.25,)), (images / 255 - 0.5) / 0.25)
    one_by_one = torch.cat([Preprocessing(16, (0.5,), (0.5,), 1)(image[None]) for image in images])
    torch.testing.assert_close(Preprocessing(16, (0.5,), (0.5,), 1)(images), one_by_one)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"interpolation": "nearest"}, "interpolation"),
    ],
)
def test_preprocessing_refuses(options: dict[str, object], word: str) -> None:
    arguments = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, **options}
    with pytest.raises(ValueError, match=word):
        Preprocessing(**arguments)  # type: ignore[arg-type]  # wrong values on purpose


def test_preprocessing_refuses_floats() -> None:
    with pytest.raises(ValueError, match="uint8"):
        Preprocessing(8, (0.5,), (0.5,), 1)(torch.zeros(1, 1, 8, 8))
