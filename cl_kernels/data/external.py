"""Data sets of torchvision and Hugging Face that lie in local folders; nothing is downloaded."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_kernels.data.pictures import BrokenImageError, from_pillow
from cl_kernels.data.sets import ImageData, ImageSet, held_out, stratified_split

__all__ = ["load_hugging_face", "load_torchvision"]

TEST_SHARE = 0.25
_TEST_SPLITS = ("test", "validation", "valid", "val")


class _Pictures(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class PillowImages:
    """Images of another library's data set; ``pick`` takes the Pillow image out of an item."""

    def __init__(self, data: _Pictures, pick: Callable[[Any], Any], name: str) -> None:
        self.data, self.pick, self.name = data, pick, name

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Tensor:
        try:
            return from_pillow(self.pick(self.data[index]))
        except (OSError, SyntaxError, ValueError) as error:
            raise BrokenImageError(f"{self.name}, image {index}: not a readable picture ({error})") from error


def _usable(images: PillowImages, strict: bool) -> tuple[Tensor, int]:
    """Rows that decode, and how many do not: one pass, as these libraries decode only when asked."""
    rows = []
    for index in range(len(images)):
        try:
            images.read(index)
        except BrokenImageError:
            if strict:
                raise
            continue
        rows.append(index)
    return torch.tensor(rows, dtype=torch.int64), len(images) - len(rows)


def _import_torchvision() -> ModuleType:
    from cl_kernels._timm import import_timm

    try:
        import_timm()  # knows how to load torchvision beside a CPU torch
        import torchvision.datasets as datasets
    except ImportError as error:
        raise ImportError(f"torchvision is needed for torchvision:CLASS:ROOT and does not import ({error})") from error
    module: ModuleType = datasets
    return module


def load_torchvision(text: str, *, strict: bool = False, image_size: int | None = None) -> ImageData:
    """``torchvision:CLASS:ROOT``, such as ``torchvision:CIFAR100:/data/cifar``: a data set that lies in ROOT already.

    The class must take ``train=`` or ``split=``; ``download`` stays off. Raises ``ValueError`` for an unknown class
    (nearest names offered) and ``FileNotFoundError`` where the files are not in ROOT.
    """
    parts = text.split(":", 2)
    if len(parts) != 3 or not parts[1] or not parts[2]:
        raise ValueError(f"data must read torchvision:CLASS:ROOT, got {text!r}")
    _, name, root = parts
    datasets = _import_torchvision()
    known = [entry for entry in datasets.__all__ if inspect.isclass(getattr(datasets, entry))]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(f"torchvision has no data set {name!r}; nearest: {', '.join(near) or 'none'}")
    if not Path(root).expanduser().is_dir():
        raise FileNotFoundError(f"data {text!r}: there is no folder {root}")
    maker = getattr(datasets, name)
    sets, skipped = [], 0
    for train in (True, False):
        data = _make_torchvision(maker, name, Path(root).expanduser(), train)
        images = PillowImages(data, lambda item: item[0], f"{name} {'train' if train else 'test'}")
        rows, broken = _usable(images, strict)
        skipped += broken
        labels = torch.as_tensor(_torchvision_labels(data))
        sets.append((ImageSet(images, labels[rows], rows, image_size=image_size), data))
    names = getattr(sets[0][1], "classes", None) or _numbered(sets[0][0].labels)
    return ImageData(name, sets[0][0], sets[1][0], _checked(names, text), skipped)


def _make_torchvision(maker: Callable[..., Any], name: str, root: Path, train: bool) -> Any:
    arguments = inspect.signature(maker).parameters
    options: dict[str, Any] = {"download": False} if "download" in arguments else {}
    if "train" in arguments:
        options["train"] = train
    elif "split" in arguments:
        options["split"] = "train" if train else "test"
    else:
        raise ValueError(f"torchvision's {name} takes neither train= nor split=; use its image folder instead")
    try:
        return maker(root=os.fspath(root), **options)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(f"torchvision's {name} is not in {root} ({error}); nothing is downloaded") from error


def _torchvision_labels(data: Any) -> Sequence[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(data, attribute):
            return [int(label) for label in getattr(data, attribute)]
    return [int(data[index][1]) for index in range(len(data))]


def load_hugging_face(
    text: str, *, split_seed: int = 0, strict: bool = False, image_size: int | None = None
) -> ImageData:
    """``hf:PATH``: a folder written by ``save_to_disk``, or one that ``datasets.load_dataset`` reads.

    The image and label columns are found by their feature types. Without a test split the training split is divided
    75:25 by ``split_seed``. Raises ``FileNotFoundError`` where PATH is no local folder (names on the hub are refused).
    """
    path = Path(text.removeprefix("hf:")).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"data {text!r}: there is no folder {path}; data sets on the hub are not downloaded")
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf:PATH needs the datasets package: pip install datasets") from error
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    whole = datasets.load_from_disk(os.fspath(path)) if saved else datasets.load_dataset(os.fspath(path))
    splits = dict(whole) if isinstance(whole, dict) else {"train": whole}
    train = splits.get("train", next(iter(splits.values())))
    image, label = _columns(train, text)
    names = getattr(train.features[label], "names", None) or _numbered(torch.as_tensor(train[label]))
    held = next((splits[name] for name in _TEST_SPLITS if name in splits and splits[name] is not train), None)
    sets: list[ImageSet] = []
    skipped = 0
    for part in (train, held):
        if part is None:
            continue
        images = PillowImages(part, lambda item: item[image], f"{path} {len(sets)}")
        rows, broken = _usable(images, strict)
        skipped += broken
        sets.append(ImageSet(images, torch.as_tensor(part[label])[rows], rows, image_size=image_size))
    came = ImageData.test_from
    if len(sets) == 1:
        came = held_out(TEST_SHARE, split_seed)
        kept, test = stratified_split(sets[0].labels, TEST_SHARE, split_seed)
        sets = [sets[0].subset(kept), sets[0].subset(test)]
    return ImageData(path.name, sets[0], sets[1], _checked(names, text), skipped, came)


def _columns(data: Any, text: str) -> tuple[str, str]:
    """The image column and the label column (``ClassLabel``, else the first integer column)."""
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels += [name for name, feature in data.features.items() if str(getattr(feature, "dtype", "")).startswith("int")]
    if not images or not labels:
        raise ValueError(f"data {text!r} needs an image and a label column; found {kinds}")
    return images[0], labels[0]


def _numbered(labels: Tensor) -> list[str]:
    return [str(number) for number in range(int(labels.max()) + 1)] if labels.numel() else []


def _checked(names: Sequence[str], text: str) -> list[str]:
    if len(names) < 2:
        raise ValueError(f"data {text!r} must hold at least two classes, found {len(names)}")
    return [str(name) for name in names]
