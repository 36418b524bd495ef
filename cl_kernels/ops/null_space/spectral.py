"""The soft null-space projector P = f(C / tau): a steep logistic curve in log(lambda), the same on every device.

A logistic start s = (1 - k)(tau - lambda) / ((1 + k) tau + (1 - k) lambda) with the guard k = 1/8 maps [0, inf) into
(-1, 7/9], and a few odd quintics a s + b s^3 + c s^5 sharpen it towards sign(s); then P = (1 + s) / 2. Each quintic
minimises max |1 - q| on its interval [l, 1], divided so that it stays within [-1, 1]; the next interval starts where it
ends. Here it is evaluated on eigenvalues, which is the faster way on a CPU. Source: performance.md 4.3 and 4.4.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from cl_kernels.ops.null_space import reference

__all__ = ["QUINTICS", "response", "spectral_projector"]

GUARD: Final = 1 / 8
# Quintics (a, b, c) for a number of steps, from l = 0.3, 0.3, 0.2, 0.05, 0.015. The largest lambda y(lambda)^2 is 0.39,
# 0.58, 0.75, 0.92, 0.98 of tau: a soft edge never lets more energy through than the hard cut at tau.
QUINTICS: Final[dict[int, tuple[tuple[float, float, float], ...]]] = {
    1: ((3.137222078028, -5.362951699083, 3.225729621054),),
    2: (
        (3.137222078028, -5.362951699083, 3.225729621054),
        (2.090701141805, -1.720220165629, 0.629519023824),
    ),
    3: (
        (3.474334218801, -7.131071178557, 4.656736959755),
        (2.336512348473, -2.358967529624, 1.022455181152),
        (1.887734672687, -1.275599413192, 0.387864740505),
    ),
    4: (
        (4.056282250150, -11.023781555912, 7.967499305762),
        (3.469142532223, -7.101285212648, 4.632142680425),
        (2.331373186890, -2.344403449729, 1.013030262839),
        (1.887345807733, -1.274813851607, 0.387468043874),
    ),
    5: (
        (4.197280691980, -12.143295859794, 8.946015167814),
        (4.004151195380, -10.628082523395, 7.623931328015),
        (3.302011230605, -6.185846107779, 3.883834877174),
        (2.191095037965, -1.967134353557, 0.776039315592),
        (1.879434828232, -1.258885404578, 0.379450576347),
    ),
}


def response(ratio: Tensor, steps: int) -> Tensor:
    """f(lambda / tau) in [0, 1], for ratios >= 0."""
    s = (1 - GUARD) * (1 - ratio) / ((1 + GUARD) + (1 - GUARD) * ratio)
    for a, b, c in QUINTICS[steps]:
        square = s * s
        s = s * (a + square * (b + square * c))
    return ((1 + s) / 2).clamp(0, 1)  # the coefficients have 12 digits


def spectral_projector(cov: Tensor, tau: Tensor, steps: int) -> Tensor:
    """V f(L / tau) V^T from a float64 eigen-decomposition; eigenvalues below 0 count as 0."""
    if not bool(((tau > 0) & torch.isfinite(tau)).all()):
        raise ValueError(f"tau: expected finite numbers > 0, got {tau.flatten()[:8].tolist()}")
    values, vectors = reference.symmetric_eigh(cov.double())
    gains = response(values.clamp_min(0) / tau.to(values)[..., None], steps)
    gains = torch.where((values == 0).all(-1, keepdim=True), 1.0, gains)  # no data: exactly free, not to 2e-7
    with torch.autocast(cov.device.type, enabled=False):
        full = (vectors * gains[..., None, :]) @ vectors.mT
    return ((full + full.mT) / 2).to(cov.dtype)
