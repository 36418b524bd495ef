"""What the user's data is: counts, sizes, duplicates and leaks, and what its class names give away."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from cl_kernels.data import ImageData, ImageSet

__all__ = ["data_card"]

MEASURED = 500  # images of each split whose stored size is looked up, evenly spaced
EXAMPLES = 5  # of each kind of duplicate that are named
IMBALANCE = 10.0  # largest over smallest class, above which accuracy over all images hides the small ones
FEW_TEST_IMAGES = 100  # the standard error of an accuracy of 80 % is 4 points there

_STRUCTURED = re.compile(
    r"\b(left|right|top|bottom|upper|lower|north|south|east|west|near|far|degrees?|deg|angle|azimuth|elevation|rotated?|"
    r"count|few|many|none|objects?|items?|distance|position|orientation|pose|facing)\b",
    re.IGNORECASE,
)
_MEASURE = re.compile(
    r"^[<>≤≥]?\s*\d+(\.\d+)?\s*(-|–|to)\s*\d+(\.\d+)?$|^\d+(\.\d+)?\s*(°|cm|mm|m|km|px|x)$", re.IGNORECASE
)


def data_card(data: ImageData, *, read_test_labels: bool = True) -> dict[str, Any]:
    """Counts, image sizes, duplicates, skipped images, where the test set comes from, and warnings in plain words.

    Two images are duplicates where all their pixels are equal, at the size at which ``data`` was loaded; copies that
    were compressed, cropped or scaled anew are not found. A test image that also occurs in the training set is a leak.
    Loaded with ``image_size`` the sets are decoded once and kept (`ImageSet.tensors`), else each image is read here.
    ``read_test_labels=False`` leaves test labels alone: no counts by class there, no search for copies under two labels
    across the splits.

    Returns ``name``, ``classes``, ``class_names``, ``train`` and ``test`` (n, counts by class, channels, sizes),
    ``imbalance``, ``duplicates``, ``skipped``, ``test_from``, ``label_type`` {guess, reason} and ``warnings``.
    Raises `ValueError` for a split without images and for fewer than two classes with training images.
    """
    for split, part in (("training", data.train), ("test", data.test)):
        if len(part) == 0:
            raise ValueError(f"data {data.name!r}: the {split} set has no images")
    counts = torch.bincount(data.train.labels, minlength=len(data.class_names))
    held = torch.bincount(data.test.labels, minlength=len(data.class_names)) if read_test_labels else None
    if int((counts > 0).sum()) < 2:
        raise ValueError(
            f"data {data.name!r}: needs training images of at least two classes, has {_named(data, counts)}"
        )
    present = counts[counts > 0]
    card: dict[str, Any] = {
        "name": data.name,
        "classes": len(data.class_names),
        "class_names": list(data.class_names),
        "train": {"n": len(data.train), "counts": counts.tolist(), **_sizes(data.train)},
        "test": {"n": len(data.test), "counts": None if held is None else held.tolist(), **_sizes(data.test)},
        "imbalance": float(present.max() / present.min()),
        "duplicates": _duplicates(data, read_test_labels),
        "skipped": data.skipped,
        "test_from": data.test_from,
        "label_type": _label_type(data.class_names),
    }
    card["warnings"] = _warnings(data, card, counts, held)
    return card


def _named(data: ImageData, counts: Tensor) -> str:
    return ", ".join(data.class_names[index] for index in counts.nonzero().flatten().tolist()) or "none"


def _sizes(part: ImageSet) -> dict[str, Any]:
    """Heights and widths as stored, over at most `MEASURED` images."""
    index = torch.linspace(0, len(part) - 1, min(len(part), MEASURED)).round().long().unique().tolist()
    seen = Counter(part.stored_size(number) for number in index)
    by_area = sorted(seen, key=lambda size: (size[0] * size[1], size))
    sizes = {
        "measured": len(index),
        "distinct": len(seen),
        "commonest": list(seen.most_common(1)[0][0]),
        "smallest": list(by_area[0]),
        "largest": list(by_area[-1]),
    }
    return {"channels": int(part[0][0].shape[0]), "sizes": sizes}


def _hashes(part: ImageSet) -> list[bytes]:
    found = []
    for index in range(len(part)):
        pixels = part[index][0].contiguous()
        digest = hashlib.blake2b(f"{tuple(pixels.shape)}".encode(), digest_size=16)
        digest.update(pixels.numpy().data)
        found.append(digest.digest())
    return found


def _duplicates(data: ImageData, read_test_labels: bool) -> dict[str, Any]:
    """Extra copies inside each split, test images that are in the training set, and copies with another label."""
    train, test = _hashes(_decoded(data.train)), _hashes(_decoded(data.test))
    first: dict[bytes, int] = {}
    labels: dict[bytes, set[int]] = {}
    for index, (digest, label) in enumerate(zip(train, data.train.labels.tolist(), strict=True)):
        first.setdefault(digest, index)
        labels.setdefault(digest, set()).add(label)
    if read_test_labels:
        for digest, label in zip(test, data.test.labels.tolist(), strict=True):
            labels.setdefault(digest, set()).add(label)
    leaks = [(first[digest], index) for index, digest in enumerate(test) if digest in first]
    conflicts = sum(1 for known in labels.values() if len(known) > 1)
    return {
        "compared": "all pixels, at the size the data was loaded at",
        "inside_train": len(train) - len(set(train)),
        "inside_test": len(test) - len(set(test)),
        "across": len(leaks),
        "across_examples": [{"train": a, "test": b} for a, b in leaks[:EXAMPLES]],
        "two_labels": conflicts,
    }


def _decoded(part: ImageSet) -> ImageSet:
    """The set with its pixels in memory where they are of one size by now, so that later stages find them there."""
    if part.image_size is not None:
        part.tensors()
    return part


def _label_type(names: list[str]) -> dict[str, str]:
    """A guess from the class names alone, where they say it themselves; honest doubt otherwise."""
    words = [name.replace("_", " ").replace("-", " ") for name in names]
    if all(_STRUCTURED.search(word) or _MEASURE.match(name) for word, name in zip(words, names, strict=True)):
        return {"guess": "structured", "reason": "every class name speaks of a place, direction, distance or number"}
    last = Counter(word.split()[-1].lower() for word in words if len(word.split()) > 1)
    common = last.most_common(1)
    if common and len(names) >= 5 and common[0][1] >= 0.8 * len(names):
        return {"guess": "fine-grained", "reason": f"most class names end in {common[0][0]!r}: kinds of one thing"}
    return {"guess": "not guessed", "reason": "the class names do not say whether classes are things, kinds, or places"}


def _warnings(data: ImageData, card: dict[str, Any], counts: Tensor, held: Tensor | None) -> list[str]:
    found = []
    same = card["duplicates"]
    if same["across"]:
        found.append(
            f"{same['across']} of {len(data.test)} test images also occur in the training set, pixel for pixel: "
            "accuracies on this test set are too high"
        )
    if same["two_labels"]:
        found.append(f"{same['two_labels']} images occur under two labels: no model can be right on both")
    if same["inside_train"]:
        found.append(f"{same['inside_train']} training images are copies of others: there is less data than it seems")
    if same["inside_test"]:
        found.append(f"{same['inside_test']} test images are copies of others: standard errors are too small")
    if data.skipped:
        found.append(f"{data.skipped} broken images were left out")
    if card["imbalance"] > IMBALANCE:
        large, small = int(counts.argmax()), int(torch.where(counts > 0, counts, counts.max() + 1).argmin())
        found.append(
            f"the largest class ({data.class_names[large]}, {int(counts[large])}) has {card['imbalance']:.0f} times "
            f"the training images of the smallest ({data.class_names[small]}, {int(counts[small])})"
        )
    for kind, numbers in (("training", counts), ("test", held)):
        empty = [] if numbers is None else (numbers == 0).nonzero().flatten().tolist()
        if empty:
            names = ", ".join(data.class_names[index] for index in empty[:EXAMPLES])
            found.append(
                f"{len(empty)} classes have no {kind} images: {names}{', ...' if len(empty) > EXAMPLES else ''}"
            )
    if len(data.test) < FEW_TEST_IMAGES:
        found.append(f"only {len(data.test)} test images: differences of a few points cannot be told from chance")
    return found
