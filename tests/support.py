"""Inputs and measures that several test files share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (0, 1, 2, 3, 7, 16, 17, 31, 32, 33, 64, 65, 129)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded", "flipped")
VALUES = ("normal", "large", "small", "zeros", "denormal")


@dataclass(frozen=True)
class Rows:
    """A recipe for a tensor [..., d]: hypothesis draws the recipe, torch makes the numbers."""

    lead: tuple[int, ...]
    d: int
    dtype: torch.dtype
    layout: str
    values: str
    seed: int

    def make(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*self.lead, self.d)
        scale = {"normal": 1.0, "large": 1e2, "small": 1e-4, "zeros": 0.0, "denormal": 1e-30}[self.values]
        if self.layout == "expanded" and self.lead:
            shape = (1, *shape[1:])
        x = (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(self.dtype)
        if self.layout == "transposed" and x.ndim >= 2:
            return x.mT.contiguous().mT
        if self.layout == "sliced":
            wide = torch.full((*shape[:-1], 2 * self.d + 1), float("nan"), dtype=self.dtype)
            wide[..., 1::2] = x
            return wide[..., 1::2]
        if self.layout == "offset":  # an address that is a multiple of the element size and of nothing more
            flat = torch.full((x.numel() + 1,), float("nan"), dtype=self.dtype)
            flat[1:] = x.flatten()
            return flat[1:].view(shape)
        if self.layout == "expanded" and self.lead:
            return x.expand(*self.lead, self.d)
        return x.flip(-1) if self.layout == "flipped" else x


@st.composite
def rows(draw: st.DrawFn, dims: tuple[int, ...] = SIZES, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Rows:
    lead = draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 40)), max_size=3))
    return Rows(
        tuple(lead),
        draw(st.sampled_from(dims)),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(VALUES)),
        draw(st.integers(0, 2**16)),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """The larger of the relative errors in the Frobenius and in the max norm: a mean hides one bad tile."""
    difference, wanted = actual.double() - expected.double(), expected.double()
    tiny = torch.finfo(torch.float64).tiny
    return max(
        float(difference.norm() / wanted.norm().clamp_min(tiny)),
        float(difference.abs().max() / wanted.abs().max().clamp_min(tiny)),
    )


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = values.numel()
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2
