"""What a comparison works on, opened and checked before the first measurement: images, labels, backbone, arms."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_kernels import data as image_data
from cl_kernels._version import __version__
from cl_kernels.compare.arms import ARMS, Arm, Scale
from cl_kernels.compare.cache import FOLDER
from cl_kernels.compare.config import CompareConfig
from cl_kernels.compare.features import extract, image_hash, weight_hash
from cl_kernels.compare.subsets import SealedLabels, ladder, nested_order
from cl_kernels.continual.environment import pick_device
from cl_kernels.continual.seeds import derive
from cl_kernels.data.sets import held_out, stratified_split

__all__ = ["Session", "open_session"]

TEST_IMAGES = 2000  # at the most: half a point of standard error at 95 %, and an evaluation that stays cheap
KEPT_BYTES = 1 << 30  # of prepared images in memory
FEWEST = 5  # training images, as many as the probes and the distances have folds
SAMPLE = 2048  # training images that the data card, the probes and the distances look at


@dataclass
class Session:
    """Training rows are numbers of the data's training set; images are prepared for the backbone when asked for."""

    config: CompareConfig
    device: torch.device
    backbone: image_data.Backbone
    data: image_data.ImageData
    arms: list[Arm]
    labels: Tensor
    classes: int
    sealed: SealedLabels
    test_rows: Tensor
    notes: list[str]
    weight_hash: str
    orders: dict[int, Tensor] = field(default_factory=dict)
    _pixels: dict[str, Tensor] = field(default_factory=dict)
    _places: Tensor | None = None
    _prepared: Tensor | None = None
    _features: Tensor | None = None

    @property
    def size(self) -> int:
        """How many training images there are."""
        return len(self.labels)

    @property
    def sizes(self) -> list[int]:
        """The sizes that may be trained on."""
        return ladder(self.size, self.classes)

    def draw_seed(self, draw: int) -> int:
        """The seed of the subset, the initialisation and the order of batches of one draw, the same for every arm."""
        return derive(self.config.seed, "draw", draw) % 2**31

    def rows(self, size: int, draw: int) -> Tensor:
        """The training rows of the subset of `size` images in one draw; smaller ones are beginnings of larger ones."""
        if draw not in self.orders:
            self.orders[draw] = nested_order(self.labels, self.draw_seed(draw))
        return self.orders[draw][:size]

    def load(self, size: int, draws: int) -> None:
        """Read the images of all subsets up to `size` of `draws` draws, each once; prepared where they fit."""
        rows = torch.cat([self.rows(size, draw) for draw in range(draws)]).unique()
        if self._places is not None and bool((self._places[rows] >= 0).all()):
            return
        self._pixels["train"] = self.data.train.subset(rows).tensors()
        self._places = torch.full((self.size,), -1, dtype=torch.int64)
        self._places[rows] = torch.arange(len(rows))
        wanted = self.backbone.preprocessing
        fits = len(rows) * wanted.channels * wanted.size**2 * 4 <= KEPT_BYTES
        self._prepared = self._prepare(self._pixels["train"]) if fits else None
        self._features = None

    def images(self, rows: Tensor) -> Tensor:
        """Prepared training images [n, C, H, W]."""
        places = self._at(rows)
        return self._prepare(self._pixels["train"][places]) if self._prepared is None else self._prepared[places]

    def pixels(self, rows: Tensor) -> Tensor:
        """The same as uint8."""
        return self._pixels["train"][self._at(rows)]

    def test_pixels(self) -> Tensor:
        """The test images that are used, as uint8."""
        if "test" not in self._pixels:
            self._pixels["test"] = self.data.test.subset(self.test_rows).tensors()
        return self._pixels["test"]

    def test_images(self) -> Tensor:
        """The test images that are used, prepared."""
        if "prepared test" not in self._pixels:
            self._pixels["prepared test"] = self._prepare(self.test_pixels())
        return self._pixels["prepared test"]

    def features(self, rows: Tensor) -> Tensor:
        """Features [n, D] of the frozen backbone for training images; computed once for all that are loaded."""
        if self._features is None:
            self._features = self._extracted(self._pixels["train"])
        return self._features[self._at(rows)]

    def test_features(self) -> Tensor:
        """The same of the test images."""
        if "test features" not in self._pixels:
            self._pixels["test features"] = self._extracted(self.test_pixels())
        return self._pixels["test features"]

    def data_hash(self, rows: Tensor) -> str:
        """sha256 of a subset's pixels, in order."""
        return image_hash(self.pixels(rows))

    def grid(self, arm: Arm) -> list[dict[str, Any]]:
        """What an arm may try."""
        return arm.grid(self.config.grid, Scale.of(self.backbone.model))

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with."""
        digest = hashlib.blake2b(repr((self.data.name, list(self.data.class_names))).encode(), digest_size=16)
        digest.update(self.labels.numpy().tobytes())
        for part, count in ((self.data.train, self.size), (self.data.test.subset(self.test_rows), len(self.test_rows))):
            some = torch.arange(0, count, -(-count // 64))
            digest.update(image_hash(part.subset(some).tensors()).encode())
        digest.update(self.sealed.digest().encode())
        hashes = {"data hash": digest.hexdigest(), "weight hash": self.weight_hash}
        return self.config.fixed() | hashes | {"version": f"{__version__}, torch {torch.__version__}"}

    def _extracted(self, pixels: Tensor) -> Tensor:
        cache = self.config.folder / FOLDER
        return extract(self.backbone, pixels, device=self.device, cache=cache).pooled.to(self.device)

    def _at(self, rows: Tensor) -> Tensor:
        if self._places is None:
            raise RuntimeError("images: load() comes first")
        return self._places[rows]

    def _prepare(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.backbone.preprocessing(part) for part in pixels.split(512)])


def open_session(
    config: CompareConfig,
    data: image_data.ImageData | None = None,
    backbone: image_data.Backbone | None = None,
) -> Session:
    """Open what `config` names; `data` and `backbone` replace what would be loaded.

    Raises `ValueError` for unknown names, less than two classes, a class with one image, or no images; what the parts
    raise besides."""
    device = pick_device(config.device)
    if backbone is None:
        backbone = image_data.load_backbone(config.backbone, config.weights)
    if data is None:
        data = image_data.load(config.data, strict=config.strict, image_size=backbone.preprocessing.size)
    data, notes = _with_test(data, config.seed)
    labels = data.train.labels.to(torch.int64)
    classes = len(data.class_names)
    _check_classes(labels, data)
    backbone.model.to(device)
    if data.skipped:
        notes.append(f"{data.skipped} broken images were left out (--strict stops at the first)")
    chosen = torch.arange(len(data.test))
    wanted = backbone.preprocessing
    most = min(TEST_IMAGES, KEPT_BYTES // (4 * wanted.channels * wanted.size**2))
    if len(chosen) > most:
        generator = torch.Generator().manual_seed(derive(config.seed, "test images"))
        chosen = torch.randperm(len(chosen), generator=generator)[:most].sort().values
        notes.append(f"{most} of {len(data.test)} test images, drawn at random, are used")
    return Session(
        config=config, device=device, backbone=backbone, data=data, arms=[ARMS[name] for name in config.arms],
        labels=labels, classes=classes, sealed=SealedLabels(data.test.labels[chosen]), test_rows=chosen, notes=notes,
        weight_hash=weight_hash(backbone.model),
    )  # fmt: skip


def _with_test(data: image_data.ImageData, seed: int) -> tuple[image_data.ImageData, list[str]]:
    """The data with a test set, and a note where one was cut off."""
    if len(data.train) == 0:
        raise ValueError(f"data: {data.name} holds no training image")
    if len(data.test):
        return data, []
    counts = torch.bincount(data.train.labels)
    if int(counts[counts > 0].min()) < 2:
        raise ValueError(f"data: {data.name} has no test images, and a class with one image cannot be split")
    rows, held = stratified_split(data.train.labels, 0.25, derive(seed, "hold out"))
    told = held_out(0.25, seed)
    made = dataclasses.replace(data, train=data.train.subset(rows), test=data.train.subset(held), test_from=told)
    return made, [f"The test images are {told}"]


def _check_classes(labels: Tensor, data: image_data.ImageData) -> None:
    if len(labels) < FEWEST:
        raise ValueError(f"data: {data.name} must have at least {FEWEST} training images, got {len(labels)}")
    counts = torch.bincount(labels, minlength=len(data.class_names))
    if int((counts > 0).sum()) < 2:
        raise ValueError(f"data: {data.name} must have at least two classes with images, got {int((counts > 0).sum())}")
    few = [f"{data.class_names[index]} ({int(count)})" for index, count in enumerate(counts) if count < 2]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        raise ValueError(
            f"data: a class needs two training images, one to train on and one to choose by: {', '.join(few[:5])}{more}"
        )
