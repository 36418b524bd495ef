"""The .npz shards, and data sets of torchvision and Hugging Face in local folders."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cl_kernels import data
from cl_kernels.data import external

pytest.importorskip("PIL", reason="picture files need Pillow")
from PIL import Image


def jpeg(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def fields(train: list[bytes], test: list[bytes], classes: int = 3) -> dict[str, Any]:
    made: dict[str, Any] = {"class_names": np.array([f"class {index}" for index in range(classes)])}
    for split, files in (("train", train), ("test", test)):
        made[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        made[f"{split}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int64)
        made[f"{split}_labels"] = (np.arange(len(files)) % classes).astype(np.int64)
    return made


def write(path: Path, made: dict[str, Any]) -> Path:
    np.savez(path, **made)
    return path


def test_jpeg_shard_decodes_what_pillow_decodes(tmp_path: Path) -> None:
    files = [jpeg(index) for index in range(7)]
    loaded = data.load(write(tmp_path / "s.npz", fields(files, files[:3])))
    assert (loaded.name, len(loaded.train), len(loaded.test), loaded.skipped) == ("s", 7, 3, 0)
    assert loaded.class_names == ["class 0", "class 1", "class 2"]
    for index, raw in enumerate(files):
        wanted = torch.from_numpy(np.array(Image.open(io.BytesIO(raw)))).permute(2, 0, 1)
        assert torch.equal(loaded.train[index][0], wanted)
        assert loaded.train[index][1] == index % 3


def test_jpeg_shard_decodes_only_the_classes_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_kernels.data import shards

    decoded = []
    whole = shards.read_picture
    monkeypatch.setattr(shards, "read_picture", lambda raw, **how: decoded.append(how["label"]) or whole(raw, **how))
    loaded = data.load(write(tmp_path / "s.npz", fields([jpeg(index) for index in range(9)], [jpeg(0)])))
    part = loaded.train.of_classes([1])
    assert decoded == []
    assert part.tensors().shape == (3, 3, 16, 16)
    part.tensors()
    assert len(decoded) == 3


def test_cut_jpegs_in_a_shard_are_counted(tmp_path: Path) -> None:
    files = [jpeg(index) for index in range(6)]
    files[2], files[5] = files[2][:50], b""
    path = write(tmp_path / "s.npz", fields(files, files[:2]))
    loaded = data.load(path)
    assert loaded.skipped == 2
    assert loaded.train.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"s\.npz train, image 2"):
        data.load(path, strict=True)


def test_a_jpeg_damaged_inside_raises_when_read(tmp_path: Path) -> None:
    files = [jpeg(index) for index in range(3)]
    files[1] = files[1][:2] + b"\x00" * (len(files[1]) - 4) + files[1][-2:]
    loaded = data.load(write(tmp_path / "s.npz", fields(files, files[:1])))
    with pytest.raises(ValueError, match="image 1"):
        loaded.train.tensors()


def test_ink_shard(tmp_path: Path) -> None:
    ink = np.random.default_rng(0).integers(0, 2, (6, 5, 3)).astype(np.uint8)
    made = {
        "ink_bits": np.packbits(ink.reshape(6, -1), axis=1),
        "shape": np.array([5, 3]),
        "labels": np.array([0, 0, 1, 1, 0, 1]),
        "is_test": np.array([False, True, False, True, False, False]),
        "class_names": np.array(["Greek/α", "Greek/β"]),
    }
    loaded = data.load(write(tmp_path / "ink.npz", made))
    assert loaded.class_names == ["Greek/α", "Greek/β"]
    assert torch.equal(loaded.train.tensors(), torch.from_numpy(255 * (1 - ink[[0, 2, 4, 5]]))[:, None])
    assert loaded.test.labels.tolist() == [0, 1]
    for field, value in {
        "shape": np.array([50, 3]),
        "labels": np.array([0, 0, 1, 1, 0, 2]),
        "is_test": np.zeros(5, bool),
    }.items():
        with pytest.raises(ValueError, match=r"bad\.npz"):
            data.load(write(tmp_path / "bad.npz", made | {field: value}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"class_names": np.array(["a"])}, "at least two classes"),
        ({"train_labels": np.array([0, 1, 9])}, "0..2"),
        ({"train_labels": np.array([0, 1])}, "3 images"),
        ({"train_offsets": np.array([0, 9, 5, 10**9])}, "train_offsets"),
        ({"train_offsets": np.array([], dtype=np.int64)}, "train_offsets"),
        ({"train_jpeg": np.zeros(5)}, "dtype"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    files = [jpeg(index) for index in range(3)]
    path = write(tmp_path / "s.npz", fields(files, files) | change)
    with pytest.raises(ValueError, match=word) as caught:
        data.load(path)
    assert "s.npz" in str(caught.value)


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    for content in (b"", b"PK\x03\x04 cut", b"anything"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"s\.npz is not a readable"):
            data.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="no class_names"):
        data.load(path)
    np.savez(path, class_names=np.array(["a", object()], dtype=object))  # a pickle inside
    with pytest.raises(ValueError, match=r"s\.npz is not a readable"):
        data.load(path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"x\.csv"):
        data.load(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("name", "classes", "train", "test", "shape"),
    [
        ("tin32_novel100", 100, 30_000, 5_000, (3, 32, 32)),
        ("cifar10_1000x200", 10, 10_000, 2_000, (3, 32, 32)),
        ("omniglot_small12", 242, 3_630, 1_210, (1, 105, 105)),
        ("grocery64", 81, 2_640, 2_485, (3, 64, 64)),
    ],
)
def test_real_shards(data_dir: Path, name: str, classes: int, train: int, test: int, shape: tuple[int, ...]) -> None:
    path = data_dir / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    loaded = data.load(path)
    assert (len(loaded.class_names), len(loaded.train), len(loaded.test)) == (classes, train, test)
    assert loaded.skipped == 0
    pixels = loaded.train.of_classes([0, classes - 1]).tensors()
    assert pixels.shape[1:] == shape
    assert pixels.float().std() > 10


# --- other libraries' data sets ------------------------------------------------------------------------------------


class Fake:
    """Stands for a torchvision data set that is on disk."""

    classes = ("x", "y")

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        if download or not (Path(root) / "present").exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.targets = [0, 1, 0] if train else [1]
        self.broken = train

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.broken and index == 1:
            raise OSError("image file is truncated")
        return Image.new("L", (4, 4), 100 + index), self.targets[index]


def test_torchvision_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Fake=Fake, __all__=["Fake"])
    monkeypatch.setattr(external, "_import_torchvision", lambda: module)
    text = f"torchvision:Fake:{tmp_path}"
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        data.load(text)
    (tmp_path / "present").touch()
    loaded = data.load(text)
    assert loaded.skipped == 1
    assert loaded.class_names == ["x", "y"]
    assert loaded.train.labels.tolist() == [0, 0]
    assert loaded.train.tensors()[:, :, 0, 0].tolist() == [[100] * 3, [102] * 3]
    with pytest.raises(ValueError, match="truncated"):
        data.load(text, strict=True)
    with pytest.raises(ValueError, match="nearest: Fake"):
        data.load(f"torchvision:Fakes:{tmp_path}")
    with pytest.raises(ValueError, match="torchvision:CLASS:ROOT"):
        data.load("torchvision:Fake")
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load(f"torchvision:Fake:{tmp_path / 'gone'}")


def test_real_torchvision_names_the_nearest(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with pytest.raises(ValueError, match="nearest: CIFAR100"):
        data.load(f"torchvision:CIFAR00:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="CIFAR100 is not in"):
        data.load(f"torchvision:CIFAR100:{tmp_path}")
    from torchvision.datasets import FakeData  # takes neither train= nor split=

    assert FakeData is not None
    with pytest.raises(ValueError, match="neither train= nor split="):
        data.load(f"torchvision:FakeData:{tmp_path}")


class Table:
    """Stands for a split of the datasets package: columns by name, rows by number."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels
        self.features = {
            "id": SimpleNamespace(dtype="string"),
            "photo": type("Image", (), {})(),
            "kind": type("ClassLabel", (), {"names": ["p", "q"], "dtype": "int64"})(),
        }

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Any) -> Any:
        if key == "kind":
            return self.labels
        return {"photo": Image.new("RGB", (3, 3), (key, key, key)), "kind": self.labels[key]}


def test_hugging_face_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = ModuleType("datasets")
    module.load_from_disk = lambda path: calls.append("disk") or {"train": Table([0, 1, 0]), "test": Table([1])}  # type: ignore[attr-defined]  # a stand-in module
    module.load_dataset = lambda path: calls.append("files") or {"train": Table([0, 1] * 8)}  # type: ignore[attr-defined]  # a stand-in module
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(FileNotFoundError, match="not downloaded"):
        data.load("hf:someone/something")
    loaded = data.load(f"hf:{tmp_path}", split_seed=1)
    assert (len(loaded.train), len(loaded.test)) == (12, 4)
    assert loaded.class_names == ["p", "q"]
    (tmp_path / "dataset_dict.json").touch()
    loaded = data.load(f"hf:{tmp_path}")
    assert loaded.train.labels.tolist() == [0, 1, 0]
    assert loaded.train[2][0][0, 0, 0] == 2
    assert calls == ["files", "disk"]
