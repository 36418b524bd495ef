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

__all__ = ["symmetric_eigh"]

LOGGER: Final = logging.getLogger("cl_kernels.ops.null_space")
ASYMMETRY: Final = 1e-4  # of the largest entry; TF32 products stay below 1e-5
JITTER: Final = 1e-12
PROBES: Final = 16
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
    values, vectors = flat.new_zeros(flat.shape[:2]), flat.new_empty(flat.shape)
    if flat.numel():
        with torch.autocast(cov.device.type, enabled=False):
            scaled, scale = _prepared(flat)
            _solve(scaled, values, vectors)
            values.mul_(scale[:, None].to(values.dtype))
    return values.reshape(cov.shape[:-1]), vectors.reshape(cov.shape)


def _prepared(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, symmetrised (halves first, so that nothing overflows) and divided by the mean of the diagonal."""
    bad = (~torch.isfinite(flat)).sum((1, 2))
    if bool(bad.any()):
        at = int(bad.argmax())
        where = f"cov[{at}]" if flat.shape[0] > 1 else "cov"
        raise NonFiniteError(f"{where}: {int(bad[at])} of {flat[at].numel()} entries are NaN or infinite")
    largest = flat.abs().amax((1, 2))
    skew = (flat / 2 - flat.mT / 2).abs().amax((1, 2)) * 2
    if bool((skew > ASYMMETRY * largest).any()):
        at = int((skew / largest).nan_to_num(0.0).argmax())
        where = f"cov[{at}]" if flat.shape[0] > 1 else "cov"
        raise SubspaceMismatchError(
            f"{where}: expected a symmetric matrix, but entries differ from their mirror by up to "
            f"{float(skew[at]):.3e} (largest entry {float(largest[at]):.3e})"
        )
    symmetric = flat / 2 + flat.mT / 2
    mean = (symmetric.diagonal(dim1=1, dim2=2) / flat.shape[-1]).sum(1)
    scale = torch.where(mean > largest * 1e-6, mean, largest)
    return symmetric / torch.where(scale > 0, scale, 1)[:, None, None], scale


def _solve(scaled: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Fill `values` and `vectors`, walking each matrix down the ladder until its result holds."""
    host = scaled.to("cpu", torch.float64)  # before anything can fail: a broken device gives no copy (pytorch#105359)
    zero = (scaled == 0).all(-1).all(-1)
    vectors[zero] = torch.eye(scaled.shape[-1], dtype=vectors.dtype, device=vectors.device)
    pending = torch.nonzero(~zero).flatten().tolist()
    tried: list[str] = []
    for rung in _rungs(scaled):
        if not pending:
            return
        source = host if rung.device.type == "cpu" else scaled
        pending, reason = _attempt(rung, source, pending, values, vectors)
        LOGGER.debug("symmetric_eigh: %s: %s", rung, reason or "verified")
        if reason:
            tried.append(f"{rung}: {reason}")
            _warn_once(f"symmetric_eigh: {rung} did not hold ({reason}); going down the ladder")
    if pending:
        raise SolverError(_report(host[pending[0]], tried))


def _rungs(scaled: Tensor) -> list[_Rung]:
    cpu = torch.device("cpu")
    rungs = [_Rung(torch.float32, scaled.device)] if scaled.dtype == torch.float32 else []
    rungs.append(_Rung(torch.float64, scaled.device))
    if scaled.device != cpu:
        rungs.append(_Rung(torch.float64, cpu))
    return [*rungs, _Rung(torch.float64, cpu, JITTER)]


def _attempt(
    rung: _Rung, source: Tensor, pending: list[int], values: Tensor, vectors: Tensor
) -> tuple[list[int], str | None]:
    """Solve the pending matrices on one rung. Returns those that are left, and why."""
    left, reason = [], None
    for index in pending:  # one by one: LAPACK and most of cuSOLVER loop as well, and one failure spoils no other
        matrix = source[index].to(rung.device, rung.dtype)
        shift = rung.jitter * float(matrix.norm())
        try:
            found, basis = torch.linalg.eigh(matrix + shift * torch.eye(matrix.shape[0]) if shift else matrix)
            failure = _defect(matrix, found - shift, basis, TOLERANCE[rung.dtype])
        except RuntimeError as error:  # torch.linalg.LinAlgError, and cuSOLVER's own
            failure = str(error).partition("\n")[0]
        if failure:
            left.append(index)
            reason = failure
        else:
            values[index] = (found - shift).flip(0).to(values)
            vectors[index] = _signed(basis.flip(1)).to(vectors)
    return left, reason


def _defect(matrix: Tensor, values: Tensor, basis: Tensor, tolerance: float) -> str | None:
    """Why this is no eigen-decomposition, by 16 random probes: O(d^2) where the full check would take O(d^3)."""
    tolerance *= math.sqrt(max(matrix.shape[0], 64) / 64)
    probes = _probes(matrix.shape[0]).to(matrix.device)
    wide, vectors = matrix.double(), basis.double()
    image = vectors @ probes
    skew = float((vectors.mT @ image - probes).abs().max())
    if not skew <= tolerance:
        return f"the eigenvectors are not orthonormal (error {skew:.1e} > {tolerance:.0e})"
    residual = wide @ image - vectors @ (values.double()[:, None] * probes)
    wrong = float(residual.abs().max() / values.double().abs().max())
    return None if wrong <= tolerance else f"the residual C V - V L is {wrong:.1e} > {tolerance:.0e} of the largest"


@functools.lru_cache(maxsize=8)
def _probes(size: int) -> Tensor:
    return torch.randn(size, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _signed(vectors: Tensor) -> Tensor:
    """Make the largest-magnitude entry of each column positive, so that files of two runs compare."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


@functools.cache  # once per process and reason
def _warn_once(message: str) -> None:
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
