"""The CUDA kernels of the FTP steps against the reference; runs on a machine with a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from weight_projection_cases import LONG, OPTIONS, SHAPES, on, problem, step, to_double, written

from cl_kernels.ops import use_backend
from cl_kernels.ops import weight_projection as wp
from cl_kernels.optim import FTPAdamW

pytestmark = pytest.mark.gpu

# Of ViT-B/16 and ResNet-50: positions (one row of 151,296), a block, the stem (rows of 147), a convolution.
REAL: list[tuple[int, ...]] = [
    (1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (2304, 768), (2304,), (768, 768), (3072, 768), (3072,),
    (768, 3072), (64, 3, 7, 7), (64,), (512, 512, 3, 3), (2048, 1024, 1, 1),
]  # fmt: skip


def check(ours: dict[str, Any], p: dict[str, Any], times: int) -> None:
    """The error against float64 is at most twice that of plain torch in the same type."""
    torchs, exact = copy.deepcopy(p), to_double(p)
    with use_backend("reference"):
        step(torchs, times)
        step(exact, times)
    for a, b, gold in zip(written(ours), written(torchs), written(exact), strict=True):
        is_radius = any(a is radius for radius in ours["radii"])  # h is a difference of large sums
        unit = 1e-5 if is_radius else 2 * torch.finfo(a.dtype).eps
        got, torchs_error, size = a.cpu().double(), b.double() - gold.double(), gold.double()
        for norm in (lambda t: float(t.norm()), lambda t: float(t.abs().max()) if t.numel() else 0.0):
            assert norm(got - size) <= 2 * norm(torchs_error) + (norm(size) + 1e-3) * unit, (a.shape, a.dtype)


def same(p: dict[str, Any], q: dict[str, Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(written(p), written(q), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_steps(base, amsgrad, options):
    p = problem(base) | options
    if base == "sgd":
        p.pop("decoupled_weight_decay", None)
        if amsgrad:
            p |= {"momentum": 0.0, "nesterov": False, "momentum_buffers": None}
    elif amsgrad:
        p["max_exp_avg_sqs"] = [torch.rand(shape) * 0.2 for shape in SHAPES]
    ours = on("cuda", p)
    with use_backend("native"):
        step(ours, 3)
    check(ours, p, 3)


@pytest.mark.parametrize("shapes", [REAL, LONG], ids=["real", "long"])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_real_shapes_and_long_rows(base, shapes):
    p = problem(base, shapes=shapes)
    ours = on("cuda", p)
    with use_backend("native"):
        step(ours)
    check(ours, p, 1)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", [torch.float32, "narrow"])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_16_bit_parameters(base, narrow, moment):
    p = problem(base, narrow, narrow if moment == "narrow" else moment)
    ours, torchs = on("cuda", p), copy.deepcopy(p)
    with use_backend("native"):
        step(ours)
    with use_backend("reference"):
        step(torchs)
    for a, b in zip(written(ours), written(torchs), strict=True):
        unit = 4e-5 if any(a is radius for radius in ours["radii"]) else torch.finfo(narrow).eps
        assert torch.allclose(a.cpu().double(), b.double(), rtol=2 * unit, atol=unit / 4), a.shape


def test_nothing_waits_for_the_device():
    p = problem("adam")
    ours = on("cuda", p)
    ours["grads"] = [grad * 8 for grad in ours["grads"]]
    there = {"lr": torch.tensor(1e-3, dtype=torch.float64, device="cuda"), "grad_scale": torch.tensor(8.0).cuda()}
    bad, good = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    before = on("cuda", ours)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("native"):
            wp.ftp_adam_step_(**(ours | there), found_inf=bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(ours, before)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("native"):
            wp.ftp_adam_step_(**(ours | there), found_inf=good)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(ours, p, 1)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_same_bits_every_time(base):
    """Also what keeps the ranks of data-parallel training equal bit for bit: the sign of h must not differ."""
    p = on("cuda", problem(base, shapes=[*SHAPES, *LONG]))
    runs = [on("cuda", p) for _ in range(3)]
    for run in runs:
        step(run, 5)
    assert all(same(run, runs[0]) for run in runs[1:])


def test_side_stream():
    """The step must run on the current stream: it waits there for gradients that arrive late."""
    p = problem("adam")
    ours = on("cuda", p)
    grads, ours["grads"] = ours["grads"], [torch.full_like(grad, float("nan")) for grad in ours["grads"]]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # ~50 ms: longer than everything below takes to be enqueued
        for late, grad in zip(ours["grads"], grads, strict=True):
            late.copy_(grad)
        wp.ftp_adam_step_(**ours)
    stream.synchronize()
    check(ours, p, 1)


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_a_replayed_graph_is_the_eager_step(base):
    """Rate, counts, radii and floors are read at each replay; the bits are those of the eager step."""
    p = on("cuda", problem(base) | {"lr": torch.tensor(1e-3, device="cuda")})
    call = wp.ftp_adam_step_ if base == "adam" else wp.ftp_sgd_step_
    eager, warm = on("cuda", p), on("cuda", p)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(**warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(**p)
    for rate in (1e-3, 5e-3, 0.0, 1e-4):
        for q in (p, eager):
            q["lr"].fill_(rate)
        for a, b in zip(p["grads"], eager["grads"], strict=True):
            a.copy_(torch.randn_like(a))
            b.copy_(a)
        graph.replay()
        call(**eager)
    torch.cuda.synchronize()
    assert same(p, eager)


def test_an_optimizer_in_a_graph_is_the_eager_one():
    nets = []
    torch.manual_seed(0)
    for _ in range(2):
        nets.append(nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 5)).cuda())
    nets[1].load_state_dict(nets[0].state_dict())
    rate = torch.tensor(1e-2, device="cuda")
    captured, eager = (
        FTPAdamW(net.named_parameters(), lr=rate, anchors={k: v.clone() for k, v in net.state_dict().items()},
                 capturable=True)
        for net in nets
    )  # fmt: skip
    for net in nets:
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
        eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(5):
        rate.fill_(1e-2 / (i + 1))
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)
        graph.replay()
        eager.step()
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_a_dummy_step_leaves_weight_anchor_and_radius_alone():
    p = on("cuda", problem("adam"))
    step(p)
    before = on("cuda", p)
    wp.ftp_adam_step_(**(p | {"lr": 0.0, "grads": [torch.zeros_like(grad) for grad in p["grads"]]}))
    for key in ("params", "anchors", "radii"):
        assert all(a is None or torch.equal(a, b) for a, b in zip(p[key], before[key], strict=True)), key


def test_a_poisoned_gradient_costs_its_own_rows():
    p = problem("adam")
    for grad in p["grads"]:
        if grad.numel():
            grad.view(-1)[0] = float("nan")
    ours = on("cuda", p)
    step(ours, 2)
    with use_backend("reference"):
        step(p, 2)
    for a, b in zip(written(ours), written(p), strict=True):
        assert torch.allclose(a.cpu().double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True), a.shape


def test_counts_on_the_host():
    p = problem("adam")
    ours = on("cuda", p)
    ours["steps"] = [count.clone() for count in p["steps"]]
    step(ours, 2)
    check(ours, p, 2)


def test_three_launches_for_a_model_and_no_temporaries_of_its_size():
    shapes: list[tuple[int, ...]] = [(256, 768), (768,)] * 70
    p = on("cuda", problem("adam", shapes=shapes))
    step(p)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        wp.ftp_adam_step_(**p)
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Mem", "Activity"))]
    assert len(kernels) == 3, kernels
    for part, kernel in zip(("cl_ftp_step", "cl_ftp_policy", "cl_ftp_rescale"), kernels, strict=True):
        assert part in kernel
    rows = sum(shape[0] if len(shape) > 1 else 1 for shape in shapes)
    assert torch.cuda.max_memory_allocated() - held <= 24 * rows + (1 << 20)


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [((1 << 21) + 1, 1024), ((1 << 31) + 8192,)], ids=["rows", "vector"])
def test_more_than_two_to_the_31_elements(shape):
    """Every element alike, and a fixed radius: the last must become what the first becomes."""
    if _free_bytes() < 24e9:
        pytest.skip("needs 24 GB of GPU memory")
    fill: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    param, anchor, grad = (
        torch.full(shape, 1.0, **fill),
        torch.full(shape, 0.5, **fill),
        torch.full(shape, -1.0, **fill),
    )
    first, second = torch.zeros(shape, **fill), torch.zeros(shape, **fill)
    radius, count = torch.zeros(8, device="cuda"), torch.zeros((), device="cuda")
    columns = shape[-1]
    with use_backend("native"):
        wp.ftp_adam_step_(
            [param], [grad], [first], [second], [count], [anchor], [radius], lr=0.25, beta1=0.9, beta2=0.99, eps=0.0,
            weight_decay=0.0, fixed_radius=0.25 * columns,
        )  # fmt: skip
    assert float(radius[wp.LARGEST]) == pytest.approx(0.75 * columns, rel=1e-3)  # 1.25 - 0.5
    assert float(radius[wp.PROJECTED]) == 1.0
    flat = param.view(-1)
    ends: list[Tensor] = [flat[:64], flat[(1 << 31) - 32 : (1 << 31) + 32], flat[-64:]]
    for end in ends:
        assert torch.allclose(end.float(), torch.full_like(end, 0.75).float(), atol=4e-3)
    assert bool((first.view(-1)[-64:] == first.view(-1)[0]).all())
