"""The log-odds filter: P = f(C / tau) from one Cholesky factorisation and three symmetric products a step.

(I + C/tau)^-1 is a logistic curve of log(lambda), so what happens around tau depends on the ratio lambda/tau alone and
not on the dynamic range; `spectral.QUINTICS` sharpen it. No eigensolver, no host synchronisation: whatever goes wrong
is written into a status, bit by bit, and a matrix with a status other than 0 never becomes the identity.
Here it is in plain torch; `kernels.py` replaces the products. Source: performance.md 4.3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from cl_kernels.ops._precision import float32_products_are_exact
from cl_kernels.ops.null_space.reference import ASYMMETRY
from cl_kernels.ops.null_space.spectral import GUARD, QUINTICS

__all__ = ["REASONS", "Filter", "Start", "finish", "log_odds_filter", "product", "sharpen", "start"]

#: Bits of a status. 2 and 4 are found by Cholesky factorisations, the others by looking at numbers.
NOT_FINITE, NOT_POSITIVE, INDEFINITE, TOO_WIDE, BLOWN_UP, ASYMMETRIC = 1, 2, 4, 8, 16, 32
REASONS: Final = {
    NOT_FINITE: "the matrix is not finite, or tau is not a finite number > 0",
    NOT_POSITIVE: "I + C/tau is not positive definite",
    INDEFINITE: "an eigenvalue lies below -tau/7",
    TOO_WIDE: "trace/tau is too large for the rounding of the matrix",
    BLOWN_UP: "entries of the projector exceed 1",
    ASYMMETRIC: "the matrix is not symmetric",
}
#: Largest trace/tau: above it the rounding errors of C itself reach the guard (measured; performance.md 4.5).
WIDEST: Final = {torch.float64: 1e10, torch.float32: 1e7}
LARGEST_ENTRY: Final = 1.001  # of a projector; a blow-up gives 1e4 and more

T = TypeVar("T")
#: product(a, b, alpha, beta, addend, gamma) = alpha a b + beta addend + gamma I, exactly symmetric.
Product = Callable[[T, T, float, float, "T | None", float], T]
#: (cov, tau, steps, previous, check_psd) -> (projector, status): the signature of the operation.
Filter = Callable[[Tensor, Tensor, int, "Tensor | None", bool], tuple[Tensor, Tensor]]


class Start(NamedTuple):
    """s(C / tau) with eigenvalues in (-1, 7/9] in float64, which matrices are all zero, and the status so far."""

    s: Tensor
    zero: Tensor
    status: Tensor


def log_odds_filter(
    cov: Tensor, tau: Tensor, steps: int, previous: Tensor | None, check_psd: bool
) -> tuple[Tensor, Tensor]:
    """P [..., d, d] in float32 and a status [...] in int32; the recipe of performance.md 4.4."""
    size = cov.shape[-1]
    flat = cov.reshape(cov.shape[:-2].numel(), size, size)
    if not flat.numel():
        return cov.new_empty(cov.shape, dtype=torch.float32), cov.new_zeros(cov.shape[:-2], dtype=torch.int32)
    dtype = torch.float32 if float32_products_are_exact(cov.device) else torch.float64
    with torch.autocast(cov.device.type, enabled=False):
        begun = start(flat, tau.reshape(-1), check_psd)
        projector = product(*sharpen(begun.s.to(dtype), steps, product), 0.5, 0.0, None, 0.5).float()
        projector, status = finish(projector, begun, None if previous is None else previous.reshape(flat.shape))
    return projector.reshape(cov.shape), status.reshape(cov.shape[:-2])


def start(cov: Tensor, tau: Tensor, check_psd: bool) -> Start:
    """Lines 1 to 8: s = 2 ((1 + k) I + B)^-1 - I with B = (1 - k) C / tau. `cov` is [L, d, d], `tau` [L]."""
    double, tau = cov.double(), tau.double()
    largest = double.abs().amax((1, 2))
    skew = (double - double.mT).abs().amax((1, 2))
    zero = largest == 0
    bad = ~torch.isfinite(largest) | (~zero & ~((tau > 0) & torch.isfinite(tau)))
    status = torch.where(bad, NOT_FINITE, 0)
    status |= torch.where(~bad & (skew > ASYMMETRY * largest), ASYMMETRIC, 0)
    usable = ~zero & (status == 0)
    diagonal = double.diagonal(dim1=1, dim2=2) / torch.where(usable, tau, 1.0)[:, None]
    status |= torch.where(usable & (diagonal.sum(1) > WIDEST[cov.dtype]), TOO_WIDE, 0)
    usable &= status == 0
    scaled = torch.where(usable[:, None, None], double / torch.where(usable, tau, 1.0)[:, None, None], 0.0)
    scaled = scaled / 2 + scaled.mT / 2  # halves first, so that nothing overflows
    shifts = (1 + GUARD, GUARD) if check_psd else (1 + GUARD,)
    shifted = scaled.mul_(1 - GUARD).repeat(len(shifts), 1, 1).unflatten(0, (len(shifts), -1))
    for part, shift in zip(shifted, shifts, strict=True):
        part.diagonal(dim1=1, dim2=2).add_(shift)
    factors, info = torch.linalg.cholesky_ex(shifted.flatten(0, 1))  # both at once: latency bounds them on a GPU
    for failed, bit in zip(info.unflatten(0, (len(shifts), -1)) != 0, (NOT_POSITIVE, INDEFINITE), strict=False):
        status |= torch.where(failed, bit, 0)
    eye = torch.eye(cov.shape[-1], dtype=torch.float64, device=cov.device)
    half = torch.linalg.solve_triangular(factors[: len(cov)], eye.expand_as(cov), upper=False)
    return Start(2 * (half.mT @ half) - eye, zero, status.to(torch.int32))


def sharpen(s: T, steps: int, multiply: Product[T]) -> tuple[T, T]:
    """Lines 9 to 12 but for the last product: S <- a S + b S^3 + c S^5, three products each. P is (I + S Z) / 2.

    A matrix is whatever `multiply` takes and gives, such as a pair of halves.
    """
    factors = s, s
    for a, b, c in QUINTICS[steps]:
        s = s if factors[0] is factors[1] else multiply(*factors, 1.0, 0.0, None, 0.0)
        square = multiply(s, s, 1.0, 0.0, None, 0.0)
        factors = s, multiply(square, square, c, b, square, a)
    return factors


def product(a: Tensor, b: Tensor, alpha: float, beta: float, addend: Tensor | None, gamma: float) -> Tensor:
    """alpha a b + beta addend + gamma I for commuting symmetric matrices, symmetric to the last bit."""
    full = alpha * (a @ b) if addend is None else torch.baddbmm(addend, a, b, alpha=alpha, beta=beta)
    result = (full + full.mT) / 2
    if gamma:
        result.diagonal(dim1=1, dim2=2).add_(gamma)
    return result


def finish(projector: Tensor, begun: Start, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines 13 to 15: a zero matrix gives I, a failed one `previous` or 0, which blocks the update."""
    blown = ~(projector.abs().amax((1, 2)) <= LARGEST_ENTRY)  # NaN too
    status = begun.status | torch.where(blown & ~begun.zero, BLOWN_UP, 0).to(torch.int32)
    eye = torch.eye(projector.shape[-1], dtype=projector.dtype, device=projector.device)
    projector = torch.where(begun.zero[:, None, None], eye, projector)
    instead = torch.zeros_like(eye) if previous is None else previous.to(projector.dtype)
    return torch.where((status != 0)[:, None, None], instead, projector), status
