"""The verified eigensolver: LAPACK or cuSOLVER through `torch.linalg.eigh`, never believed without a check.

Eigensolvers fail on repeated eigenvalues and zero matrices, and some return vectors that are not orthonormal without a
word (pytorch#94772, #105359, #192483). So each result is probed, and what does not hold is solved again one rung lower:
float32 on the device (float32 input only), float64 on the device, float64 on the CPU, and there with 1e-12 jitter.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SolverError, SubspaceMismatchError
from cl_kernels.ops._precision import float32_products_are_exact

__all__ = ["ASYMMETRY", "checked", "probes", "symmetric_eigh", "warn_once"]

LOGGER: Final = logging.getLogger("cl_kernels.ops.null_space")
ASYMMETRY: Final = 1e-4  # of the largest entry; TF32 products stay below 1e-5
JITTER: Final = 1e-12
PROBES: Final = 16
BATCHED_DIM: Final = 64  # smaller matrices go together; LAPACK and most of cuSOLVER loop over larger ones anyway
# Largest entry of (V^T V - I) Z and of (C V - V L) Z / max |L| for normal Z, at d = 64; rounding grows like sqrt(d).
# eigh leaves at most 4e-6 and 7e-15 at d = 64, 2e-5 and 3e-14 at d = 1536. One wrong entry of twice the tolerance
# passes all 16 probes with probability 2e-7.
TOLERANCE: Final = {torch.float32: 1e-5, torch.float64: 1e-11}


class _Rung(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    jitter: float = 0.0

    def __str__(self) -> str:
        added = f" with {self.jitter:.0e} jitter" if self.jitter else ""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}{added}"


def symmetric_eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order and eigenvectors (columns), the largest-magnitude entry of each positive."""
    size = cov.shape[-1]
    flat = cov.reshape(cov.shape[:-2].numel(), size, size)
    values, rows = flat.new_zeros(flat.shape[:2]), flat.new_empty(flat.shape)  # one eigenvector a row, as LAPACK does
    if flat.numel():
        with torch.autocast(cov.device.type, enabled=False):
            scaled, scale = _prepared(flat)
            _solve(scaled, scale == 0, values, rows)
            values.mul_(scale[:, None])
    return values.reshape(cov.shape[:-1]), rows.reshape(cov.shape).mT


def checked(flat: Tensor) -> Tensor:
    """[L, d, d], finite and symmetric to rounding, or an error that names the matrix. Returns the symmetric part."""
    largest = _largest(flat)
    if not bool(torch.isfinite(largest).all()):
        bad = (~torch.isfinite(flat)).sum((1, 2))
        at = int(bad.argmax())
        raise NonFiniteError(f"{_entry(flat, at)}: {int(bad[at])} of {flat[at].numel()} entries are NaN or infinite")
    symmetric = flat
    if not torch.equal(flat, flat.mT):
        symmetric = flat / 2 + flat.mT / 2  # halves first, so that nothing overflows
        skew = 2 * (flat - symmetric).abs().amax((1, 2))
        if bool((skew > ASYMMETRY * largest).any()):
            at = int((skew / largest).nan_to_num(0.0).argmax())
            raise SubspaceMismatchError(
                f"{_entry(flat, at)}: expected a symmetric matrix, but entries differ from their mirror by up to "
                f"{float(skew[at]):.3e} (largest entry {float(largest[at]):.3e})"
            )
    return symmetric


def _largest(flat: Tensor) -> Tensor:
    """The largest absolute value of each matrix, without a copy (and not by aminmax, five times slower); NaN stays."""
    return torch.maximum(-flat.amin((1, 2)), flat.amax((1, 2)))


def _prepared(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, symmetrised and divided by the mean of the diagonal."""
    symmetric = checked(flat)
    largest = _largest(symmetric)
    mean = (symmetric.diagonal(dim1=1, dim2=2) / flat.shape[-1]).sum(1)
    scale = torch.where(mean > largest * 1e-6, mean, largest)
    return symmetric / torch.where(scale > 0, scale, 1)[:, None, None], scale


def _entry(flat: Tensor, at: int) -> str:
    return f"cov[{at}]" if flat.shape[0] > 1 else "cov"


def _solve(scaled: Tensor, zero: Tensor, values: Tensor, rows: Tensor) -> None:
    """Fill `values` and `rows`, walking each matrix down the ladder until its result holds."""
    host = scaled.cpu()  # before anything can fail: a broken device gives no copy (pytorch#105359)
    zeros = zero.tolist()
    if any(zeros):
        rows[zero] = torch.eye(scaled.shape[-1], dtype=rows.dtype, device=rows.device)
    pending = [at for at, is_zero in enumerate(zeros) if not is_zero]
    tried: list[str] = []
    for rung in _rungs(scaled):
        if not pending:
            return
        source = host if rung.device.type == "cpu" else scaled
        together = scaled.shape[-1] <= BATCHED_DIM
        groups = [pending] if together else [[index] for index in pending]
        pending, reason = [], None
        for group in groups:
            left, why = _attempt(rung, source, group, values, rows)
            pending, reason = pending + left, why or reason
        LOGGER.debug("symmetric_eigh: %s: %s", rung, reason or "verified")
        if reason:
            tried.append(f"{rung}: {reason}")
            warn_once(f"symmetric_eigh: {rung} did not hold ({reason}); going down the ladder")
    if pending:
        raise SolverError(_report(host[pending[0]].double(), tried))


def _rungs(scaled: Tensor) -> list[_Rung]:
    cpu = torch.device("cpu")
    rungs = [_Rung(torch.float32, scaled.device)] if scaled.dtype == torch.float32 else []
    rungs.append(_Rung(torch.float64, scaled.device))
    if scaled.device != cpu:
        rungs.append(_Rung(torch.float64, cpu))
    return [*rungs, _Rung(torch.float64, cpu, JITTER)]


def _attempt(
    rung: _Rung, source: Tensor, group: list[int], values: Tensor, rows: Tensor
) -> tuple[list[int], str | None]:
    """Solve some matrices on one rung. Returns those that are left, and why."""
    matrices = source[_where(group)].to(rung.device, rung.dtype)
    jittered = matrices
    if rung.jitter:
        shift = rung.jitter * matrices.norm(dim=(1, 2))[:, None]
        jittered = matrices + torch.diag_embed(shift.expand(matrices.shape[:2]))
    try:
        found, basis = torch.linalg.eigh(jittered)
    except RuntimeError as error:  # torch.linalg.LinAlgError, and cuSOLVER's own
        if len(group) == 1:
            return group, str(error).partition("\n")[0]
        alone = [_attempt(rung, source, [index], values, rows) for index in group]
        return [index for left, _ in alone for index in left], next((why for _, why in alone if why), None)
    found = found - shift if rung.jitter else found
    fine, reason = _verified(matrices, found, basis, TOLERANCE[rung.dtype])
    good = [index for index, holds in zip(group, fine, strict=True) if holds]
    if good:
        held = slice(None) if len(good) == len(group) else torch.tensor(fine, device=found.device)
        values[_where(good)] = found[held].flip(1).to(values)
        rows[_where(good)] = _signed(basis[held].mT).flip(1).to(rows)
    return [index for index, holds in zip(group, fine, strict=True) if not holds], reason


def _where(indices: list[int]) -> slice | list[int]:
    """A run of neighbours as a slice, which is a view and copies nothing."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _verified(matrices: Tensor, values: Tensor, basis: Tensor, tolerance: float) -> tuple[list[bool], str | None]:
    """Which are eigen-decompositions, by 16 random probes: O(d^2) a matrix where the full check takes O(d^3)."""
    tolerance *= math.sqrt(max(matrices.shape[-1], 64) / 64)
    dtype = matrices.dtype if float32_products_are_exact(matrices.device) else torch.float64
    noise = probes(matrices.shape[-1]).mT.to(matrices.device, dtype)
    rows, spectrum = (
        basis.mT.to(dtype),
        values.to(dtype),
    )  # V^T lies row by row: products from the left are twice as quick
    image = noise @ rows
    skew = (image @ rows.mT - noise).abs().amax((1, 2))
    residual = image @ matrices.to(dtype) - (spectrum[:, None] * noise) @ rows
    wrong = residual.abs().amax((1, 2)) / spectrum.abs().amax(1)
    fine = (skew <= tolerance) & (wrong <= tolerance)  # NaN is not
    if bool(fine.all()):
        return fine.tolist(), None
    at = int(fine.int().argmin())
    if not skew[at] <= tolerance:
        return fine.tolist(), f"the eigenvectors are not orthonormal (error {skew[at]:.1e} > {tolerance:.0e})"
    return fine.tolist(), f"the residual C V - V L is {wrong[at]:.1e} > {tolerance:.0e} of the largest eigenvalue"


@functools.lru_cache(maxsize=8)
def probes(size: int) -> Tensor:
    return torch.randn(size, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _signed(rows: Tensor) -> Tensor:
    """Make the largest-magnitude entry of each row positive, so that files of two runs compare."""
    negative = -rows.amin(-1, keepdim=True) > rows.amax(-1, keepdim=True)  # a tenth of the time of an argmax
    return torch.where(negative, -rows, rows)


@functools.cache  # once per process and reason
def warn_once(message: str) -> None:
    LOGGER.warning(message)


def _report(matrix: Tensor, tried: list[str]) -> str:
    diagonal = matrix.diagonal().abs()
    condition = float(diagonal.max() / diagonal.min())
    text = f"no rung of the ladder solved cov ({'; '.join(tried)}); its condition is at least {condition:.1e}"
    folder = os.environ.get("CL_KERNELS_DUMP")
    if not folder:
        return f"{text}; set CL_KERNELS_DUMP to a folder to keep the matrix"
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="symmetric_eigh-", suffix=".safetensors", dir=folder)
    os.close(handle)
    save_file({"scaled": matrix.contiguous()}, path)
    return f"{text}; the matrix, scaled, is in {path}"
