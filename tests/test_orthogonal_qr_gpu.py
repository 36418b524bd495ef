"""The CUDA kernels of the QR room against the reference; runs on a machine with a GPU (`pytest -m gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import relative
from torch import Tensor

from cl_kernels.ops import extend_basis, polar, qr, use_backend
from cl_kernels.ops.orthogonal_qr import cuda, reference

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (9, 4), (768, 4), (768, 16), (257, 17), (768, 33), (768, 64), (160, 160), (3072, 64)]
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def conditioned(m: int, n: int, kappa: float, batch: int = 3) -> Tensor:
    left = torch.linalg.qr(torch.randn(batch, m, n, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(kappa, dtype=torch.float64)).item(), n, dtype=torch.float64)
    return (left * values) @ right


def check(a: Tensor, q: Tensor, r: Tensor) -> None:
    q64, r64, a64 = (t.detach().cpu().double() for t in (q, r, a))
    n, u = a.shape[-1], EPS[a.dtype]
    assert (q64.mT @ q64 - torch.eye(n, dtype=torch.float64)).norm(dim=(-2, -1)).max() <= 10 * u * n
    residual = (a64 - q64 @ r64).norm(dim=(-2, -1))
    assert (residual <= (2e-6 if a.dtype == torch.float32 else 1e-14) * a64.norm(dim=(-2, -1))).all()
    assert torch.equal(r64, r64.triu())
    assert (r64.diagonal(dim1=-2, dim2=-1) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [10.0, 1e4, 1e7])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_table_of_tolerances(m, n, kappa, dtype):
    a = conditioned(m, n, kappa).to(dtype).cuda()
    with use_backend("native"):
        check(a, *qr(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 16, 40])
def test_deficient_and_poisoned_matrices(n, dtype):
    a = torch.randn(5, 100, n, dtype=dtype, device="cuda")
    a[0, :, 3], a[1], a[2, :, n // 2], a[3, 1, 1] = a[0, :, 1], 0, 0, float("nan")
    x = a.clone().requires_grad_()
    q, r = qr(x)
    good = [0, 1, 2, 4]
    check(a[good], q[good], r[good])
    assert q[3].isnan().all()
    assert torch.equal(qr(a[4]).q, q[4])
    assert torch.ops.cl_kernels.qr(a)[3].tolist() == [1, 1, 1, 2, 0]
    q[good].cumsum(-1).sum().backward()
    assert x.grad is not None
    assert x.grad[good].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", ["both", "q", "r"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_backward(m, n, wanted, dtype):
    q, r, solve, _ = reference.qr(torch.randn(3, m, n, dtype=dtype))
    gq = torch.randn(n, m, dtype=dtype).mT.expand(3, m, n) if wanted != "r" else None
    gr = torch.randn(3, n, n, dtype=dtype) if wanted != "q" else None
    on: list[Any] = [None if t is None else t.cuda() for t in (gq, gr, q, r, solve)]
    assert relative(cuda.qr_backward(*on).cpu(), reference.qr_backward(gq, gr, q, r, solve)) <= 20 * EPS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_room_against_the_cpu(dtype):
    a, p = torch.randn(3, 200, 12, dtype=dtype), torch.linalg.qr(torch.randn(3, 200, 40, dtype=dtype)).Q
    a[1, :, 4] = a[1, :, 2]
    results = []
    for device in ("cpu", "cuda"):
        x = a.to(device).requires_grad_()
        e = extend_basis(p.to(device), x)
        loss = (e.q * torch.linspace(-1, 1, e.q.numel(), device=device, dtype=dtype).view_as(e.q)).sum()
        loss = loss + e.r.square().sum() + polar(x[::2]).cumsum(-1).sum()
        (grad,) = torch.autograd.grad(loss, x)
        results.append([t.detach().cpu() for t in (e.q, e.coefficients, e.r, e.kept.to(dtype), grad)])
    for ours, wanted in zip(*results, strict=True):
        assert relative(ours, wanted) <= 1e4 * EPS[dtype]


def test_strided_views_side_streams_and_graphs():
    a = torch.randn(4, 16, 300, device="cuda").mT
    expected = qr(a.contiguous()).q
    assert torch.equal(qr(a).q, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(a)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would read the zeros
        late.copy_(a)
        q = qr(late).q
    stream.synchronize()
    assert torch.equal(q, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = qr(late)
    late.mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.q, expected)


def test_nothing_waits_for_the_device():
    a = torch.randn(48, 768, 16, device="cuda", requires_grad=True)
    qr(a).q.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        q, r = qr(a)
        (q.sum() + r.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
