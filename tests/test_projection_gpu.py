"""The CUDA projected step against the reference; runs on a machine with a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels.ops import Projector, projected_adam_step_, use_backend
from cl_kernels.ops.projection.lists import KINDS
from cl_kernels.optim import ProjectedAdamW, ProjectedSGD

pytestmark = pytest.mark.gpu

# Small and large parameters, both layouts of a basis, a batch, a dense side, odd sizes, an empty one.
CASES = [
    ((4, 768), 1, 64, True),
    ((1, 4, 768), 1, 64, False),
    ((3, 10, 40), 3, 7, True),
    ((100, 768), 17, 300, True),
    ((7, 3), None, 1, False),
    ((1, 1), 1, 1, True),
    ((0, 16), None, 4, True),
    ((128, 1024), None, 64, False),
    ((768, 768), None, 64, True),
    ((3072, 768), None, 300, False),
    ((300, 129), 20, None, True),
    ((300, 129), 20, 31, True),
    ((16, 8, 2, 2), None, 9, True),
    ((33, 65), "dense", "dense", True),
    ((333, 65), None, "dense", True),
]


def basis(d: int, r: int, columns: bool) -> Tensor:
    v = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].float()
    return v.mT.contiguous().mT if columns else v.contiguous()


def side(size: int, rank: Any, columns: bool) -> Projector | None:
    if rank is None:
        return None
    if rank == "dense":
        return Projector.from_dense(Projector(basis(size, size // 2, columns)).matrix())
    return Projector(basis(size, min(rank, size), columns), 0.9, 0.7)


def problem(amsgrad: bool, weight: torch.dtype = torch.float32, moment: torch.dtype = torch.float32) -> dict[str, Any]:
    shapes = [shape for shape, *_ in CASES]
    p: dict[str, Any] = {"params": [torch.randn(s).to(weight) for s in shapes]}
    p["grads"] = [torch.randn(s).to(weight) for s in shapes]
    p["exp_avgs"] = [(torch.randn(s) * 0.1).to(moment) for s in shapes]
    p["exp_avg_sqs"] = [(torch.rand(s) * 0.1 + 0.01).to(moment) for s in shapes]
    p["steps"] = [torch.tensor(float(i)) for i in range(len(shapes))]
    p["max_exp_avg_sqs"] = [(torch.rand(s) * 0.2).to(moment) for s in shapes] if amsgrad else None
    matrices = [s if len(s) < 4 else (s[0], s[1] * s[2] * s[3]) for s in shapes]
    p["left"] = [side(s[-2], left, columns) for s, (_, left, _, columns) in zip(matrices, CASES, strict=True)]
    p["right"] = [side(s[-1], right, columns) for s, (_, _, right, columns) in zip(matrices, CASES, strict=True)]
    return p | {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    }


def on(device: str, p: Any) -> Any:
    if isinstance(p, dict):
        return {key: on(device, value) for key, value in p.items()}
    if isinstance(p, list):
        return [on(device, value) for value in p]
    return p.to(device) if isinstance(p, (Tensor, Projector)) else p


def check(ours: dict[str, Any], expected: dict[str, Any], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for key in ("params", "exp_avgs", "exp_avg_sqs", "steps", "max_exp_avg_sqs"):
        for a, b in zip(ours[key] or [], expected[key] or [], strict=True):
            assert torch.allclose(a.cpu().float(), b.cpu().float(), rtol=rtol, atol=atol), (key, a.shape)


def reference(p: dict[str, Any], times: int = 1) -> dict[str, Any]:
    with use_backend("reference"):
        for _ in range(times):
            projected_adam_step_(**p)
    return p


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.prompt = nn.Linear(64, 48), nn.Linear(48, 5), nn.Parameter(torch.randn(1, 4, 64))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.head(torch.tanh(self.fc(x + self.prompt.mean(1)))).square().mean()
        return loss


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True, "decoupled_weight_decay": False}, {"project_decay": False}, {"lr": torch.tensor(0.01)}],
)
def test_cuda_step(amsgrad, options):
    p = problem(amsgrad) | options
    ours = on("cuda", copy.deepcopy(p))
    with use_backend("native"):
        projected_adam_step_(**ours)
    check(ours, reference(p))


@pytest.mark.parametrize(("weight", "moment"), sorted(KINDS, key=str))
def test_cuda_step_of_every_float_type(weight, moment):
    p = problem(False, weight, moment)
    ours = on("cuda", copy.deepcopy(p))
    with use_backend("native"):
        projected_adam_step_(**ours)
    coarse = weight.itemsize == 2
    check(ours, reference(p), rtol=1e-2 if coarse else 2e-5, atol=1e-3 if coarse else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_are_applied_twice(dtype):
    p = problem(False)
    for key in ("left", "right"):
        p[key] = [s if s is None or s.dense is not None else s.to(dtype) for s in p[key]]
    ours = on("cuda", copy.deepcopy(p))
    with use_backend("native"):
        projected_adam_step_(**ours)
    check(ours, reference(p))


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_grouped_large_weights_keep_out_of_the_span(precision, scale):
    """Six weights of two shapes are two buckets; TF32, where it is asked for, may not leak."""
    torch.manual_seed(0)
    shapes = [(768, 768), (768, 3072)] * 3
    bases = [basis(s[-1], 64, True).cuda() for s in shapes]
    p: dict[str, Any] = {
        key: [torch.randn(s, device="cuda") for s in shapes] for key in ("params", "grads", "exp_avgs")
    }
    p["exp_avg_sqs"] = [torch.rand(s, device="cuda") + 0.01 for s in shapes]
    p |= {"steps": [torch.zeros((), device="cuda") for _ in shapes], "left": [None] * 6, "lr": 0.01, "beta1": 0.9}
    p["right"] = [
        Projector(v, scale + 0.01 * i * (scale < 1), scale + 0.01 * i * (scale < 1)) for i, v in enumerate(bases)
    ]
    p |= {"beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False}
    before = [t.clone() for t in p["params"]]
    torch.set_float32_matmul_precision(precision)
    try:
        with use_backend("native"):
            projected_adam_step_(**p)
    finally:
        torch.set_float32_matmul_precision("highest")
    for t, old, v in zip(p["params"], before, bases, strict=True):
        moved = (t - old).double()
        assert (moved @ v.double()).norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("host_steps", [False, True])
def test_steps_on_either_side(host_steps):
    p = problem(False)
    ours = on("cuda", copy.deepcopy(p))
    if host_steps:
        ours["steps"] = [step.cpu() for step in ours["steps"]]
    projected_adam_step_(**ours)
    projected_adam_step_(**ours)
    check(ours, reference(p, times=2))


def test_found_inf_and_scale_are_read_on_the_device():
    p = problem(True)
    ours = on("cuda", copy.deepcopy(p))
    ours["grads"] = [g * 8 for g in ours["grads"]]
    scale = torch.tensor(8.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("native"):
            projected_adam_step_(**ours, grad_scale=scale, found_inf=torch.ones_like(scale))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(ours, p)
    projected_adam_step_(**ours, grad_scale=scale, found_inf=torch.zeros_like(scale))
    check(ours, reference(p))


def test_same_bits_every_time():
    p = on("cuda", problem(True))
    runs = [copy.deepcopy(p) for _ in range(3)]
    for run in runs:
        projected_adam_step_(**run)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run["params"], runs[0]["params"], strict=True))


def test_side_stream():
    """The step must run on the current stream: it waits there for gradients that arrive late."""
    p = problem(False)
    ours = on("cuda", copy.deepcopy(p))
    grads, ours["grads"] = ours["grads"], [torch.full_like(g, float("nan")) for g in ours["grads"]]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # ~50 ms: longer than everything below takes to be enqueued
        for late, grad in zip(ours["grads"], grads, strict=True):
            late.copy_(grad)
        projected_adam_step_(**ours)
    stream.synchronize()
    check(ours, reference(p))


def test_cuda_graph_reads_lr_and_steps_at_each_replay():
    p = problem(False)
    lr = torch.tensor(0.01, dtype=torch.float64)
    ours = on("cuda", copy.deepcopy(p) | {"lr": lr})
    warm = copy.deepcopy(ours)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        projected_adam_step_(**warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        projected_adam_step_(**ours)
    for rate in (0.01, 0.05, 0.0):
        ours["lr"].fill_(rate)
        graph.replay()
        reference(p | {"lr": rate})
    torch.cuda.synchronize()
    check(ours, p, rtol=5e-5, atol=5e-6)


def test_optimizer_in_a_cuda_graph():
    net = Net().cuda()
    twin = copy.deepcopy(net)
    store = {"fc.weight": Projector(basis(64, 9, True)).to("cuda")}
    rate = torch.tensor(1e-2, device="cuda")
    captured = ProjectedAdamW(net.named_parameters(), lr=rate, subspace=store, capturable=True)
    eager = ProjectedAdamW(twin.named_parameters(), lr=rate, subspace=store, capturable=True)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()  # makes the state
    torch.cuda.current_stream().wait_stream(stream)
    net.load_state_dict(twin.state_dict())
    for state in captured.state.values():
        for value in state.values():
            value.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(5):
        rate.fill_(1e-2 / (i + 1))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    refused = ProjectedAdamW(net.named_parameters(), subspace=store)
    with pytest.raises(RuntimeError, match="capturable=False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        refused.step()


def test_many_parameters_need_several_tables():
    p = problem(False)
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "left", "right"):
        p[key] = [copy.deepcopy(value) for _ in range(15) for value in p[key]]
    ours = on("cuda", copy.deepcopy(p))
    projected_adam_step_(**ours)
    check(ours, reference(p))


def test_scales_on_the_device():
    p = problem(False)
    ours = on("cuda", copy.deepcopy(p))
    for name in ("left", "right"):
        ours[name] = [
            s if s is None or s.dense is not None else s._replace(identity=torch.tensor(0.9, device="cuda"))
            for s in ours[name]
        ]
    with use_backend("native"):
        projected_adam_step_(**ours)
    check(ours, reference(p))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}, {"nonfinite": "skip"}])
def test_optimizer_on_the_device(options):
    torch.manual_seed(0)
    net = Net().cuda()
    twin = copy.deepcopy(net).cpu()
    store = {
        "fc.weight": Projector(basis(64, 9, True)),
        "prompt": (Projector(basis(4, 1, True)), Projector(basis(64, 3, True))),
    }
    moved = {"fc.weight": store["fc.weight"].to("cuda"), "prompt": tuple(s.to("cuda") for s in store["prompt"])}
    ours = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=moved, **options)
    cpu = ProjectedAdamW(twin.named_parameters(), lr=1e-2, subspace=store)
    for _ in range(10):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.cuda()
        ours.step()
        cpu.step()
    assert all(torch.allclose(p.cpu(), q, atol=1e-5) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert max(ours.violations().values()) <= 1e-5
    with pytest.raises(RuntimeError, match=r"store\.to"):
        ours.set_subspace(store)


@pytest.mark.parametrize("make", [ProjectedAdamW, ProjectedSGD])
def test_nonfinite_gradients_are_skipped_without_waiting(make):
    net = Net().cuda()
    store = {"fc.weight": Projector(basis(64, 9, True)).to("cuda")}
    optimizer = make(net.named_parameters(), lr=1e-2, subspace=store, nonfinite="skip")
    for bad in (False, True, False):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        if bad:
            net.head.bias.grad[0] = float("nan")
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        same = [torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
        assert all(same) if bad else not any(same)
    assert optimizer.skipped_steps() == 1


def test_an_empty_subspace_is_torchs_adamw_with_capturable_and_tensor_lr():
    a, b = Net().cuda(), Net().cuda()
    b.load_state_dict(a.state_dict())
    options: dict[str, Any] = {"capturable": True, "foreach": True}
    ours = ProjectedAdamW(a.parameters(), lr=torch.tensor(1e-2, device="cuda"), **options)
    theirs = torch.optim.AdamW(b.parameters(), lr=torch.tensor(1e-2, device="cuda"), **options)
    for _ in range(100):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
