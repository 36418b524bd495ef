"""Null-space projectors: verified eigh and the thinner basis, against the official SVD loop and a bare eigh.

Every variant solves, cuts and projects the same [16, d] update, so that all are checked by what they do. The spectra
have a gap at the cut; without one, projectors of different solvers differ by rotations that mean nothing.
The floor is 9 d^3 operations a matrix, what tridiagonal reduction with vectors takes, at the rate of torch's product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.ops import rules

if __package__:
    from .harness import Case, main
else:
    from harness import Case, main


def second_moment(d: int, protected: int, seed: int) -> Tensor:
    """Eigenvalues 1/i for the protected directions, then a floor of noise from 1e-4 of the last one downwards."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    values = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    values[protected:] *= 1e-4
    matrix = (basis * values) @ basis.mT
    return (matrix + matrix.mT) / 2


def projectors(count: int, d: int, protected: int, dtype: torch.dtype) -> Case:
    exact_covs = torch.stack([second_moment(d, protected, seed) for seed in range(count)])
    covs = exact_covs.to(dtype)
    update = torch.randn(count, 16, d, dtype=dtype)
    rule = rules.Rank(protected)

    def ours() -> Tensor:
        return ops.null_space_projector(covs, rule).apply(update)

    def looped(solve: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            done = []
            for cov, one in zip(covs, update, strict=True):
                free = solve(cov)
                done.append(one @ (free @ free.mT))  # the dense projector, as the repositories form it
            return torch.stack(done)

        return call

    vectors = torch.linalg.eigh(exact_covs)[1][:, :, : d - protected]
    return Case(
        f"null space {count} x {d}, {protected} protected, {str(dtype).removeprefix('torch.')}",
        {
            "ours": ours,
            "official: full SVD, dense": looped(lambda cov: torch.linalg.svd(cov)[0][:, protected:]),
            "bare eigh, dense": looped(lambda cov: torch.linalg.eigh(cov)[1][:, : d - protected]),
        },
        update.double() @ vectors @ vectors.mT,
        1e-9 if dtype == torch.float64 else 1e-2,
        flops=9.0 * count * d**3,
        rate="dgemm" if dtype == torch.float64 else "sgemm",
    )


def verification(d: int, dtype: torch.dtype) -> Case:
    """What the probes and the ladder add to one eigh."""
    cov = second_moment(d, d // 4, 0).to(dtype)
    expected = torch.linalg.eigvalsh(cov.double()).flip(0)
    return Case(
        f"symmetric_eigh {d} {str(dtype).removeprefix('torch.')}",
        {"ours": lambda: ops.symmetric_eigh(cov)[0], "bare eigh": lambda: torch.linalg.eigh(cov)[0].flip(0)},
        expected,
        1e-5,
        flops=9.0 * d**3,
        rate="dgemm" if dtype == torch.float64 else "sgemm",
    )


def cases(quick: bool) -> Iterable[Case]:
    for dtype in (torch.float32, torch.float64):
        if quick:
            yield projectors(2, 48, 12, dtype)
            yield verification(64, dtype)
        else:
            yield projectors(1, 768, 64, dtype)
            yield projectors(1, 768, 700, dtype)
            yield projectors(12, 192, 32, dtype)
            yield projectors(12, 4, 1, dtype)
            yield verification(384, dtype)
            yield verification(768, dtype)


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
