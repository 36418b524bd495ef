"""What a threshold search measures, and the projectors at the end of it: from eigenvalues, or from products alone.

On a CPU one eigen-decomposition answers everything. On a GPU, where eigensolvers are bound by latency, the filter
itself is the instrument, and the two ends of the spectrum come from repeated squaring.
"""

from __future__ import annotations

import functools
import operator
from typing import Final

import torch
from torch import Tensor

from cl_kernels.ops._precision import float32_products_are_exact
from cl_kernels.ops.null_space import log_odds, notes, reference, spectral
from cl_kernels.ops.null_space.log_odds import Filter

__all__ = ["Products", "Spectrum", "recomputed"]

SQUARINGS: Final = 10  # the power 1024: a Rayleigh quotient is then below lambda_1 by ln(d)/2048 at the most, usually 0


class Spectrum:
    """Measures of a batch [L, d, d] from a verified float64 eigen-decomposition."""

    def __init__(self, cov: Tensor, steps: int) -> None:
        self.size, self.dtype, self.steps = cov.shape[-1], cov.dtype, steps
        signed, self.vectors = reference.symmetric_eigh(cov.double())
        self.indefinite = signed[:, -1] < -notes.INDEFINITE * torch.maximum(signed[:, 0], -signed[:, -1])
        self.values = signed.clamp_min(0)
        self.trace = self.values.sum(1)
        self._share = self.values / torch.where(self.trace > 0, self.trace, 1.0)[:, None]

    def count(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        gains = self._gains(tau)
        return gains.sum(1), (gains * (1 - gains)).sum(1)

    def energy(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        gains = self._gains(tau)
        passed = gains * self._share
        return passed.sum(1), (passed * (1 - gains)).sum(1)

    def largest(self) -> Tensor:
        return self.values[:, 0]

    def smallest(self) -> Tensor:
        return self.values[:, -1]

    def spectrum(self) -> Tensor:
        return self.values

    def projector(self, tau: Tensor) -> Tensor:
        gains = torch.where(self.values[:, :1] == 0, 1.0, self._gains(tau))  # no data: exactly free
        with torch.autocast(self.vectors.device.type, enabled=False):
            full = (self.vectors * gains[:, None, :]) @ self.vectors.mT
        return (full + full.mT) / 2

    def _gains(self, tau: Tensor) -> Tensor:
        return spectral.response(self.values / tau[:, None], self.steps)


class Products:
    """Measures of a batch [L, d, d] from the log-odds filter; nothing here asks an eigensolver but `spectrum`."""

    def __init__(self, cov: Tensor, steps: int, apply: Filter) -> None:
        self.size, self.dtype, self.steps, self.cov, self.apply = cov.shape[-1], cov.dtype, steps, cov, apply
        self.trace = cov.diagonal(dim1=1, dim2=2).double().sum(1)
        self.indefinite = ~(self.trace > 0) & (cov.abs().amax((1, 2)) > 0)
        self._scaled = self._double().to(_working(cov.device))

    def count(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        projector = self._at(tau)
        count = projector.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        return count, count - projector.square().sum((1, 2), dtype=torch.float64)

    def energy(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        projector = self._at(tau)
        passed = (projector * self._scaled).sum((1, 2), dtype=torch.float64)
        with torch.autocast(projector.device.type, enabled=False):
            twice = projector.to(self._scaled) @ self._scaled
        return passed, passed - (projector * twice).sum((1, 2), dtype=torch.float64)

    def largest(self) -> Tensor:
        return torch.where(self.trace > 0, _top(self._double()) * self.trace, 0.0)

    def smallest(self) -> Tensor:
        """By the same squaring of (C + s I)^-1, with s at the rounding errors of float64."""
        shift = torch.finfo(torch.float64).eps * self.size
        shifted = self._double()
        shifted.diagonal(dim1=1, dim2=2).add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        eye = torch.eye(self.size, dtype=torch.float64, device=self.cov.device)
        half = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        found = 1 / _top(half.mT @ half) - shift
        return torch.where((info == 0) & (found > 0), found * self.trace, 0.0)

    def spectrum(self) -> Tensor:
        """By an eigensolver for values alone; believed if they have the trace and the norm of the matrix."""
        scaled = self._double()
        try:
            values: Tensor = torch.linalg.eigvalsh(scaled)
        except RuntimeError:  # torch.linalg.LinAlgError, and cuSOLVER's own
            values = torch.full_like(scaled[:, 0], torch.nan)
        norm = scaled.square().sum((1, 2))
        wrong = (values.sum(1) - (self.trace > 0).double()).abs() + (values.square().sum(1) - norm).abs()
        if not bool((wrong <= 1e-10 * self.size).all()):
            values = reference.symmetric_eigh(scaled)[0].flip(1)
        return values.flip(1).clamp_min(0) * self.trace[:, None]

    def projector(self, tau: Tensor) -> Tensor:
        found, status = self.apply(self.cov, tau, self.steps, None, True)
        self.indefinite |= (status & (log_odds.INDEFINITE | log_odds.NOT_POSITIVE)) != 0
        return recomputed(found, status, self.cov, tau, self.steps)

    def _double(self) -> Tensor:
        """C / trace C in float64."""
        return self.cov.double() / torch.where(self.trace > 0, self.trace, 1.0)[:, None, None]

    def _at(self, tau: Tensor) -> Tensor:
        return self.apply(self.cov, tau, self.steps, None, False)[0]


def recomputed(projector: Tensor, status: Tensor, cov: Tensor, tau: Tensor, steps: int) -> Tensor:
    """`projector` [L, d, d], with what the filter could not do solved again by verified float64 eigh.

    Raises what that raises, such as `NonFiniteError`. Reads the status from the device, once.
    """
    failed = {at: code for at, code in enumerate(status.tolist()) if code}
    if not failed:
        return projector
    reference.checked(cov)  # all of them, so that an error names the right one
    bits = functools.reduce(operator.or_, failed.values())
    reasons = "; ".join(reason for bit, reason in log_odds.REASONS.items() if bits & bit)
    reference.warn_once(f"log_odds_filter: {len(failed)} of {len(cov)} matrices are solved by eigh instead ({reasons})")
    which = torch.tensor(list(failed), device=cov.device)
    again = spectral.spectral_projector(cov[which], tau[which], steps)
    return projector.index_copy(0, which, again.to(projector.dtype))


def _top(matrix: Tensor) -> Tensor:
    """The largest eigenvalue of positive semi-definite float64 matrices [L, d, d], without an eigensolver."""
    power = (matrix / _trace(matrix)).to(_working(matrix.device))
    with torch.autocast(matrix.device.type, enabled=False):
        for _ in range(SQUARINGS):
            power = power @ power
            power = power / _trace(power)
        vectors = power.double() @ reference.probes(matrix.shape[-1]).to(matrix.device)
        found = (vectors * (matrix @ vectors)).sum(1) / vectors.square().sum(1)
    return found.amax(1)


def _trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    return torch.where(trace > 0, trace, 1.0)[:, None, None]


def _working(device: torch.device) -> torch.dtype:
    return torch.float32 if float32_products_are_exact(device) else torch.float64
