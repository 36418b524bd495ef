"""Null spaces: spectrum of a second moment -> rank rule -> projector `a I - b V V^T`."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops import _checks, _registry
from cl_kernels.ops._projector import Projector
from cl_kernels.ops.null_space import reference, spectral
from cl_kernels.ops.rules import Rule

__all__ = ["null_space_projector", "spectral_projector", "symmetric_eigh"]

INDEFINITE = 1e-5  # of the largest eigenvalue; float32 sums leave 2e-7, sums rounded to bfloat16 3e-5


def symmetric_eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., d] in descending order and eigenvectors [..., d, d] (columns) of symmetric matrices.

    Each matrix is checked to be finite and symmetric, scaled, solved by `torch.linalg.eigh` and verified (orthogonality
    and residual, by random probes). A result that does not hold is solved again: float32 (float32 input only), float64
    on the device, float64 on the CPU, float64 on the CPU with 1e-12 jitter. Rungs are logged at DEBUG to the logger
    "cl_kernels.ops.null_space", a fall once at WARNING. The largest-magnitude entry of every vector is positive. A zero
    matrix gives zeros and the identity. Results have the dtype of `cov`, float32 or float64. Not differentiable.

    Raises `ValueError` (shape, dtype), `NonFiniteError`, `SubspaceMismatchError` (not symmetric), `SolverError` when
    every rung fails: it names them, and a file with the matrix if the variable CL_KERNELS_DUMP names a folder.
    Cost: that of eigh, about 9 d^3 operations, and 100 d^2 for the check. Waits for the device.
    """
    _checks.floating("cov", cov, torch.float32, torch.float64)
    _checks.square("cov", cov)
    values, vectors = _EIGH(cov.detach())
    return values, vectors


def null_space_projector(
    cov: Tensor,
    rule: Rule,
    *,
    mix: float = 1.0,
    normalize: Literal["fro"] | None = None,
    solver: Literal["auto", "eigh", "filter"] = "auto",
) -> Projector:
    """The projector onto the directions of `cov` [..., d, d] that `rule` leaves free, blended with the identity.

        B = mix * U0 U0^T / s + (1 - mix) * I,   s = sqrt(number of free directions) if normalize == "fro", else 1

    U0 holds the free eigenvectors, and `rule` (of `clk.rules`) says how many leading ones are protected. The result
    keeps the thinner of the two bases: `a I - b V V^T` with V protected, a = mix/s + 1 - mix, b = mix/s, or with
    V = U0, a = 1 - mix, b = -mix/s. In a batch each matrix chooses for itself; thinner ones are padded with zero
    columns, and `identity` and `span` are tensors of the batch shape. Eigenvalues below 0 count as 0.

    Nothing free: the first term is 0, so B = (1 - mix) I, and with mix = 1 updates are frozen; a warning says so. An
    all-zero `cov` protects nothing, whatever the rule, with a warning.

    `normalize="fro"` is what NSP2 (Alg. 2, Eq. 29) and the Adam-NSCL code do: it scales white updates by 1/sqrt(d),
    whatever is free, so it acts as a smaller learning rate. `solver`: "auto" and "eigh" are `symmetric_eigh`. A float32
    `cov` is solved in float32, which protects well while the largest eigenvalue is below 3e5 times the cut; float64 has
    no such limit.
    Raises as `symmetric_eigh`, and `ValueError` for `mix` outside [0, 1], unknown names, or what the rule refuses.
    Cost: one eigen-decomposition a matrix; nothing of size d^2 is kept but a slice of the eigenvectors.
    """
    share = _checks.number("mix", mix, 0.0, 1.0)
    if normalize not in (None, "fro"):
        raise ValueError(f"normalize: expected None or 'fro', got {normalize!r}")
    if solver == "filter":
        raise ValueError("solver: 'filter' is not available in this version; use 'eigh'")
    if solver not in ("auto", "eigh"):
        raise ValueError(f"solver: expected 'auto', 'eigh' or 'filter', got {solver!r}")
    if not callable(getattr(rule, "protected", None)):
        raise TypeError(f"rule: expected a rule of clk.rules, such as Energy(0.95), got {type(rule).__name__}")
    values, vectors = symmetric_eigh(cov)
    size = cov.shape[-1]
    if size == 0:
        raise ValueError(f"cov: expected at least one direction, got shape {tuple(cov.shape)}")
    spectra = values.reshape(-1, size)
    kept = [_Kept.of(_protected(spectrum, rule), size, share, normalize) for spectrum in spectra]
    if any(one.free == 0 for one in kept):
        frozen = "updates are frozen" if share == 1 else f"updates are only scaled by {1 - share:g}"
        warnings.warn(f"null_space_projector: {rule} leaves no direction free: {frozen}", UserWarning, stacklevel=2)
    columns = max((one.columns for one in kept), default=0)
    basis = vectors.new_zeros(len(kept), size, columns)
    for target, one, source in zip(basis, kept, vectors.reshape(-1, size, size), strict=True):
        target[:, : one.columns] = source[:, one.first : one.first + one.columns]
    basis = basis.reshape(*cov.shape[:-1], columns)
    if cov.ndim == 2:
        return Projector(basis, kept[0].identity, kept[0].span)
    scalars = cov.new_tensor([[one.identity, one.span] for one in kept]).reshape(-1, 2).T
    return Projector(basis, scalars[0].reshape(cov.shape[:-2]), scalars[1].reshape(cov.shape[:-2]))


def spectral_projector(
    cov: Tensor, tau: Tensor | float, *, sharpness: Literal["hard", "soft"] | int = "hard"
) -> Tensor:
    """The soft null-space projector P = f(cov / tau): near 1 for eigenvalues below tau, 1/2 at tau, near 0 above.

    `cov` [..., d, d] symmetric, float32 or float64; `tau` a number or a tensor of the batch shape, in the units of
    `cov`. f is a steep curve in log(lambda): between the gains 0.9 and 0.1 lambda grows by the factor 1.35 for "hard"
    (three steps), 2.0 for "soft" (two); an int from 1 to 5 is a number of steps (5: 1.02). lambda f(lambda)^2 never
    exceeds tau, so the soft edge lets through no more energy than a hard cut, and P is continuous in `cov` and `tau`.
    Eigenvalues below 0 count as 0; a zero matrix gives the identity. P has the shape and dtype of `cov` and is
    symmetric to the last bit. Not differentiable.

    Raises as `symmetric_eigh`, and `ValueError` unless tau > 0 is finite. Cost: a float64 eigen-decomposition and one
    product of d^3 operations a matrix. Waits for the device.
    """
    _checks.floating("cov", cov, torch.float32, torch.float64)
    _checks.square("cov", cov)
    steps = {"hard": 3, "soft": 2}.get(sharpness, sharpness) if isinstance(sharpness, str) else sharpness
    if isinstance(steps, bool) or not isinstance(steps, int) or steps not in spectral.QUINTICS:
        raise ValueError(f"sharpness: expected 'hard', 'soft' or a number of steps from 1 to 5, got {sharpness!r}")
    if not isinstance(tau, Tensor):
        tau = cov.new_full(cov.shape[:-2], _checks.number("tau", tau), dtype=torch.float64)
    _checks.floating("tau", tau)
    _checks.same_device("tau", tau, "cov", cov)
    if tau.shape not in (torch.Size(()), cov.shape[:-2]):
        raise ValueError(f"tau: expected shape {tuple(cov.shape[:-2])} or a number, got {tuple(tau.shape)}")
    projector: Tensor = _SPECTRAL(cov.detach(), tau.detach().expand(cov.shape[:-2]), steps)
    return projector


class _Kept(NamedTuple):
    """Which eigenvectors a projector keeps, and its two numbers."""

    free: int
    first: int
    columns: int
    identity: float
    span: float

    @classmethod
    def of(cls, protected: int, size: int, mix: float, normalize: str | None) -> _Kept:
        free = size - protected
        if free == 0:
            return cls(0, size, 0, 1 - mix, -mix)
        scale = mix / math.sqrt(free) if normalize == "fro" else mix
        if protected <= free:
            return cls(free, 0, protected, scale + 1 - mix, scale)
        return cls(free, protected, free, 1 - mix, -scale)


def _protected(spectrum: Tensor, rule: Rule) -> int:
    largest, smallest = float(spectrum[0]), float(spectrum[-1])
    if smallest < -INDEFINITE * max(largest, -smallest):
        warnings.warn(
            f"null_space_projector: cov is not positive semi-definite, its eigenvalues run from {largest:.3e} to "
            f"{smallest:.3e}; those below 0 count as 0. Sums kept in 16 bits do this",
            UserWarning,
            stacklevel=3,
        )
    if largest <= 0:
        warnings.warn("null_space_projector: cov is zero, so every direction is free", UserWarning, stacklevel=3)
        return 0
    count = rule.protected(spectrum.clamp_min(0))
    if not 0 <= count <= spectrum.numel():
        raise ValueError(f"rule: {rule} protects {count} of {spectrum.numel()} directions")
    return count


def _fake_eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    return cov.new_empty(cov.shape[:-1]), cov.new_empty(cov.shape).mT


def _fake_spectral(cov: Tensor, tau: Tensor, steps: int) -> Tensor:
    return cov.new_empty(cov.shape)


_EIGH = _registry.define(
    "symmetric_eigh",
    "(Tensor cov) -> (Tensor values, Tensor vectors)",
    reference=reference.symmetric_eigh,
    fake=_fake_eigh,
)
_SPECTRAL = _registry.define(
    "spectral_projector",
    "(Tensor cov, Tensor tau, int steps) -> Tensor",
    reference=spectral.spectral_projector,
    fake=_fake_spectral,
)
