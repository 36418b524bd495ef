"""Random numbers that belong to an image: the same in any batch, on any machine."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["Draws", "as_pixels", "as_unit"]

# The constants of splitmix64 (Steele, Lea, Flood 2014), as the signed numbers that torch's int64 holds.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


class Draws:
    """Streams of random numbers, one for each image of uint8 [N, C, H, W], from its pixels, a seed and a name.

    Image i has a key: a sum of its pixels with random odd weights modulo 2^64, mixed. Number k of stream j is
    splitmix64 of (key, j, k): no state, so a batch of one gives what a batch of many gives, bit for bit.
    """

    def __init__(self, images: Tensor, seed: int, name: str) -> None:
        digest = hashlib.blake2b(repr((seed, name)).encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little", signed=True)
        flat = images.reshape(len(images), -1).to(torch.int64)
        weights = _mix(torch.arange(flat.shape[1], dtype=torch.int64) * _GOLDEN + start) | 1
        self._keys = _mix((flat * weights).sum(dim=1) + start)

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """float64 [N, *shape] in [0, 1), multiples of 2^-53."""
        count = math.prod(shape)
        keys = _mix(self._keys ^ torch.tensor(2 * stream + 1) * _FIRST)
        bits = _mix(keys[:, None] + torch.arange(1, count + 1, dtype=torch.int64) * _GOLDEN)
        return (_shift(bits, 11).double() * 2.0**-53).reshape(len(keys), *shape)

    def normal(self, stream: int, *shape: int) -> Tensor:
        """float64 [N, *shape], standard normal (Box and Muller); uses the streams `stream` and `stream + 1`."""
        radius = (-2 * torch.log1p(-self.uniform(stream, *shape))).sqrt()
        return radius * (2 * math.pi * self.uniform(stream + 1, *shape)).cos()


def as_unit(images: Tensor) -> Tensor:
    """uint8 as float64 in [0, 1]."""
    return images.double() / 255


def as_pixels(values: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8, clipped and rounded."""
    return (values.clamp(0, 1) * 255).round_().to(torch.uint8)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST  # int64 products wrap
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _shift(values: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's own repeats the sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)
