"""The ``.npz`` shards: JPEG files end to end with offsets, or packed bits of ink. No pickles are read."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_kernels.data.pictures import BrokenImageError, picture_size, read_picture
from cl_kernels.data.sets import ImageData, Images, ImageSet

__all__ = ["load_shard"]

_START, _END = b"\xff\xd8", b"\xff\xd9"


class JpegImages:
    """JPEG files end to end: image ``i`` is ``data[offsets[i]:offsets[i + 1]]``, decoded at every read (0.26 ms)."""

    def __init__(self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], name: str) -> None:
        self.data, self.offsets, self.name = data, offsets, name

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def size(self, index: int) -> tuple[int, int]:
        return picture_size(self.bytes(index))

    def bytes(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def read(self, index: int) -> Tensor:
        return read_picture(self.bytes(index), label=f"{self.name}, image {index}")


class InkImages:
    """Drawings of one bit a pixel, as black ink (0) on white (255), uint8 [1, H, W]."""

    def __init__(self, bits: npt.NDArray[np.uint8], height: int, width: int) -> None:
        self.bits, self.height, self.width = bits, height, width

    def __len__(self) -> int:
        return len(self.bits)

    def read(self, index: int) -> Tensor:
        ink = np.unpackbits(self.bits[index], count=self.height * self.width)
        return torch.from_numpy((1 - ink) * np.uint8(255)).view(1, self.height, self.width)


def load_shard(path: Path, *, strict: bool = False, image_size: int | None = None) -> ImageData:
    """Read a shard in JPEG layout (``<split>_jpeg``, ``_offsets``, ``_labels``) or ink layout (``ink_bits``).

    Pixels are decoded when they are read. An image whose bytes are no whole JPEG file is left out and counted, or
    raises where ``strict``; one that looks whole but does not decode raises `BrokenImageError` when it is read. Without
    a test split, val is the test set. Raises ``ValueError`` naming the file for anything that is not such a shard.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise ValueError(f"{path} is not a readable .npz shard ({error})") from error
    if "class_names" not in fields:
        raise ValueError(f"{path} has no class_names; fields found: {', '.join(sorted(fields)) or 'none'}")
    names = [str(name) for name in fields["class_names"]]
    if len(names) < 2:
        raise ValueError(f"{path} must hold at least two classes, found {len(names)}")
    if "ink_bits" in fields:
        return _ink(path, fields, names, image_size)
    held = "test" if "test_jpeg" in fields else "val"
    train, missing = _jpeg(path, fields, "train", len(names), strict, image_size)
    test, missing_too = _jpeg(path, fields, held, len(names), strict, image_size)
    came = f"the {held} split that came with the data"
    return ImageData(path.stem, train, test, names, missing + missing_too, came)


def _field(path: Path, fields: dict[str, npt.NDArray[np.generic]], name: str, kind: str) -> npt.NDArray[np.generic]:
    if name not in fields:
        raise ValueError(f"{path} has no field {name!r}; found: {', '.join(sorted(fields))}")
    if fields[name].dtype.kind not in kind:
        raise ValueError(f"{path}: field {name!r} has dtype {fields[name].dtype}")
    return fields[name]


def _labels(path: Path, values: npt.NDArray[np.generic], images: int, classes: int) -> Tensor:
    labels = torch.from_numpy(values.astype(np.int64))
    if labels.shape != (images,):
        raise ValueError(f"{path}: {images} images but labels of shape {tuple(labels.shape)}")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{path}: labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return labels


def _jpeg(
    path: Path,
    fields: dict[str, npt.NDArray[np.generic]],
    split: str,
    classes: int,
    strict: bool,
    image_size: int | None,
) -> tuple[ImageSet, int]:
    data = _field(path, fields, f"{split}_jpeg", "u").astype(np.uint8, copy=False)
    offsets = _field(path, fields, f"{split}_offsets", "iu").astype(np.int64)
    if (
        offsets.ndim != 1
        or len(offsets) < 1
        or offsets[0] < 0
        or offsets[-1] > len(data)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{path}: {split}_offsets must rise from 0 to the {len(data)} bytes of {split}_jpeg")
    images = JpegImages(data, offsets, f"{path} {split}")
    labels = _labels(path, _field(path, fields, f"{split}_labels", "iu"), len(images), classes)
    whole = torch.tensor([_is_whole(images.bytes(index)) for index in range(len(images))], dtype=torch.bool)
    rows = whole.nonzero().flatten()
    missing = len(images) - len(rows)
    if strict and missing:
        raise BrokenImageError(f"{images.name}, image {int((~whole).nonzero()[0])}: not a whole JPEG file")
    return ImageSet(images, labels[rows], rows, image_size=image_size), missing


def _is_whole(data: bytes) -> bool:
    """Starts and ends as a JPEG file does: finds cut files at a hundredth of the cost of decoding."""
    return data.startswith(_START) and data.rstrip(b"\0").endswith(_END)


def _ink(path: Path, fields: dict[str, npt.NDArray[np.generic]], names: list[str], image_size: int | None) -> ImageData:
    bits = _field(path, fields, "ink_bits", "u").astype(np.uint8, copy=False)
    shape = _field(path, fields, "shape", "iu").astype(np.int64)
    if shape.shape != (2,) or shape.min() < 1 or bits.ndim != 2 or bits.shape[1] * 8 < shape.prod():
        raise ValueError(f"{path}: ink_bits {bits.shape} cannot hold drawings of shape {shape.tolist()}")
    labels = _labels(path, _field(path, fields, "labels", "iu"), len(bits), len(names))
    held = torch.from_numpy(_field(path, fields, "is_test", "bu").astype(bool))
    if held.shape != labels.shape:
        raise ValueError(f"{path}: {len(bits)} drawings but is_test of shape {tuple(held.shape)}")
    images: Images = InkImages(bits, int(shape[0]), int(shape[1]))
    parts = []
    for chosen in (~held, held):
        rows = chosen.nonzero().flatten()
        parts.append(ImageSet(images, labels[rows], rows, image_size=image_size))
    return ImageData(path.stem, parts[0], parts[1], names)
