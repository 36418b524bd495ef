"""The projected Adam step's competitors: one state, and every way of stepping it that torch offers.

Not a benchmark itself: bench_projection.py and bench_optim.py share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cl_kernels.benchmarks import official
from torch import Tensor, nn
from torch.optim.adam import adam

from cl_kernels.ops import Projector, projected_adam_step_, use_backend
from cl_kernels.ops.projection import side_of, step_

__all__ = ["State", "Step", "basis", "competitors", "expected"]

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
FULL = -1  # as a rank: a dense projector, d x d
Step = Callable[[], list[Tensor]]


@dataclass
class State:
    """Parameters with everything one step needs. A rank of FULL makes a dense projector."""

    shapes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    left_rank: int = 0
    device: str = "cpu"
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    left: list[Projector | None] = field(default_factory=list)
    right: list[Projector | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        on = {"device": self.device}
        self.params = [torch.randn(s, **on) * 0.05 for s in self.shapes]
        self.grads = [torch.randn(s, **on) for s in self.shapes]
        self.first = [torch.randn(s, **on) * 0.1 for s in self.shapes]
        self.second = [torch.rand(s, **on) * 0.1 for s in self.shapes]
        self.steps = [torch.tensor(9.0, **on) for _ in self.shapes]
        self.left = [projector(s[-2], self.left_rank, self.device) if self.left_rank else None for s in self.shapes]
        self.right = [projector(s[-1], r, self.device) for s, r in zip(self.shapes, self.ranks, strict=True)]

    @property
    def equal(self) -> bool:
        """Whether all parameters can be stacked."""
        return len(set(self.shapes)) == len(set(self.ranks)) == 1

    def work(self) -> tuple[float, float]:
        """FLOP of the products, bytes of one pass."""
        flops = bytes_moved = 0.0
        for shape, rank in zip(self.shapes, self.ranks, strict=True):
            rows, columns = shape[-2:]
            flops += rows * columns * (4 * self.left_rank + (2 * columns if rank == FULL else 4 * rank))
            bytes_moved += 28 * rows * columns + 4 * columns * (columns if rank == FULL else rank)
        return flops, bytes_moved


def basis(d: int, r: int, device: str = "cpu") -> Tensor:
    """Column-major, as LAPACK returns it and as the optimizers keep it."""
    return torch.linalg.qr(torch.randn(d, min(d, r), device=device))[0].mT.contiguous().mT


def projector(d: int, r: int, device: str = "cpu") -> Projector:
    if r != FULL:
        return Projector(basis(d, r, device))
    half = basis(d, d // 2, device)
    return Projector.from_dense(half @ half.mT)


def ours(s: State) -> Step:
    sides = [(side_of("left", a), side_of("right", b)) for a, b in zip(s.left, s.right, strict=True)]

    def step() -> list[Tensor]:
        step_(
            s.params, s.grads, s.first, s.second, s.steps, sides, lr=LR, max_exp_avg_sqs=[], beta1=BETA1, beta2=BETA2,
            eps=EPS, weight_decay=0.0, decoupled_weight_decay=False, maximize=False, grad_scale=None, found_inf=None,
            project_decay=True,
        )  # fmt: skip
        return s.params

    return step


def directions(s: State) -> list[Tensor]:
    """The complete Adam updates in foreach operations, as torch and the official optimizer make them."""
    torch._foreach_add_(s.steps, 1.0)
    torch._foreach_lerp_(s.first, s.grads, 1 - BETA1)
    torch._foreach_mul_(s.second, BETA2)
    torch._foreach_addcmul_(s.second, s.grads, s.grads, 1 - BETA2)
    counts = [float(step) for step in s.steps]
    roots = torch._foreach_sqrt(s.second)
    torch._foreach_div_(roots, [(1 - BETA2**count) ** 0.5 for count in counts])
    torch._foreach_add_(roots, EPS)
    updates = torch._foreach_div(s.first, roots)
    torch._foreach_mul_(updates, [-LR / (1 - BETA1**count) for count in counts])
    return list(updates)


def official_loop(s: State) -> Step:
    """The released NSP2 optimizer's way: foreach Adam, then dense factors parameter by parameter."""
    left = [None if p is None else p.matrix() for p in s.left]
    right = [None if p is None else p.matrix() for p in s.right]

    def step() -> list[Tensor]:
        official.nsp2_apply(s.params, directions(s), left, right)
        return s.params

    return step


def thin_loop(s: State) -> Step:
    """Thin factors parameter by parameter."""

    def step() -> list[Tensor]:
        for p, u, a, b in zip(s.params, directions(s), s.left, s.right, strict=True):
            u = u if a is None else u - a.basis @ (a.basis.mT @ u)
            p.add_(u if b is None else u @ b.dense if b.dense is not None else u - (u @ b.basis) @ b.basis.mT)
        return s.params

    return step


def fused_directions(s: State) -> Callable[[], list[Tensor]]:
    """The complete Adam updates in one fused pass: torch's fused Adam on parameters that are zero."""
    updates = [torch.zeros_like(p) for p in s.params]

    def make() -> list[Tensor]:
        torch._foreach_zero_(updates)
        adam(
            updates, s.grads, s.first, s.second, [], s.steps, fused=True, foreach=False, amsgrad=False, beta1=BETA1,
            beta2=BETA2, lr=LR, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip
        return updates

    return make


def fused_loop(s: State) -> Step:
    """The fused updates, then thin factors parameter by parameter, added in place: fewer passes than `thin loop`."""
    make = fused_directions(s)

    def step() -> list[Tensor]:
        for p, u, a, b in zip(s.params, make(), s.left, s.right, strict=True):
            u = u if a is None else torch.addmm(u, a.basis, a.basis.mT @ u, alpha=-1)
            if b is None:
                p.add_(u)
            elif b.dense is not None:
                p.addmm_(u, b.dense)
            else:
                p.add_(u).addmm_(u @ b.basis, b.basis.mT, alpha=-1)
        return s.params

    return step


def stacked(s: State, *, fused: bool, dense: bool = False) -> Step:
    """All layers in one batched product, thin unless `dense`; needs equal shapes and ranks."""
    p = torch.stack(s.params)
    s.params = list(p.unbind())
    dense = dense or s.ranks[0] == FULL
    right = torch.stack([x.matrix() if dense else x.basis for x in s.right if x is not None])
    left = torch.stack([x.matrix() for x in s.left if x is not None]) if s.left_rank else None
    make = fused_directions(s) if fused else lambda: directions(s)

    def step() -> list[Tensor]:
        u = torch.stack(make())
        u = u if left is None else left @ u
        if dense:
            p.baddbmm_(u, right)
        else:
            p.add_(u).baddbmm_(u @ right, right.mT, alpha=-1)
        return s.params

    return step


def compiled(s: State) -> Step:
    """Stacked state, one compiled function."""
    p, g, m, v = (torch.stack(x) for x in (s.params, s.grads, s.first, s.second))
    dense = s.ranks[0] == FULL
    right = torch.stack([x.matrix() if dense else x.basis for x in s.right if x is not None])
    left = torch.stack([x.matrix() for x in s.left if x is not None]) if s.left_rank else None
    count = torch.tensor(9.0, device=s.device)

    @torch.compile(dynamic=False)
    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, count: Tensor) -> None:
        count.add_(1)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        u = -LR / (1 - BETA1**count) * m / (v.sqrt() / (1 - BETA2**count).sqrt() + EPS)
        u = u if left is None else left @ u
        p.add_(u @ right if dense else u - (u @ right) @ right.mT)

    def call() -> list[Tensor]:
        step(p, g, m, v, count)
        return list(p.unbind())

    return call


def adamw(s: State, **options: Any) -> Step:
    """No projection at all: what a step costs anyway."""
    params = [nn.Parameter(p.clone()) for p in s.params]
    for p, g in zip(params, s.grads, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **options)
    values = [p.detach() for p in params]

    def step() -> list[Tensor]:
        optimizer.step()
        return values

    return step


def competitors(s: State, *, compile_too: bool, loops: bool = True) -> dict[str, Callable[[State], Step]]:
    """By name, how to make each variant from a state of its own. `loops` off leaves out the slowest."""
    found: dict[str, Callable[[State], Step]] = {"ours": ours}
    if loops:
        found |= {"official loop": official_loop, "thin loop": thin_loop}
    found["thin loop, fused Adam"] = fused_loop
    if s.equal and len(s.shapes) > 1:
        found["stacked bmm"] = lambda s: stacked(s, fused=False, dense=True)
        found["stacked thin"] = lambda s: stacked(s, fused=False)
        found["stacked thin, fused Adam"] = lambda s: stacked(s, fused=True)
        if compile_too:
            found["stacked thin, compiled"] = compiled
    found["AdamW foreach, no projection"] = lambda s: adamw(s, foreach=True)
    found["AdamW fused, no projection"] = lambda s: adamw(s, fused=True)
    return found


def expected(s: State) -> list[Tensor]:
    exact: list[list[Tensor]] = [[t.double() for t in ts] for ts in (s.params, s.grads, s.first, s.second)]
    sides = [[None if p is None else p.to(torch.float64) for p in ps] for ps in (s.left, s.right)]
    with use_backend("reference"):
        projected_adam_step_(
            *exact, [t.clone() for t in s.steps], *sides, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=0.0,
            decoupled_weight_decay=False,
        )  # fmt: skip
    return exact[0]
