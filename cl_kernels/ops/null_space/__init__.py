"""Null spaces: spectrum of a second moment -> rank rule -> projector `a I - b V V^T`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops import _checks, _registry
from cl_kernels.ops._projector import Projector
from cl_kernels.ops.null_space import cuda, hard, log_odds, reference, soft, spectral
from cl_kernels.ops.rules import Rule

__all__ = ["Filtered", "log_odds_filter", "null_space_projector", "spectral_projector", "symmetric_eigh"]

SHARPNESS = {"hard": 3, "soft": 2}


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
    basis: bool = True,
) -> Projector:
    """The projector onto the directions of `cov` [..., d, d] that `rule` leaves free, blended with the identity.

        B = mix * U0 U0^T / s + (1 - mix) * I,   s = sqrt(number of free directions) if normalize == "fro", else 1

    U0 holds the free eigenvectors, and `rule` (of `clk.rules`) says how many leading ones are protected. The result
    keeps the thinner of the two bases: `a I - b V V^T` with V protected, a = mix/s + 1 - mix, b = mix/s, or with
    V = U0, a = 1 - mix, b = -mix/s. In a batch each matrix chooses for itself; thinner ones are padded with zero
    columns, and `identity` and `span` are tensors of the batch shape. Eigenvalues below 0 count as 0.

    `solver="filter"` puts P = f(cov / tau) of `spectral_projector` in the place of U0 U0^T and |P|_F in that of s. Its
    edge is soft, so the result is dense (`Projector.from_dense`) and has no basis. tau meets the rule: `Rank` through
    trace P, to half a direction, `Energy` through <P, cov>, to 2 % of the energy left free, the ratios and `Threshold`
    directly, and any other rule by the place of its cut. A rank that no threshold reaches is reported by a warning,
    such as one beyond the rank of `cov`. "eigh" is `symmetric_eigh`. "auto" is "eigh", and "filter" on CUDA if
    `basis=False` says that only the projector is needed, whatever its form: a hard edge never turns soft unasked.

    Nothing free: the first term is 0, so B = (1 - mix) I, and with mix = 1 updates are frozen; a warning says so. An
    all-zero `cov` protects nothing, whatever the rule, with a warning.

    `normalize="fro"` is what NSP2 (Alg. 2, Eq. 29) and the Adam-NSCL code do: it scales white updates by 1/sqrt(d),
    whatever is free, so it acts as a smaller learning rate. With "eigh" a float32 `cov` is solved in float32, which
    protects well while the largest eigenvalue is below 3e5 times the cut; float64 and "filter" have no such limit.
    Raises as `symmetric_eigh`, and `ValueError` for `mix` outside [0, 1], unknown names, or what the rule refuses.
    Cost of "eigh" (and of "filter" on a CPU): one eigen-decomposition a matrix, waiting for the device. Of "filter" on
    CUDA: one to eleven evaluations of `log_odds_filter` for all matrices together, each read from the device once.
    """
    share = _checks.number("mix", mix, 0.0, 1.0)
    if normalize not in (None, "fro"):
        raise ValueError(f"normalize: expected None or 'fro', got {normalize!r}")
    if solver not in ("auto", "eigh", "filter"):
        raise ValueError(f"solver: expected 'auto', 'eigh' or 'filter', got {solver!r}")
    if not callable(getattr(rule, "protected", None)):
        raise TypeError(f"rule: expected a rule of clk.rules, such as Energy(0.95), got {type(rule).__name__}")
    _checks.floating("cov", cov, torch.float32, torch.float64)
    _checks.square("cov", cov)
    size = cov.shape[-1]
    if size == 0:
        raise ValueError(f"cov: expected at least one direction, got shape {tuple(cov.shape)}")
    if solver == "filter" or (solver == "auto" and not basis and cov.is_cuda):
        flat = cov.detach().reshape(-1, size, size)
        if not len(flat):
            return Projector.from_dense(cov.detach().clone())
        dense = soft.soft_projector(flat, rule, SHARPNESS["hard"], share, normalize, _FILTER if cov.is_cuda else None)
        return Projector.from_dense(dense.to(cov.dtype).reshape(cov.shape))
    values, vectors = symmetric_eigh(cov)
    return hard.hard_projector(values, vectors, rule, share, normalize)


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

    On a CPU f is taken of float64 eigenvalues, which is the faster way there. On CUDA it is `log_odds_filter`, right to
    2e-6 in the 2-norm, and what that reports as failed is solved again by float64 eigh (a WARNING of the logger
    "cl_kernels.ops.null_space" says so, once). In a captured CUDA graph nothing can be solved again: a matrix that
    fails there gives 0, which blocks the update.

    Raises as `symmetric_eigh`, and `ValueError` unless tau > 0 is finite. Cost: a float64 eigen-decomposition and one
    product of d^3 operations a matrix; on CUDA that of `log_odds_filter`. Reads the device once.
    """
    steps, taus = _steps(sharpness), _taus(cov, tau)
    projector: Tensor = _SPECTRAL(cov.detach(), taus, steps)
    return projector


class Filtered(NamedTuple):
    """A soft projector [..., d, d] in float32, and how it went [...]: 0, or the sum of what failed."""

    projector: Tensor
    status: Tensor


def log_odds_filter(
    cov: Tensor,
    tau: Tensor | float,
    *,
    sharpness: Literal["hard", "soft"] | int = "hard",
    previous: Tensor | None = None,
    check_psd: bool = True,
) -> Filtered:
    """`spectral_projector` without an eigensolver and without waiting for the device, so that a CUDA graph can hold it.

    One float64 Cholesky factorisation gives s = (7/8)(tau - C) / ((9/8) tau + (7/8) C), and each step sharpens it by
    the quintic a s + b s^3 + c s^5, three symmetric products; P = (1 + s) / 2. Right to 2e-6 in the 2-norm; a
    protected direction leaks 1e-9 tau where lambda/tau is 1e4, and 1e-4 tau at the limits below.

    The status of a matrix is 0, or a sum of: 1 the matrix or tau is not finite, or tau is not > 0; 2 and 4 an
    eigenvalue lies below -9/7 tau or -tau/7 (4 only with `check_psd`, for a second factorisation); 8 trace/tau is above
    1e10 (1e7 for a float32 `cov`), where rounding errors of C itself count; 16 an entry of P exceeds 1; 32 C is not
    symmetric. A matrix that failed gives its `previous` projector, or 0, which blocks the update; never the identity.
    A zero matrix gives the identity, whatever tau is. Not differentiable.

    Raises `ValueError` for shapes and dtypes only. Cost: 3.3 d^3 operations in float64 for factorisation and inverse,
    d^3/3 more with `check_psd`, and 2 d^3 a product (half of that by the Triton kernel).
    """
    steps, taus = _steps(sharpness), _taus(cov, tau)
    if previous is not None:
        _checks.floating("previous", previous)
        _checks.same_device("previous", previous, "cov", cov)
        if previous.shape != cov.shape:
            raise ValueError(f"previous: expected shape {tuple(cov.shape)}, got {tuple(previous.shape)}")
        previous = previous.detach()
    return Filtered(*_FILTER(cov.detach(), taus, steps, previous, check_psd))


def _steps(sharpness: str | int) -> int:
    steps = SHARPNESS.get(sharpness, sharpness) if isinstance(sharpness, str) else sharpness
    if isinstance(steps, bool) or not isinstance(steps, int) or steps not in spectral.QUINTICS:
        raise ValueError(f"sharpness: expected 'hard', 'soft' or a number of steps from 1 to 5, got {sharpness!r}")
    return steps


def _taus(cov: Tensor, tau: Tensor | float) -> Tensor:
    """Checks both; tau with the batch shape."""
    _checks.floating("cov", cov, torch.float32, torch.float64)
    _checks.square("cov", cov)
    if not isinstance(tau, Tensor):
        tau = cov.new_full(cov.shape[:-2], _checks.number("tau", tau), dtype=torch.float64)
    _checks.floating("tau", tau)
    _checks.same_device("tau", tau, "cov", cov)
    if tau.shape not in (torch.Size(()), cov.shape[:-2]):
        raise ValueError(f"tau: expected shape {tuple(cov.shape[:-2])} or a number, got {tuple(tau.shape)}")
    return tau.detach().expand(cov.shape[:-2])


def _fake_eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    return cov.new_empty(cov.shape[:-1]), cov.new_empty(cov.shape).mT


def _fake_spectral(cov: Tensor, tau: Tensor, steps: int) -> Tensor:
    return cov.new_empty(cov.shape)


def _fake_filter(
    cov: Tensor, tau: Tensor, steps: int, previous: Tensor | None, check_psd: bool
) -> tuple[Tensor, Tensor]:
    return cov.new_empty(cov.shape, dtype=torch.float32), cov.new_empty(cov.shape[:-2], dtype=torch.int32)


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
    triton=cuda.spectral_projector,
)
_FILTER = _registry.define(
    "log_odds_filter",
    "(Tensor cov, Tensor tau, int steps, Tensor? previous, bool check_psd) -> (Tensor projector, Tensor status)",
    reference=log_odds.log_odds_filter,
    fake=_fake_filter,
    triton=cuda.log_odds_filter,
)
