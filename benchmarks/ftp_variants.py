"""Trainable projection's competitors: one state of a whole model, and every way of stepping it that torch offers.

Not a benchmark itself: bench_weight_projection.py uses it. The official loop is written anew from the recurrence. All
variants of a case step the same tensors in place, because five copies of ViT-L do not fit a usual machine; the first
call of each begins from the same values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cl_kernels.benchmarks.official_ftp import (
    BETA1,
    BETA2,
    EPS,
    FLOOR,
    MOMENTUM,
    RADIUS_BETA1,
    RADIUS_BETA2,
    STEPS,
    Released,
    rows,
)  # fmt: skip
from torch import Tensor, nn
from torch.optim.adam import adam

__all__ = ["State", "Step", "layers", "official", "parameter_list", "rows", "torch_optimizer", "vectorised"]

LR = 5e-7
FAR = 5e-3  # mean distance of an element from its anchor, in rows that are projected
Shape = tuple[int, ...]
Step = Callable[[], list[Tensor]]


def vit(width: int, blocks: int, *, whole: bool = True) -> Iterator[Shape]:
    """Parameters of timm's ViT with patches of 16 and no head, in its order; `whole` off: of the blocks alone."""
    if whole:
        yield from ((1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,))
    for _ in range(blocks):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,))
    if whole:
        yield from ((width,), (width,))


def resnet50() -> Iterator[Shape]:
    """Parameters of timm's ResNet-50 with no head, in its order."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    inner = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            for shape in ((width, inner, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                yield from (shape, shape[:1], shape[:1])
            if block == 0:
                yield from ((4 * width, inner, 1, 1), (4 * width,), (4 * width,))
            inner = 4 * width


# The goal of 28.4 M parameters is stated for four blocks of ViT-B/16: 28,351,488.
_LISTS: dict[str, Callable[[], Iterator[Shape]]] = {
    "4 blocks of ViT-B/16": lambda: vit(768, 4, whole=False),
    "ResNet-50": resnet50,
    "ViT-B/16": lambda: vit(768, 12),
    "ViT-L/16": lambda: vit(1024, 24),
}


def parameter_list(model: str) -> list[Shape]:
    """The shapes of all constrained parameters: the head is trained freely and left out.

    `model`: one of the list, or "3 blocks of width 256".
    """
    if found := re.fullmatch(r"(\d+) blocks of width (\d+)", model):
        return list(vit(int(found[2]), int(found[1]), whole=False))
    return list(_LISTS[model]())


@dataclass
class State:
    """A model in the middle of training. `share` of the elements lie in rows that every step projects.

    Projected rows lie on the ball and are pushed outwards, the others half way in and are pushed inwards. The radii
    stand still (their speed is 0), so the share stays the same for thousands of steps.
    """

    shapes: list[Shape]
    share: float
    device: str = "cpu"
    base: str = "adam"
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)  # what each row of a gradient is scaled by to make W - W_0
    steps: list[Tensor] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)
    resets: list[Callable[[], None]] = field(default_factory=list)  # what variants keep beside

    def __post_init__(self) -> None:
        on: dict[str, Any] = {"device": self.device}
        for shape in self.shapes:
            anchor = (torch.randn(shape, **on) * 0.02).bfloat16().float()  # so that a bf16 copy is exact
            grad = torch.rand(shape, **on).add_(0.5).copysign_(torch.randn(shape, **on))
            g = rows(grad)
            outside = torch.rand(g.shape[0], 1, **on) < self.share
            if g.shape[0] > 1 and 0 < self.share < 1:
                count = round(self.share * g.shape[0])
                outside = torch.arange(g.shape[0], **on).unsqueeze(1) < count
            gamma = FAR * g.shape[1]
            size = torch.linalg.vector_norm(g, 1, dim=1, keepdim=True)
            self.places.append(torch.where(outside, -gamma, gamma / 2) / size)
            self.gammas.append(gamma)
            self.anchors.append(anchor)
            self.grads.append(grad)
            for values in (self.params, self.first, self.second):
                values.append(torch.empty(shape if values is not self.second or self.base == "adam" else (0,), **on))
            self.steps.append(torch.empty((), **on))
        self.reset()

    @property
    def lr(self) -> float:
        """A step moves an element by 5e-7 at most: `share` holds for thousands of them."""
        return LR if self.base == "adam" else LR * (1 - MOMENTUM) / 1.5

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    def reset(self) -> None:
        """Back to the beginning, in place."""
        for p, g, m, v, anchor, place, step in zip(
            self.params, self.grads, self.first, self.second, self.anchors, self.places, self.steps, strict=True
        ):
            torch.addcmul(rows(anchor), rows(g), place, out=rows(p))
            if self.base == "adam":
                m.copy_(g)
                torch.mul(g, g, out=v)
            else:
                torch.mul(g, 1 / (1 - MOMENTUM), out=m)  # where momentum settles
            step.fill_(STEPS)
        for call in self.resets:
            call()

    def moved(self) -> list[Tensor]:
        """W - W_0 in float64: what a step changes is 1e-4 of it, and only 3e-5 of W."""
        return [p.double() - a.double() for p, a in zip(self.params, self.anchors, strict=True)]

    def fresh(self, step: Callable[[], Any]) -> Step:
        """The step; its first call begins from the beginning."""
        begun = False

        def call() -> list[Tensor]:
            nonlocal begun
            if not begun:
                self.reset()
                begun = True
            step()
            return self.params

        return call

    def expected(self) -> list[Tensor]:
        """W - W_0 after one step of the official recurrence in float64, a tensor at a time."""
        self.reset()
        found = []
        for i, shape in enumerate(self.shapes):
            one = State([shape], self.share, "meta", self.base)
            for name in ("params", "grads", "first", "second", "anchors"):
                setattr(one, name, [getattr(self, name)[i].double()])
            one.steps, one.gammas, one.resets = [self.steps[i].double()], self.gammas[i : i + 1], []
            Released(one).step()
            found += one.moved()
        return found


def layers(model: str, share: float, device: str, base: str = "adam") -> State:
    torch.manual_seed(0)
    return State(parameter_list(model), share, device, base)


def official(s: State) -> Step:
    return s.fresh(Released(s).step)


def vectorised(s: State, *, fused: bool, compiled: bool = False) -> Step:
    """The same step without a branch and without the cached displacement: torch's own base step, then row sums and
    scaling tensor by tensor, the radius policy for all tensors at once. What one writes without kernels of one's own.
    """
    gammas = torch.empty(len(s.params), device=s.device)
    a, b = torch.empty_like(gammas), torch.empty_like(gammas)

    def reset() -> None:
        gammas.copy_(torch.tensor(s.gammas))
        a.zero_()
        b.zero_()

    s.resets.append(reset)
    before, after = (torch.compile(f, dynamic=False) if compiled else f for f in (_before, _after))
    step_base = _base(s, fused=fused)

    def step() -> None:
        bounds = gammas.unbind()
        every = zip(s.grads, s.params, s.anchors, bounds, strict=True)
        terms = [before(rows(g), rows(p), rows(w), r) for g, p, w, r in every]
        step_base()
        moved = torch._foreach_sub(s.params, s.anchors)
        norms = [torch.linalg.vector_norm(rows(c), 1, dim=1, keepdim=True) + 1e-8 for c in moved]
        h = torch.stack(terms)
        a.mul_(RADIUS_BETA1).add_(h, alpha=1 - RADIUS_BETA1)
        b.mul_(RADIUS_BETA2).addcmul_(h, h, value=1 - RADIUS_BETA2)
        t = STEPS + 1
        unit = (a / (1 - RADIUS_BETA1**t)) / ((b / (1 - RADIUS_BETA2**t)).sqrt() + 1e-8)
        most = torch.stack([n.max() for n in norms])
        torch.minimum((gammas - 0.0 * unit).clamp_min(FLOOR), most, out=gammas)
        for p, w, c, n, r in zip(s.params, s.anchors, moved, norms, gammas.unbind(), strict=True):
            after(rows(p), rows(w), rows(c), n, r)

    return s.fresh(step)


def _before(g: Tensor, p: Tensor, anchor: Tensor, radius: Tensor) -> Tensor:
    d = p - anchor
    size = torch.linalg.vector_norm(d, 1, dim=1) + 1e-8
    return ((g * d).sum(1) / torch.minimum(size, radius)).sum()


def _after(p: Tensor, anchor: Tensor, c: Tensor, norms: Tensor, radius: Tensor) -> None:
    torch.addcmul(anchor, c, (radius / norms).clamp_max(1.0), out=p)


def _base(s: State, *, fused: bool) -> Callable[[], None]:
    """Torch's Adam or SGD on the state."""

    def step_adam() -> None:
        adam(
            s.params, s.grads, s.first, s.second, [], s.steps, fused=fused, foreach=not fused, amsgrad=False,
            capturable=s.device == "cuda", beta1=BETA1, beta2=BETA2, lr=s.lr, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip

    def step_sgd() -> None:
        torch._foreach_mul_(s.first, MOMENTUM)
        torch._foreach_add_(s.first, s.grads)
        torch._foreach_add_(s.params, torch._foreach_add(s.grads, s.first, alpha=MOMENTUM), alpha=-s.lr)

    return step_adam if s.base == "adam" else step_sgd


def torch_optimizer(s: State, **options: bool) -> Step:
    """torch.optim.AdamW or SGD on the state, without projection: the yardstick."""
    params = [nn.Parameter(p) for p in s.params]  # shares memory
    for p, g in zip(params, s.grads, strict=True):
        p.grad = g
    optimizer: torch.optim.Optimizer
    if s.base == "sgd":
        optimizer = torch.optim.SGD(params, lr=s.lr, momentum=MOMENTUM, nesterov=True, **options)
    else:
        optimizer = torch.optim.AdamW(params, lr=s.lr, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **options)
    for p, m, v, step in zip(params, s.first, s.second, s.steps, strict=True):
        adam_state = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        optimizer.state[p] = {"momentum_buffer": m} if s.base == "sgd" else adam_state
    return s.fresh(optimizer.step)


def total(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
