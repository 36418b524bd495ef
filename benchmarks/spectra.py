"""The five spectra and the three measures by which projectors are judged (tests and benchmarks share them).

The spectra are those of covariances of pre-trained transformers, and two harder ones, at any size d: the index of the
cut grows with d, so that a cut stands in the same place of the curve. Source: performance.md 4.5 and 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

__all__ = ["SPECTRA", "deviation", "eigen", "excess", "leak", "lost", "matrix", "threshold"]

F64 = torch.float64
Eigen = tuple[Tensor, Tensor]


def vit(d: int) -> tuple[Tensor, int]:
    """lambda_1 = 1, then 0.04 i^-1.2 exp(-0.8 (i/250)^1.5) + 2e-6; at the cut neighbours differ by 0.8 % (d = 768)."""
    i = _index(d)
    values = 0.04 * i**-1.2 * torch.exp(-0.8 * (i * 768 / d / 250) ** 1.5) + 2e-6
    values[0] = 1.0
    return values, _scaled(300, d)


def power(d: int) -> tuple[Tensor, int]:
    return _index(d) ** -2, _scaled(200, d)


def exponential_60(d: int) -> tuple[Tensor, int]:
    return torch.exp(-(_index(d) - 1) * 768 / d / 60), _scaled(300, d)


def exponential_30(d: int) -> tuple[Tensor, int]:
    return torch.exp(-(_index(d) - 1) * 768 / d / 30), _scaled(300, d)


def rank_64(d: int) -> tuple[Tensor, int]:
    """1/i up to the rank, 64 of 768; exactly 0 afterwards."""
    i, rank = _index(d), _scaled(64, d)
    return torch.where(i <= rank, 1 / i, 0.0), rank


#: Name -> d -> eigenvalues [d] in descending order, and how many of them are protected.
SPECTRA: Final[dict[str, Callable[[int], tuple[Tensor, int]]]] = {
    "vit-like": vit,
    "power law": power,
    "exponential/60": exponential_60,
    "exponential/30": exponential_30,
    "rank 64": rank_64,
}


def _index(d: int) -> Tensor:
    return torch.arange(1, d + 1, dtype=F64)


def _scaled(index: int, d: int) -> int:
    return max(1, round(index * d / 768))


def threshold(values: Tensor, cut: int) -> float:
    """Protects the first `cut` eigenvalues: half-way to the next in log(lambda), a hundredth of it if that is 0."""
    last, first_free = float(values[cut - 1]), float(values[cut])
    return (last * first_free) ** 0.5 if first_free > 0 else last / 100


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator))[0]
    full: Tensor = (basis * values.to(F64)) @ basis.mT
    return (full + full.mT) / 2


def eigen(C: Tensor) -> Eigen:
    """float64 eigenvalues and eigenvectors, for several measures of one matrix."""
    values, vectors = torch.linalg.eigh(C.to(F64))
    return values, vectors


def leak(P: Tensor, C: Tensor, tau: float, known: Eigen | None = None) -> float:
    """What protected directions still let through: max over lambda > 4 tau of lambda |P u|^2 / tau. Wanted <= 1e-2."""
    values, vectors = known or eigen(C)
    passed = (P.to(F64) @ vectors).square().sum(0)
    return _largest((values * passed / tau)[values > 4 * tau])


def excess(P: Tensor, C: Tensor, tau: float) -> float:
    """The worst energy of an update, as a share of what a hard cut at tau allows: |P C P|_2 / tau. Wanted <= 1.05."""
    return _norm(P.to(F64) @ C.to(F64) @ P.to(F64)) / tau


def lost(P: Tensor, C: Tensor, tau: float, known: Eigen | None = None) -> float:
    """What a free direction loses: max over lambda < tau/4 of 1 - u^T P u. Wanted <= 1e-3."""
    values, vectors = known or eigen(C)
    kept = (vectors * (P.to(F64) @ vectors)).sum(0)
    return _largest((1 - kept)[values < tau / 4])


def deviation(P: Tensor, C: Tensor, response: Callable[[Tensor], Tensor], known: Eigen | None = None) -> float:
    """|P - V f(lambda) V^T|_2 against float64 eigh, with f = `response`; eigenvalues below 0 count as 0."""
    values, vectors = known or eigen(C)
    wanted = (vectors * response(values.clamp_min(0))) @ vectors.mT
    return _norm(P.to(F64) - wanted)


def _norm(symmetric: Tensor) -> float:
    """The 2-norm: for a symmetric matrix eigenvalues are five times as quick as singular values."""
    return float(torch.linalg.eigvalsh((symmetric + symmetric.mT) / 2).abs().max())


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0
