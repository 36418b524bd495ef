"""LogME: the evidence of a Bayesian linear model on frozen features, at its best hyper-parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["logme"]

LOWEST, HIGHEST, POINTS = -32.0, 12.0, 177  # log of t / the largest squared singular value: steps of 0.25
GOLDEN = (math.sqrt(5) - 1) / 2


def logme(features: Tensor, labels: Tensor) -> float:
    """Largest log evidence per image of one-against-all linear models, averaged over the classes that occur.

    For each class, y in {0, 1}^n is modelled as y = F w + e with w ~ N(0, I / alpha), e ~ N(0, I / beta) (no bias), so
    that y ~ N(0, (I + F F^T / t) / beta) with t = alpha / beta. At given t the best beta is n / q(t),
    q(t) = y^T (I + F F^T / t)^-1 y, which leaves the evidence as a function of t alone:

        log p(y) = n/2 log(n / (2 pi q)) - n/2 - 1/2 sum_i log(1 + s_i^2 / t)

    with s_i the singular values of F. It is maximised over a grid of log t, then by golden section. The published
    method iterates alpha and beta to a fixed point, which is a stationary point of the same function. Higher is better;
    only differences between features for the *same* labels mean anything.

    ``features`` [n, D], ``labels`` [n]. Raises `ValueError` for fewer than two images. Cost: one eigendecomposition of
    the smaller Gram matrix, in float64. Source: You et al., LogME, ICML 2021, arXiv:2102.11005.
    """
    n = len(features)
    if n < 2 or len(labels) != n:
        raise ValueError(f"features and labels: expected two images or more and one label each, got {n}, {len(labels)}")
    wide = features.double()
    targets = (labels[:, None] == torch.unique(labels)[None, :]).double()
    squares, explained = _spectrum(wide, targets)
    rest = (targets.square().sum(dim=0) - explained.sum(dim=0)).clamp(min=0)
    top = float(squares.max().clamp(min=torch.finfo(torch.float64).tiny))

    def evidence(log_t: Tensor) -> Tensor:
        """log p(y) for [points, classes] values of log(t / top)."""
        ratio = (squares / top)[:, None, None] * torch.exp(-log_t)[None]
        q = (explained[:, None, :] / (1 + ratio)).sum(dim=0) + rest
        floor = torch.finfo(torch.float64).tiny
        fit = 0.5 * n * (math.log(n / (2 * math.pi)) - torch.log(q.clamp(min=floor)) - 1)
        return fit - 0.5 * torch.log1p(ratio).sum(dim=0)

    classes = targets.shape[1]
    grid = torch.linspace(LOWEST, HIGHEST, POINTS, dtype=torch.float64)[:, None].expand(-1, classes)
    best = torch.cat([evidence(part) for part in grid.split(16)]).argmax(dim=0)
    step = (HIGHEST - LOWEST) / (POINTS - 1)
    centre = LOWEST + step * best.double()
    low, high = centre - step, centre + step
    for _ in range(40):  # the bracket of 0.5 shrinks to 2e-9
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        better = evidence(left[None])[0] > evidence(right[None])[0]
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    return float(evidence(((low + high) / 2)[None])[0].mean() / n)


def _spectrum(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values s_i^2 [r] of the features, and each target's part (u_i^T y)^2 [r, classes] on them."""
    n, width = features.shape
    if n <= width:
        squares, left = torch.linalg.eigh(features @ features.T)
        return squares.clamp(min=0), (left.T @ targets).square()
    squares, right = torch.linalg.eigh(features.T @ features)
    kept = squares > squares.max().clamp(min=0) * n * torch.finfo(torch.float64).eps
    squares, right = squares[kept], right[:, kept]
    if not bool(kept.any()):
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, targets.shape[1], dtype=torch.float64)
    return squares, ((features @ right).T @ targets).square() / squares[:, None]
