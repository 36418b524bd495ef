"""Folders of pictures: one subfolder a class, split already or by seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_kernels.data.pictures import BrokenImageError, picture_size, read_picture
from cl_kernels.data.preprocess import cover
from cl_kernels.data.sets import MAX_BYTES, ImageData, Images, ImageSet, held_out, stratified_split

__all__ = ["load_folder"]

ENDINGS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"])
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
TEST_SHARE = 0.25


class FileImages:
    """Pictures decoded from their files at every read, or held in ``kept`` [N, C, H, W] at their final size."""

    def __init__(self, paths: list[Path], image_size: int | None, kept: Tensor | None = None) -> None:
        self.paths = paths
        self.image_size = image_size
        self.kept = kept

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, index: int) -> tuple[int, int]:
        return picture_size(self.paths[index])

    def read(self, index: int) -> Tensor:
        if self.kept is not None:
            return self.kept[index]
        return read_picture(self.paths[index], at_least=self.image_size)


@dataclass(frozen=True)
class _Part:
    """The readable pictures under one folder of class folders."""

    images: Images
    labels: Tensor
    skipped: list[str]


def load_folder(root: Path, *, split_seed: int = 0, strict: bool = False, image_size: int | None = None) -> ImageData:
    """Read ``root/train/CLASS/*`` with ``root/test|val/CLASS/*``, or ``root/CLASS/*`` split 75:25 by ``split_seed``.

    Folders called train and test are splits where they hold folders themselves, else classes like all others.
    Every picture is decoded once here, so that broken ones are known before training starts; with ``image_size`` they
    stay in memory at that size (up to 4 GiB), else they are decoded again when read. Hidden files and files without a
    picture's ending are ignored. Raises ``ValueError`` for a folder without at least two classes, for a class without
    pictures or without test pictures, and for a broken picture where ``strict``; each message names what it means.
    """
    train_root, test_root = _layout(root)
    names = _class_names(train_root)
    train = _read(train_root, names, strict, image_size)
    if test_root is None:
        rows, held = _split(train, names, train_root, split_seed)
        train_set = ImageSet(train.images, train.labels[rows], rows, image_size=image_size)
        test_set = ImageSet(train.images, train.labels[held], held, image_size=image_size)
        return ImageData(root.name, train_set, test_set, names, len(train.skipped), held_out(TEST_SHARE, split_seed))
    unknown = sorted(set(_class_names(test_root)) - set(names))
    if unknown:
        raise ValueError(f"{test_root} has classes without training pictures: {_list(unknown)}")
    test = _read(test_root, names, strict, image_size)
    for part, where in ((train, train_root), (test, test_root)):
        _require(part, names, where, at_least=1)
    return ImageData(
        root.name,
        ImageSet(train.images, train.labels, image_size=image_size),
        ImageSet(test.images, test.labels, image_size=image_size),
        names,
        len(train.skipped) + len(test.skipped),
        f"the folder {test_root.name} that came with the data",
    )


def _layout(root: Path) -> tuple[Path, Path | None]:
    # A folder that holds pictures and no folders is a class, whatever its name: "train" may stand beside "bus".
    inner = (path for path in root.iterdir() if path.is_dir() and any(item.is_dir() for item in path.iterdir()))
    folders = {path.name.lower(): path for path in inner}
    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if train is None and test is None:
        return root, None
    if train is None:
        raise ValueError(f"{root} has a {test and test.name} folder but no train folder")
    return train, test


def _class_names(root: Path) -> list[str]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{root} must hold at least two class folders, found {len(names)}: {_list(names)}")
    return names


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def _read(root: Path, names: list[str], strict: bool, image_size: int | None) -> _Part:
    paths, labels, kept, skipped = [], [], [], []
    room = MAX_BYTES if image_size is not None else 0
    for label, name in enumerate(names):
        for path in _files(root / name):
            try:
                image = read_picture(path, at_least=image_size)
            except BrokenImageError as error:
                if strict:
                    raise
                skipped.append(str(error))
                continue
            paths.append(path)
            labels.append(label)
            if image_size is not None and room > 0:
                kept.append(cover(image.unsqueeze(0), image_size).squeeze(0))
                room -= kept[-1].numel()
    whole = bool(kept) and len(kept) == len(paths)
    images = FileImages(paths, image_size, torch.stack(kept) if whole else None)
    return _Part(images, torch.tensor(labels, dtype=torch.int64), skipped)


def _require(part: _Part, names: list[str], root: Path, *, at_least: int) -> None:
    counts = torch.bincount(part.labels, minlength=len(names)).tolist()
    short = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < at_least]
    if short:
        broken = f"; {len(part.skipped)} broken pictures were left out, first {part.skipped[0]}" if part.skipped else ""
        raise ValueError(f"{root}: classes with fewer than {at_least} readable pictures: {_list(short)}{broken}")


def _split(part: _Part, names: list[str], root: Path, seed: int) -> tuple[Tensor, Tensor]:
    _require(part, names, root, at_least=2)  # one to train on, one to test on
    return stratified_split(part.labels, TEST_SHARE, seed)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
