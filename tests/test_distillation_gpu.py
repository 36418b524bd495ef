"""The CUDA kernel of the distillation losses on a GPU (`pytest -m gpu`): against float64, torch, itself; no waiting."""

from __future__ import annotations

import math

import pytest
import torch
from support import relative
from test_distillation import gold, gradients, heads, laid_out, torch_distillation, torch_kl
from torch import Tensor

from cl_kernels.ops import distillation_loss, dkd_loss, jsd_loss, kl_loss, use_backend

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: rows, columns, first, last: one block, several blocks read 16 bytes at a time, and any other
SHAPES = [
    (1, 1, 0, 1),
    (64, 20, 0, 20),
    (256, 1000, 0, 1000),
    (7, 4096, 8, 4000),
    (5, 21843, 3, 21840),
    (3, 131072, 0, 131072),
]


def on_gpu(rows: int, columns: int, dtype: torch.dtype, scale: float = 2.0) -> list[Tensor]:
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in heads(rows, columns, dtype, scale)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "first", "last"), SHAPES)
def test_noise_floor(rows, columns, first, last, dtype):
    z, s, t, y = on_gpu(rows, columns, dtype)
    y, part = y % (last - first) + first, slice(first, last)
    wide = gold(z, s, t)
    wanted = gradients(torch_distillation(*wide, y, part, 0.3, 3.0), *wide[:2])
    with use_backend("triton"):
        ours = gradients(distillation_loss(z, s, t, y, classes=part, alpha=0.3, temperature=3.0), z, s)
    theirs = gradients(torch_distillation(z, s, t, y, part, 0.3, 3.0), z, s)
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        if columns > 1:
            assert relative(a, c) <= 2 * relative(b, c) + torch.finfo(a.dtype).eps
    for g in ours[1:]:
        assert not g[:, :first].any()
        assert not g[:, last:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "rows of a wider matrix", "every other column", "one row for all"]
)
def test_layouts_and_masks(layout, dtype):
    for columns in (37, 1030, 5000):
        z, s, t = (laid_out(x.cuda(), layout) for x in heads(6, columns, dtype)[:3])
        if layout != "one row for all":
            for x in (z, s, t):
                x[1, : columns // 2], x[2, 3] = -math.inf, -math.inf
        z, s, y = z.requires_grad_(), s.requires_grad_(), torch.full((6,), columns - 1, device="cuda")
        wide = gold(z, s, t)
        with use_backend("reference"):
            wanted = [*gradients(distillation_loss(*wide, y), *wide[:2]), *gradients(dkd_loss(*wide[1:], y), wide[1])]
        with use_backend("triton"):
            ours = [*gradients(distillation_loss(z, s, t, y), z, s), *gradients(dkd_loss(s, t, y), s)]
        for a, b in zip(ours, wanted, strict=True):
            assert relative(a, b) <= 8 * torch.finfo(a.dtype).eps + 2e-6 * (dtype != torch.float64)


def test_the_same_bits_every_time():
    z, s, t, y = on_gpu(1500, 700, torch.float32)
    first = gradients(distillation_loss(z, s, t, y), z, s)
    for _ in range(5):
        assert all(
            torch.equal(a, b) for a, b in zip(first, gradients(distillation_loss(z, s, t, y), z, s), strict=True)
        )
    rows = distillation_loss(z, s, t, y, reduction="none")
    assert torch.allclose(rows.double().mean(), first[0].double(), rtol=1e-6)


def test_wrong_values_make_the_loss_nan_without_waiting():
    z, s, t, y = on_gpu(8, 100, torch.float32)
    y[2] = 100
    loss = distillation_loss(z, s, t, y, reduction="none")
    assert loss.isnan().tolist() == [i == 2 for i in range(8)]
    y[2] = 99
    with torch.no_grad():
        s[3, 7], t[4, 7] = math.nan, math.inf
        s[5] = -math.inf
    for rows in (
        kl_loss(s, t, reduction="none"),
        dkd_loss(s, t, y, reduction="none"),
        jsd_loss(s, t, reduction="none"),
    ):
        assert rows.isnan().tolist() == [i in (3, 4, 5) for i in range(8)]
    kept = distillation_loss(z, s, t, torch.where(torch.arange(8, device="cuda") // 3 == 1, -100, y), ignore_index=-100)
    assert kept.isfinite()


def test_nothing_waits_for_the_device():
    z, s, t, y = on_gpu(256, 1000, torch.float32)
    distillation_loss(z, s, t, y, ignore_index=3).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in (
            lambda: distillation_loss(z, s, t, y, classes=slice(0, 900), ignore_index=3),
            lambda: kl_loss(s, t),
            lambda: dkd_loss(s, t, y),
            lambda: jsd_loss(s, t),
        ):
            call().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_for_loss_and_gradients():
    z, s, t, y = on_gpu(256, 1000, torch.float32)
    distillation_loss(z, s, t, y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        distillation_loss(z, s, t, y)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "Memcpy" not in name and "Memset" not in name] == ["cl_distillation_rows"]


def test_streams_do_not_share_a_counter():
    inputs = [on_gpu(400, 300, torch.float32) for _ in range(4)]
    wanted = [torch_kl(s.double(), t.double(), 1.0) for _, s, t, _ in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(20):
        for (_, s, t, _), stream, losses in zip(inputs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                losses.append(kl_loss(s.detach(), t))
    torch.cuda.synchronize()
    for losses, value in zip(found, wanted, strict=True):
        assert all(torch.allclose(loss.double(), value, rtol=1e-5) for loss in losses)


def test_a_captured_graph_is_replayed():
    z, s, t, y = on_gpu(64, 100, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up: kernels are loaded before the capture
        distillation_loss(z, s, t, y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    z.grad = s.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = distillation_loss(z, s, t, y)
        loss.backward()
    for _ in range(3):
        with torch.no_grad():
            z.normal_(), s.normal_(), t.normal_()
        graph.replay()
        torch.cuda.synchronize()
        wide = gold(z, s, t)
        wanted = gradients(torch_distillation(*wide, y), *wide[:2])
        assert z.grad is not None
        assert s.grad is not None
        for a, b in zip((loss.detach(), z.grad, s.grad), wanted, strict=True):
            assert relative(a, b) <= 1e-5
