"""The distillation loss, forward and backward: (1 - alpha) CE of one head and alpha T^2 KL of another, alpha 0.5, T 2.

Against eager torch (softmax, log_softmax, kl_div, cross_entropy, autograd), the same through torch.compile where a
compiler is found, the official way (kl_div of both sides divided by T with size_average=False, over the batch, T^2
outside; plain eager operations too), and Liger's kl_div on a GPU where the package is installed. Floors: three reads
of logits and two writes of gradients at the rate of a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from cl_kernels.benchmarks import official, peers
from cl_kernels.benchmarks.harness import Case, Plan, can_compile, main, planned
from cl_kernels.benchmarks.options import expect
from torch import Tensor

from cl_kernels.ops import distillation_loss, dkd_loss, kl_loss, linear_kl_loss

TABLE = ("two heads 64x20 float32", "two heads 256x100 float32", "two heads 256x1000", "two heads 512x32000 float32")
TABLE += ("decoupled 256x1000 float32", "linear heads 2048x64")
ALPHA, T = 0.5, 2.0
SHAPES = ((64, 20), (256, 100), (256, 1000), (64, 21843), (512, 32000))
CUDA_SHAPES = ((64, 20), (256, 100), (256, 1000), (1024, 21841), (8192, 32000))
DTYPES = (torch.float32, torch.bfloat16)
Heads = tuple[Tensor, Tensor, Tensor, Tensor]


def heads(rows: int, columns: int, dtype: torch.dtype, device: str) -> Heads:
    z, s, t = (2 * torch.randn(rows, columns, device=device) for _ in range(3))
    y = torch.randint(0, columns, (rows,), device=device)
    return z.to(dtype).requires_grad_(), s.to(dtype).requires_grad_(), t.to(dtype), y


def eager(z: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    log_s, log_t = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    soft = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2
    return (1 - ALPHA) * F.cross_entropy(z, y) + ALPHA * soft


def officially(z: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return official.distillation(z, s, t, y, alpha=ALPHA, temperature=T)


def ours(z: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return distillation_loss(z, s, t, y, alpha=ALPHA, temperature=T)


def with_liger(z: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    kl = peers.liger_kl()
    if kl is None:
        raise RuntimeError("liger_kernel is not installed")
    soft = kl(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), "batchmean", True)
    return (1 - ALPHA) * F.cross_entropy(z, y) + ALPHA * T**2 * soft


def step(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], given: Heads) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        value = loss(*given)
        return [value.detach(), *torch.autograd.grad(value, given[:2])]

    return call


@planned("two heads {rows}x{columns} {dtype}")
def two_heads(rows: int, columns: int, dtype: torch.dtype, device: str, compiles: bool) -> Case:
    given = heads(rows, columns, dtype, device)
    forms = {"ours": ours, "eager torch": eager, "official": officially}
    if compiles and can_compile():
        forms["torch.compile"] = torch.compile(eager)
    if device == "cuda" and peers.liger_kl():
        forms["Liger kl_div"] = with_liger
    short = dtype != torch.float32
    many = rows * columns > 1 << 24  # a float64 copy of everything would not fit beside it
    wide = given if many else tuple(x.detach().double().requires_grad_(x.requires_grad) for x in given[:3])
    expected = step(eager, (*wide[:3], given[3]))()
    elements, size = rows * columns, given[0].element_size()
    return Case(
        {name: step(form, given) for name, form in forms.items()},
        expected,
        {
            name: (0.05 if short else 1e-5) if name != "ours" else (0.03 if many else 5e-3) if short else 2e-6
            for name in forms
        },
        bytes_moved=5.0 * elements * size,
    )


@planned("decoupled {rows}x{columns} float32")
def decoupled(rows: int, columns: int, device: str) -> Case:
    """DKD and its gradient."""
    _, s, t, y = heads(rows, columns, torch.float32, device)

    def gradients(loss: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
        value = loss(at)
        return [value.detach(), *torch.autograd.grad(value, at)]

    exact = s.detach().double().requires_grad_()
    return Case(
        {
            "ours": lambda: gradients(lambda x: dkd_loss(x, t, y), s),
            "official": lambda: gradients(lambda x: official.dkd(x, t, y), s),
        },
        gradients(lambda x: dkd_loss(x, t.double(), y), exact),
        {"ours": 2e-6, "official": 1e-3},
        bytes_moved=12.0 * rows * columns,
    )


@planned("linear heads {rows}x{width} -> {columns} float32")
def linear(rows: int, width: int, columns: int, device: str) -> Case:
    """The KL of two linear heads with the gradients of features and weight: what the logits of all rows cost."""
    x, t = (torch.randn(rows, width, device=device) for _ in range(2))
    w, v = (torch.randn(columns, width, device=device) * width**-0.5 for _ in range(2))
    inputs = (x.requires_grad_(), w.requires_grad_())

    def whole(x: Tensor, w: Tensor, t: Tensor = t, v: Tensor = v) -> Tensor:
        log_s, log_t = F.log_softmax(F.linear(x, w) / T, -1), F.log_softmax(F.linear(t, v) / T, -1)
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2

    def step(
        loss: Callable[[Tensor, Tensor], Tensor], at: tuple[Tensor, Tensor] = inputs
    ) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            value = loss(*at)
            return [value.detach(), *torch.autograd.grad(value, at)]

        return call

    wide = (x.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    exact = step(lambda x, w: whole(x, w, t.double(), v.double()), wide)()
    variants = {
        "ours": step(lambda x, w: linear_kl_loss(x, w, t, v, temperature=T)),
        "kl_loss of whole logits": step(lambda x, w: kl_loss(F.linear(x, w), F.linear(t, v), temperature=T)),
        "eager torch": step(whole),
    }
    return Case(
        variants,
        exact,
        1e-4,
        flops=8.0 * rows * width * columns,
    )


@planned("kl {rows}x{columns} float32 forward")
def single(rows: int, columns: int, device: str) -> Case:
    """The KL alone, without a gradient: what a validation step computes."""
    _, s, t, _ = heads(rows, columns, torch.float32, device)
    s = s.detach()

    def torchs(s: Tensor, t: Tensor) -> Tensor:
        log_s, log_t = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2

    return Case(
        {"ours": lambda: kl_loss(s, t, temperature=T), "eager torch": lambda: torchs(s, t)},
        torchs(s.double(), t.double()),
        1e-5,
        bytes_moved=8.0 * rows * columns,
    )


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    expect("distillation", sizes, "rows x classes")
    yield two_heads(*sizes, dtype or torch.float32, device, True)


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    if quick:
        for dtype in DTYPES:
            yield two_heads(16, 50, dtype, device, False)
        yield decoupled(16, 50, device)
        yield single(16, 50, device)
        yield linear(16, 8, 50, device)
        return
    for rows, columns in CUDA_SHAPES if device == "cuda" else SHAPES:
        for dtype in DTYPES:
            yield two_heads(rows, columns, dtype, device, True)
    yield decoupled(256, 100, device)
    yield decoupled(256, 1000, device)
    yield single(256, 1000, device)
    yield linear(2048, 64, 16384, device)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
