"""Batched thin QR of LoRA stacks, forward and with gradients; the extension of a history; the orthogonality penalty.

Against torch.linalg.qr, its two halves, CholeskyQR2 in torch operations, and the penalty as the official LoRAC code
computes it. Conditions 10, 1e4, 1e7, a zero column and a duplicated one. Torch's gradients of the last two are infinite
or as large as rounding makes them: the column `nonfinite` counts entries, no error is asked of it there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from cl_kernels.benchmarks.options import expect
from torch import Tensor

from cl_kernels.ops import extend_basis, orthogonality_penalty, qr

TABLE = (
    "extend_basis",
    "penalty 72 matrices",
    "qr 48x768x16 condition 1e+01",
    "qr 24x768x64 condition 1e+01 forward",
    "qr 96x768x4 condition 1e+07 forward",
)
SHAPES = ((48, 768, 16), (24, 768, 64), (96, 768, 4), (24, 768, 160), (48, 3072, 64), (24, 4096, 160))
KINDS: tuple[float | str, ...] = (10.0, 1e4, 1e7, "zero column", "duplicate column")
Factors = tuple[Tensor, Tensor]


def matrices(shape: tuple[int, int, int], kind: float | str) -> Tensor:
    """float32 on the CPU; singular values spread evenly over the decades."""
    batch, _, n = shape
    a = torch.randn(shape, dtype=torch.float64)
    if isinstance(kind, str):
        a[..., -1] = 0 if kind == "zero column" else a[..., 0]
        return a.float()
    values = torch.logspace(0, -math.log10(kind), n, dtype=torch.float64)
    right = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    return ((torch.linalg.qr(a).Q * values) @ right).float()


def torch_qr(a: Tensor) -> Factors:
    q, r = torch.linalg.qr(a)
    return q, r


def two_halves(a: Tensor) -> Factors:
    reflectors, tau = torch.geqrf(a)
    return torch.linalg.householder_product(reflectors, tau), reflectors[..., : a.shape[-1], :].triu()


def cholesky_qr2(a: Tensor) -> Factors:
    """Gram matrix and Cholesky factor in float64, the rest in float32, twice."""
    q, total = a, None
    for _ in range(2):
        wide = q.double()
        r = torch.linalg.cholesky_ex(wide.mT @ wide).L.mT.to(a.dtype)
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
        total = r if total is None else r @ total
    return q, r if total is None else total


class _Product:
    """Reads factors as their product; keeps Q for the measure beside the error."""

    def __init__(self) -> None:
        self.q = torch.empty(0)

    def __call__(self, output: Factors) -> list[Tensor]:
        self.q, r = (t.double() for t in output)
        return [self.q @ r]

    def orthogonality(self, _: Tensor | Sequence[Tensor]) -> float:
        eye = torch.eye(self.q.shape[-1], dtype=self.q.dtype, device=self.q.device)
        return float((self.q.mT @ self.q - eye).norm(dim=(-2, -1)).max())


def title(shape: tuple[int, int, int], kind: float | str, what: str) -> str:
    return f"qr {'x'.join(map(str, shape))} {kind if isinstance(kind, str) else f'condition {kind:.0e}'} {what}"


@planned(lambda shape, kind, device: title(shape, kind, "forward"))
def forward(shape: tuple[int, int, int], kind: float | str, device: str) -> Case:
    a = matrices(shape, kind).to(device)
    batch, m, n = shape
    product = _Product()
    factorings = {"ours": qr, "linalg.qr": torch_qr, "geqrf + householder_product": two_halves}
    factorings["CholeskyQR2 in torch"] = cholesky_qr2
    return Case(
        {name: lambda f=f: f(a) for name, f in factorings.items()},
        [a.double()],
        {"ours": 2e-6, "linalg.qr": 1e-5, "geqrf + householder_product": 1e-5, "CholeskyQR2 in torch": math.inf},
        flops=batch * (4 * m * n**2 - 4 * n**3 / 3),
        bytes_moved=8.0 * batch * m * n,
        read=product,
        measures={"orthogonality": product.orthogonality},
        limits={"orthogonality": 6e-7 * n},
    )


@planned(lambda shape, kind, device: title(shape, kind, "forward + backward"))
def with_gradient(shape: tuple[int, int, int], kind: float | str, device: str) -> Case:
    """Loss <gQ, Q> + <gR, R>; where LAPACK's signs differ from ours, its gQ and gR do too, and gA is the same."""
    a = matrices(shape, kind).to(device).requires_grad_()
    batch, m, n = shape
    gq, gr = torch.randn(shape, device=device), torch.randn(batch, n, n, device=device)
    with torch.no_grad():
        signs = torch.where(torch.linalg.qr(a).R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    theirs = (gq * signs[..., None, :], gr * signs[..., :, None])

    def step(factor: Callable[[Tensor], Factors], grads: Factors) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(tuple(factor(a)), a, grads)[0]

    variants = {
        "ours": step(qr, (gq, gr)),
        "linalg.qr": step(torch_qr, theirs),
        "CholeskyQR2 in torch": step(cholesky_qr2, (gq, gr)),
    }  # geqrf has no derivative
    regular = isinstance(kind, float)
    expected = a.detach()
    if regular:
        wide = a.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(tuple(qr(wide)), wide, (gq.double(), gr.double()))
    tolerance = dict.fromkeys(variants, math.inf)
    if isinstance(kind, float) and kind <= 1e5:  # float32 rounds at 1e7: with four columns the rank counts as deficient
        tolerance["ours"] = 2e-6 + 2e-8 * kind
    return Case(
        variants,
        expected,
        tolerance,
        flops=batch * (9 * m * n**2 - 4 * n**3 / 3),
        bytes_moved=20.0 * batch * m * n,
        yardsticks=() if regular else tuple(variants)[1:],  # there is no right gradient to agree with
        measures={"nonfinite": lambda out: float((~torch.isfinite(torch.as_tensor(out))).sum())},
        limits={"nonfinite": 0.0},
    )


@planned("extend_basis 24x768x(144 + 16)")
def extension(device: str) -> Case:
    """The tenth task of rank 16 for 24 matrices: nine old ones are orthonormal already."""
    old = torch.linalg.qr(torch.randn(24, 768, 144, dtype=torch.float64)).Q.float().to(device)
    new = torch.randn(24, 768, 16, device=device)

    def whole() -> Tensor:
        q = torch.linalg.qr(torch.cat([old, new], -1)).Q[..., 144:]
        return q @ q.mT

    def projected() -> Tensor:
        w = new - old @ (old.mT @ new)
        q = torch.linalg.qr(w - old @ (old.mT @ w)).Q
        return q @ q.mT

    wide = torch.linalg.qr(torch.cat([old, new], -1).double()).Q[..., 144:]
    return Case(
        {
            "ours": lambda: (lambda q: q @ q.mT)(extend_basis(old, new).q),
            "linalg.qr of all": whole,
            "two projections, linalg.qr": projected,
        },
        wide @ wide.mT,
        1e-5,
        flops=24.0 * (8 * 768 * 144 * 16 + 4 * 768 * 16**2),
        bytes_moved=4.0 * 24 * 768 * (2 * 144 + 2 * 16),
    )


@planned(lambda tasks, rank, device: f"penalty 72 matrices, rank {rank}, task {tasks + 1}")
def penalty(tasks: int, rank: int, device: str) -> Case:
    """60 matrices 768 x r and 12 of 3072 x r, the penalty and its gradient."""
    sizes = ((60, 768), (12, 3072))
    olds = [torch.randn(count, m, tasks * rank, device=device) * (m**-0.5) for count, m in sizes]
    news = [torch.randn(count, m, rank, device=device).requires_grad_() for count, m in sizes]
    pasts = [orthogonality_penalty(old).square() for old in olds]
    separate = [
        [(old[i].contiguous(), new[i].detach().clone().requires_grad_()) for i in range(len(old))]
        for old, new in zip(olds, news, strict=True)
    ]

    def ours(cached: bool) -> list[Tensor]:
        given = pasts if cached else [None, None]
        total = sum(orthogonality_penalty(n, o, past=p).sum() for n, o, p in zip(news, olds, given, strict=True))
        return [torch.as_tensor(total).detach(), *torch.autograd.grad(torch.as_tensor(total), news)]

    def officially() -> list[Tensor]:
        total = official.lorac_penalty(pair for group in separate for pair in group)
        grads = torch.autograd.grad(total, [new for group in separate for _, new in group])
        return [total.detach(), torch.stack(grads[:60]), torch.stack(grads[60:])]

    work = sum(count * m * rank * (4 * tasks * rank + 4 * rank) for count, m in sizes)
    return Case(
        {"ours": lambda: ours(True), "ours, past computed": lambda: ours(False), "official loop": officially},
        officially(),
        1e-4,
        flops=float(work),
        bytes_moved=4.0 * sum(count * m * (tasks + 3) * rank for count, m in sizes),
    )


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    """float32, as the room's cases are."""
    expect("orthogonal_qr", sizes, "batch x m x n")
    batch, m, n = sizes
    yield forward((batch, m, n), 10.0, device)
    yield with_gradient((batch, m, n), 10.0, device)


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    if quick:
        yield forward((6, 768, 16), 10.0, device)
        yield forward((6, 768, 4), "zero column", device)
        yield with_gradient((6, 768, 16), 10.0, device)
        yield with_gradient((6, 300, 8), "duplicate column", device)
        yield penalty(1, 4, device)
        return
    yield extension(device)
    yield penalty(9, 16, device)
    for shape in SHAPES:
        for kind in KINDS:
            yield forward(shape, kind, device)
            yield with_gradient(shape, kind, device)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
