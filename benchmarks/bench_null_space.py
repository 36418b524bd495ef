"""Null-space projectors of many layers: ours by eigh and by the log-odds filter, against the official SVD loop.

Five spectra (spectra.py). Outputs are judged by what they do to a covariance: leak (energy let through by a protected
direction, in units of tau; wanted <= 1e-2), |PCP|/tau (wanted <= 1.05), lost (by a free direction; wanted <= 1e-3). The
error column compares hard cuts with the hard cut in float64, where a rotation between two neighbouring eigenvalues at
the cut counts as 1 and means nothing, and filters with V f(lambda/tau) V^T in float64.
The floor is the filter's: nine symmetric products and a Cholesky inverse, 10 d^3 operations a matrix; eigh takes 9.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from cl_kernels.benchmarks import official, spectra
from cl_kernels.benchmarks.harness import Case, Plan, can_compile, main, planned, short
from cl_kernels.benchmarks.options import expect
from torch import Tensor

from cl_kernels import ops
from cl_kernels.ops import Projector, rules
from cl_kernels.ops.null_space import spectral

TABLE = (
    "projectors 12x768 float32, vit-like",
    "projectors 12x768 float32, rank 64",
    "projectors 12x384 float32",
    "projectors 12x4 float32",
    "symmetric_eigh 768 float32",
)
LIMITS = {"leak": 1e-2, "|PCP|/tau": 1.05, "lost": 1e-3}


def filter_in_torch(covs: Tensor, tau: Tensor, steps: int = 3) -> Tensor:
    """The log-odds filter in plain torch operations: float64 Cholesky inverse, full float32 products."""
    eye = torch.eye(covs.shape[-1], dtype=torch.float64, device=covs.device)
    scaled = (1 - spectral.GUARD) * covs.double() / tau[:, None, None]
    factor = torch.linalg.cholesky((1 + spectral.GUARD) * eye + scaled)
    inverse = torch.cholesky_inverse(factor)
    s = ((inverse + inverse.mT) - eye).float()
    one = eye.float()
    for a, b, c in spectral.QUINTICS[steps]:
        second = s @ s
        s = s @ (a * one + b * second + c * (second @ second))
    return (one + s) / 2


def looped(solve: Callable[[Tensor], Tensor], covs: Tensor) -> Callable[[], Tensor]:
    """The dense projector of one layer after the other, as the repositories form it."""

    def call() -> Tensor:
        free = (solve(cov) for cov in covs)
        return torch.stack([basis @ basis.mT for basis in free])

    return call


def dense(output: Projector | Tensor) -> Tensor:
    return output.matrix() if isinstance(output, Projector) else output


def title(count: int, d: int, spectrum: str, dtype: torch.dtype, **_: Any) -> str:
    return f"projectors {count}x{d} {short(dtype)}, {spectrum}, {spectra.SPECTRA[spectrum](d)[1]} protected"


@planned(title)
def projectors(
    count: int,
    d: int,
    spectrum: str = "vit-like",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    brief: bool = False,
    compiled: bool = False,
    slow: bool = False,
) -> Case:
    """Projectors of `count` covariances that share a spectrum and nothing else; `brief` leaves out near repetitions."""
    values, cut = spectra.SPECTRA[spectrum](d)
    threshold = spectra.threshold(values, cut)
    exact = torch.stack([spectra.matrix(values, seed) for seed in range(count)]).to(device)
    covs, tau = exact.to(dtype), torch.full((count,), threshold, dtype=torch.float64, device=device)
    free, rule = d - cut, rules.Rank(cut)

    def batched_eigh() -> Tensor:
        basis = torch.linalg.eigh(covs)[1][..., :free]
        return basis @ basis.mT

    hard: dict[str, Callable[[], Any]] = {
        "ours": lambda: ops.null_space_projector(covs, rule, solver="eigh"),
        "ours, dense": lambda: ops.null_space_projector(covs, rule, solver="eigh").matrix(),
        "official: full SVD loop, dense": looped(lambda cov: official.svd_free_basis(cov, cut), covs),
        "eigh loop, dense": looped(lambda cov: torch.linalg.eigh(cov)[1][:, :free], covs),
        "eigh batched, dense": batched_eigh,
    }
    if device == "cuda":
        for driver in ("gesvd", "gesvda"):
            hard[f"SVD loop by {driver}, dense"] = looped(
                lambda cov, driver=driver: torch.linalg.svd(cov, driver=driver)[0][:, cut:], covs
            )
    soft: dict[str, Callable[[], Any]] = {
        "ours: solver='filter'": lambda: ops.null_space_projector(covs, rules.Threshold(threshold), solver="filter"),
        "ours: solver='filter', rank rule": lambda: ops.null_space_projector(covs, rule, solver="filter"),
        "ours: spectral_projector": lambda: ops.spectral_projector(covs, tau),
        "ours: log_odds_filter": lambda: ops.log_odds_filter(covs, tau).projector,
        "filter in torch operations": lambda: filter_in_torch(covs, tau),
    }
    if brief and device == "cpu":  # where the filter never wins, and takes longest
        soft.pop("ours: log_odds_filter")
        soft.pop("filter in torch operations")
    if brief:
        hard.pop("eigh loop, dense")
        soft.pop("ours: solver='filter'")
        soft.pop("ours: solver='filter', rank rule")
    if compiled and can_compile():
        compiled_filter = torch.compile(filter_in_torch)
        soft["torch.compile of that filter"] = lambda: compiled_filter(covs, tau)
    lambdas, vectors = torch.linalg.eigh(exact)
    wanted = vectors[..., :free] @ vectors[..., :free].mT
    gains = spectral.response(lambdas.clamp_min(0) / threshold, 3)
    smooth = (vectors * gains[..., None, :]) @ vectors.mT
    ends = sorted({0, count - 1})

    def worst(measure: Callable[..., float], *, known: bool = True) -> Callable[[Any], float]:
        eigen = {i: (lambdas[i], vectors[i]) for i in ends}
        return lambda found: max(measure(found[i], exact[i], threshold, *([eigen[i]] if known else ())) for i in ends)

    return Case(
        {**hard, **soft},
        {name: wanted if name in hard else smooth for name in (*hard, *soft)},
        float("inf"),
        flops=10.0 * count * d**3,
        bytes_moved=2.0 * covs.nbytes,
        rate={"cpu": "dgemm" if dtype == torch.float64 else "sgemm"}.get(device, "split3gemm"),
        notes={"largest eigenvalue / tau": float(values[0]) / threshold, "measures": "of the first and last matrix"},
        read=dense,
        measures={
            "leak": worst(spectra.leak),
            "|PCP|/tau": worst(spectra.excess, known=False),
            "lost": worst(spectra.lost),
        },
        limits=LIMITS,
        limited=tuple(name for name in (*hard, *soft) if name.startswith("ours")),
    )


@planned("symmetric_eigh {d} {dtype}")
def verification(d: int, dtype: torch.dtype) -> Case:
    """What the probes and the ladder add to one eigh."""
    cov = spectra.matrix(spectra.SPECTRA["power law"](d)[0]).to(dtype)
    return Case(
        {"ours": lambda: ops.symmetric_eigh(cov)[0], "bare eigh": lambda: torch.linalg.eigh(cov)[0].flip(0)},
        torch.linalg.eigvalsh(cov.double()).flip(0),
        1e-5,
        flops=9.0 * d**3,
        rate="dgemm" if dtype == torch.float64 else "sgemm",
    )


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    expect("null_space", sizes, "layers x d")
    yield projectors(*sizes, dtype=dtype or torch.float32, device=device, brief=True)


def cases(quick: bool) -> Iterable[Plan]:
    if quick:
        yield projectors(2, 48, "power law")
        yield projectors(2, 48, dtype=torch.float64)
        yield verification(64, torch.float32)
        return
    yield projectors(12, 768, brief=True)
    for spectrum in list(spectra.SPECTRA)[1:]:
        yield projectors(12, 768, spectrum, brief=True)
    yield projectors(1, 768)
    yield projectors(2, 768, dtype=torch.float64, brief=True)
    for count, d in ((12, 384), (12, 192), (12, 4)):
        yield projectors(count, d)
    yield projectors(24, 1024, slow=True)
    for dtype in (torch.float32, torch.float64):
        yield verification(384, dtype)
        yield verification(768, dtype)


def cuda_cases(quick: bool) -> Iterable[Plan]:
    """The smallest first; in 12x3072 the official loop alone takes minutes."""
    if quick:
        yield projectors(2, 128, device="cuda")
        return
    yield projectors(12, 384, device="cuda")
    yield projectors(12, 768, device="cuda", compiled=True)
    yield projectors(1, 768, device="cuda")
    for spectrum in list(spectra.SPECTRA)[1:]:
        yield projectors(12, 768, spectrum, device="cuda", brief=True)
    yield projectors(24, 1024, device="cuda")
    yield projectors(12, 3072, device="cuda", slow=True)


if __name__ == "__main__":
    sys.exit(main(__name__))
