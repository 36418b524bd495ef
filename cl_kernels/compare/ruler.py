"""Marks on the ruler of distances: built-in sets, so that a number for the user's images can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels import data
from cl_kernels.data import corruptions
from cl_kernels.data.preprocess import cover

__all__ = ["RULER", "names", "ruler_images"]

SEVERITY = 5
#: One corruption of each kind, the strongest severity: enough marks to read a number by, in a few seconds.
RULER = (
    "digits",
    "digits, inverted",
    *(f"digits, {name} {SEVERITY}" for name in ("gaussian-noise", "defocus-blur", "fog", "pixelate")),
)


def names() -> list[str]:
    """Every mark: the digits, inverted, and under each corruption at severity 1 to 5."""
    worse = [f"digits, {name} {severity}" for name in corruptions.names() for severity in corruptions.SEVERITIES]
    return ["digits", "digits, inverted", *worse]


def ruler_images(name: str, size: int, n: int, seed: int = 0) -> Tensor:
    """At most n images of a mark, uint8 [n, 1, size, size]: corruptions are applied at the size the backbone takes.

    The n are the same for every mark. Raises `ValueError` for an unknown name.
    """
    if name not in names():
        raise ValueError(
            f"ruler: unknown mark {name!r}; known: digits, digits, inverted, and digits, CORRUPTION SEVERITY"
        )
    digits = data.load("digits")
    whole = torch.cat([digits.train.tensors(), digits.test.tensors()])
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:n]
    images = cover(whole[chosen], size)
    what = name.removeprefix("digits").removeprefix(", ")
    if what == "inverted":
        return 255 - images
    if what:
        family, severity = what.split(" ")
        return corruptions.corrupt(images, family, int(severity), seed=seed)
    return images
