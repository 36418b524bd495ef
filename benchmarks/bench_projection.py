"""The projected Adam step: prompts of all layers, full weights, whole optimizers; against torch and the official loop.

The floor is the larger of the products' arithmetic and of one pass over weight, gradient and moments.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.ops import Projector, projected_adam_step_, use_backend
from cl_kernels.ops.projection import side_of, step_
from cl_kernels.optim import ProjectedAdamW

if __package__:
    from .harness import Case, can_compile, main
else:
    from harness import Case, can_compile, main

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
# Input ranks at 95 % of the energy of the embedded backbone on the digits, a block a line: qkv, proj, fc1, fc2.
EMBEDDED_RANKS = (7, 16, 8, 26, 10, 13, 13, 32, 16, 19, 19, 58, 20, 14, 22, 71)
EMBEDDED_SHAPES = ((384, 128), (128, 128), (512, 128), (128, 512)) * 4


@dataclass
class State:
    """Parameters with everything one step needs."""

    shapes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    left_rank: int = 0
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    left: list[Projector | None] = field(default_factory=list)
    right: list[Projector | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [torch.randn(s) * 0.05 for s in self.shapes]
        self.grads = [torch.randn(s) for s in self.shapes]
        self.first = [torch.randn(s) * 0.1 for s in self.shapes]
        self.second = [torch.rand(s) * 0.1 for s in self.shapes]
        self.steps = [torch.tensor(9.0) for _ in self.shapes]
        self.left = [Projector(basis(s[-2], self.left_rank)) if self.left_rank else None for s in self.shapes]
        self.right = [Projector(basis(s[-1], r)) for s, r in zip(self.shapes, self.ranks, strict=True)]

    def work(self) -> tuple[float, float]:
        """FLOP of the products, bytes of one pass."""
        flops = bytes_moved = 0.0
        for shape, rank in zip(self.shapes, self.ranks, strict=True):
            rows, columns = shape[-2:]
            flops += 4 * rows * columns * (rank + self.left_rank)
            bytes_moved += 28 * rows * columns + 4 * columns * rank
        return flops, bytes_moved


def basis(d: int, r: int) -> Tensor:
    """Column-major, as LAPACK returns it and as the optimizers keep it."""
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].float().mT.contiguous().mT


def ours(s: State) -> Callable[[], list[Tensor]]:
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


def official(s: State) -> Callable[[], list[Tensor]]:
    """The released NSP2 optimizer's way: foreach Adam, then dense factors parameter by parameter."""
    left = [None if p is None else p.matrix() for p in s.left]
    right = [None if p is None else p.matrix() for p in s.right]

    def step() -> list[Tensor]:
        for p, u, a, b in zip(s.params, directions(s), left, right, strict=True):
            u = u if a is None else a @ u
            p.data.add_(u if b is None else u @ b)
        return s.params

    return step


def thin_loop(s: State) -> Callable[[], list[Tensor]]:
    """Thin factors parameter by parameter."""

    def step() -> list[Tensor]:
        for p, u, a, b in zip(s.params, directions(s), s.left, s.right, strict=True):
            u = u if a is None else u - a.basis @ (a.basis.mT @ u)
            p.add_(u if b is None else u - (u @ b.basis) @ b.basis.mT)
        return s.params

    return step


def stacked(s: State, *, dense: bool) -> Callable[[], list[Tensor]]:
    """All layers in one batched product; needs equal shapes and ranks."""
    right = torch.stack([p.matrix() if dense else p.basis for p in s.right if p is not None])
    left = torch.stack([p.matrix() for p in s.left if p is not None]) if s.left_rank else None

    def step() -> list[Tensor]:
        u = torch.stack(directions(s))
        u = u if left is None else left @ u
        u = u @ right if dense else u - (u @ right) @ right.mT
        torch._foreach_add_(s.params, list(u.unbind()))
        return s.params

    return step


def compiled(s: State) -> Callable[[], list[Tensor]]:
    """Stacked state, thin factors, one compiled function: the most that torch offers here."""
    p, g, m, v = (torch.stack(x) for x in (s.params, s.grads, s.first, s.second))
    right = torch.stack([x.basis for x in s.right if x is not None])
    left = torch.stack([x.matrix() for x in s.left if x is not None]) if s.left_rank else None
    count = torch.tensor(9.0)

    @torch.compile(dynamic=False)
    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, count: Tensor) -> None:
        count.add_(1)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        u = -LR / (1 - BETA1**count) * m / (v.sqrt() / (1 - BETA2**count).sqrt() + EPS)
        u = u if left is None else left @ u
        p.add_(u - (u @ right) @ right.mT)

    def call() -> list[Tensor]:
        step(p, g, m, v, count)
        return list(p.unbind())

    return call


def adamw(s: State, **options: Any) -> Callable[[], list[Tensor]]:
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


def expected(s: State) -> list[Tensor]:
    exact = [[t.double() for t in ts] for ts in (s.params, s.grads, s.first, s.second)]
    sides = [[None if p is None else p.to(torch.float64) for p in ps] for ps in (s.left, s.right)]
    with use_backend("reference"):
        projected_adam_step_(
            *exact, [t.clone() for t in s.steps], *sides, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=0.0,
            decoupled_weight_decay=False,
        )  # fmt: skip
    return exact[0]


def step_case(name: str, s: State, quick: bool) -> Case:
    fresh = lambda: copy.deepcopy(s)  # noqa: E731 - every variant steps its own copy
    variants = {
        "ours": ours(fresh()),
        "official loop": official(fresh()),
        "thin loop": thin_loop(fresh()),
        "AdamW default, no projection": adamw(fresh()),
        "AdamW foreach, no projection": adamw(fresh(), foreach=True),
        "AdamW fused, no projection": adamw(fresh(), fused=True),
    }
    if len(set(s.shapes)) == len(set(s.ranks)) == 1:
        variants |= {"stacked bmm": stacked(fresh(), dense=True), "stacked thin": stacked(fresh(), dense=False)}
        if not quick and can_compile():
            variants["stacked thin, compiled"] = compiled(fresh())
    tolerance = {name: float("inf") if "no projection" in name else 1e-6 for name in variants}
    flops, bytes_moved = s.work()
    return Case(name, variants, expected(s), tolerance, flops=flops, bytes_moved=bytes_moved)


class Embedded(nn.Module):
    """The trained parameters of the embedded model: four blocks of width 128, prompts, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(s) * 0.05 for s in EMBEDDED_SHAPES)
        self.biases = nn.ParameterList(torch.randn(s[0]) for s in EMBEDDED_SHAPES)
        self.norms = nn.ParameterList(torch.randn(128) for _ in range(18))
        self.prompts = nn.ParameterList(torch.randn(1, 4, 128) for _ in range(4))
        self.head = nn.Linear(128, 10)


def optimizer_case() -> Case:
    """Whole optimizers: `ProjectedAdamW.step()` against `torch.optim.AdamW.step()` with default arguments."""
    model = Embedded()
    store: dict[str, Any] = {
        f"weights.{i}": Projector(basis(s[1], r))
        for i, (s, r) in enumerate(zip(EMBEDDED_SHAPES, EMBEDDED_RANKS, strict=True))
    }
    store |= {f"prompts.{i}": (Projector(basis(4, 1)), Projector(basis(128, 10))) for i in range(4)}
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def variant(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[], list[Tensor]]:
        net = copy.deepcopy(model)
        for p, q in zip(net.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        optimizer, values = make(net), [p.detach() for p in net.parameters()]

        def step() -> list[Tensor]:
            optimizer.step()
            return values

        return step

    variants = {
        "ours": variant(lambda net: ProjectedAdamW(net.named_parameters(), subspace=store)),
        "ours, empty subspace": variant(lambda net: ProjectedAdamW(net.named_parameters(), subspace={})),
        "AdamW default": variant(lambda net: torch.optim.AdamW(net.parameters())),
        "AdamW foreach": variant(lambda net: torch.optim.AdamW(net.parameters(), foreach=True)),
        "AdamW fused": variant(lambda net: torch.optim.AdamW(net.parameters(), fused=True)),
    }
    with use_backend("reference"):
        exact = variant(lambda net: ProjectedAdamW(net.named_parameters(), subspace=store))()
    tolerance = {name: 1e-5 if name == "ours" else float("inf") for name in variants}
    notes = {"parameters": sum(p.numel() for p in model.parameters()), "tensors": len(list(model.parameters()))}
    return Case("optimizer step, embedded model", variants, exact, tolerance, notes=notes)


def cases(quick: bool) -> Iterable[Case]:
    prompts = [(12, 4, 768, 64)] if quick else [(12, 4, 768, r) for r in (32, 64, 128, 300)]
    if not quick:
        prompts += [(12, 10, 768, 128), (24, 4, 1024, 64), (12, 100, 768, 300)]
    for layers, m, d, r in prompts:
        state = State(((m, d),) * layers, (r,) * layers, left_rank=1)
        yield step_case(f"prompts {layers} x ({m} x {d}), rank {r}", state, quick)
    yield step_case("full weights, embedded model", State(EMBEDDED_SHAPES, EMBEDDED_RANKS), quick)
    if not quick:
        block = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
        for r in (64, 300):
            yield step_case(f"full weights, one ViT-B block, rank {r}", State(block, (r,) * 4), quick)
    yield optimizer_case()


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
