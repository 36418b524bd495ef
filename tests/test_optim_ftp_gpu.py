"""FTPAdamW and FTPSGD on a GPU: no waiting, CUDA graphs, resume onto another device (`pytest -m gpu`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from official_ftp import Recurrence, Tiny, adamw, batch, gradients
from test_optim_ftp import MAKERS, kinds, record_of, start, weights_of
from torch import nn

from cl_kernels.ops.weight_projection import FLOORED
from cl_kernels.optim import FTPAdamW

pytestmark = pytest.mark.gpu


def backward(net: nn.Module, i: int) -> None:
    device = next(net.parameters()).device
    images, answers = (x.to(device) for x in batch(i))
    net.zero_grad(set_to_none=False)
    (net(images) - answers).square().mean().backward()


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        backward(net, i)
        optimizer.step()


@kinds
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_no_step_waits_for_the_device(kind: str, nonfinite: str) -> None:
    """From the first step on, which makes the state, and with tensors at their floor."""
    net = start("converged").cuda()
    optimizer = MAKERS[kind](net.named_parameters(), nonfinite=nonfinite)
    for i in range(5):
        backward(net, i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(optimizer.fire_rate().values()) > 0


@kinds
def test_a_captured_step_is_the_eager_one(kind: str) -> None:
    """Bit for bit over the opening of the radii and the floors after it, with a rate that changes."""
    net = start("converged").cuda()
    twin = copy.deepcopy(net)
    rate = torch.tensor(1e-3, device="cuda")
    extra = {"capturable": True} if kind == "adamw" else {"exclude": ()}  # torch's SGD reads a tensor rate on the host
    captured, eager = (MAKERS[kind](n.named_parameters(), lr=rate, **extra) for n in (net, twin))
    for n, o in ((net, captured), (twin, eager)):
        for p in n.parameters():
            p.grad = torch.zeros_like(p)
        train(n, o, range(2))  # outside the graph: makes the state
    graph = torch.cuda.CUDAGraph()
    kept = [{k: v.clone() for k, v in captured.state[p].items()} for p in net.parameters()]
    slots = {p: held.slot.clone() for p, held in captured._present()}
    weights = weights_of(net)
    with torch.cuda.graph(graph):
        captured.step()
    with torch.no_grad():  # capturing runs nothing: all is as it was
        for p, state in zip(net.parameters(), kept, strict=True):
            assert all(torch.equal(captured.state[p][k], v) for k, v in state.items())
        assert all(torch.equal(captured._held[p].slot, slot) for p, slot in slots.items())
        assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    floors = 0
    for i in range(2, 20):
        rate.fill_(1e-3 / (i + 1))
        backward(twin, i)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
        for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
            assert torch.equal(p, q[1]), (name, i)
        floors += sum(bool(record_of(eager, p)[FLOORED]) for p, _ in eager._present())
    assert floors > 0
    assert captured.radii() == eager.radii()
    if kind == "adamw":
        refused = FTPAdamW(start().cuda().named_parameters())
        for p in refused.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError, match="capturable=False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused.step()


@kinds
def test_two_runs_on_a_gpu_are_equal_bit_for_bit(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    grads = [[torch.randn(p.shape, generator=generator) for p in Tiny().parameters()] for _ in range(15)]
    finals = []
    for _ in range(2):
        net = start().cuda()
        optimizer = MAKERS[kind](net.named_parameters())
        for values in grads:
            for p, grad in zip(net.parameters(), values, strict=True):
                p.grad = grad.cuda()
            optimizer.step()
        finals.append((weights_of(net), optimizer.radii()))
    assert finals[0][1] == finals[1][1]
    assert all(torch.equal(finals[0][0][name], value) for name, value in finals[1][0].items())


@kinds
@pytest.mark.parametrize("done", [1, 9])
@pytest.mark.parametrize("direction", ["to the GPU", "from the GPU"])
def test_resume_on_a_gpu(kind: str, done: int, direction: str, tmp_path: Path) -> None:
    """The state goes over bit for bit, c of floored tensors too; the steps after it agree to rounding."""
    old, new = ("cpu", "cuda") if direction == "to the GPU" else ("cuda", "cpu")
    net = start("converged").to(old)
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(done))
    torch.save({"net": net.state_dict(), "o": optimizer.state_dict()}, tmp_path / "run.pt")
    again = start("converged").to(new)
    resumed = MAKERS[kind](again.named_parameters())
    saved = torch.load(tmp_path / "run.pt", weights_only=True, map_location=old)
    resumed.load_state_dict(saved["o"])
    again.load_state_dict(saved["net"])
    for (p, held), (q, other) in zip(optimizer._present(), resumed._present(), strict=True):
        assert other.slot.device.type == new
        assert torch.equal(held.slot.cpu(), other.slot.cpu())
        assert all(torch.equal(v.cpu(), resumed.state[q][k].cpu()) for k, v in optimizer.state[p].items())
        assert all(v.device.type == new for v in resumed.state[q].values())
    assert optimizer.fingerprints() == resumed.fingerprints()
    straight = copy.deepcopy((net, optimizer))
    train(*straight, range(done, done + 3))
    train(again, resumed, range(done, done + 3))
    for p, q in zip(straight[0].parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=0, atol=1e-5)


def test_a_model_that_moves_before_its_first_step_takes_its_anchors_along() -> None:
    net = start()
    optimizer = FTPAdamW(net.named_parameters())
    prints = optimizer.fingerprints()
    net.cuda()
    train(net, optimizer, range(4))
    assert all(held.slot.is_cuda for _, held in optimizer._present())
    assert optimizer.fingerprints() == prints
    assert all(torch.equal(a.cpu(), start().state_dict()[name]) for name, a in optimizer.anchors().items())
    net.cpu()
    backward(net, 4)
    with pytest.raises(RuntimeError, match="load its state again"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_a_gpu_changes_nothing(fused: bool) -> None:
    net = start("converged").cuda()
    optimizer = FTPAdamW(net.named_parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for i, overflow in enumerate((False, True, False, True)):
        images, answers = (x.cuda() for x in batch(i))
        optimizer.zero_grad()
        loss = (net(images) - answers).square().mean()
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        before, radii = weights_of(net), optimizer.radii()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name.startswith("head"))
        assert same == overflow
        if overflow:
            assert optimizer.radii() == radii
            assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_it_follows_the_published_recurrence_on_a_gpu() -> None:
    net = start("converged").cuda()
    official = Recurrence(weights_of(net), adamw(decay=0.1), 1.0, excluded=("head.weight", "head.bias"))
    optimizer = MAKERS["adamw"](net.named_parameters())
    for i in range(60):
        on_cpu = {name: w.cpu() for name, w in official.weights.items()}
        grads = {name: g.cuda() for name, g in gradients(Tiny(), on_cpu, i).items()}
        official.step(grads, 1e-3)
        for name, p in net.named_parameters():
            p.grad = grads[name]
        optimizer.step()
        for name, p in net.named_parameters():
            assert float((p.detach() - official.weights[name]).abs().max()) <= 1e-4, (name, i)
            if not name.startswith("head"):
                assert bool(record_of(optimizer, p)[FLOORED]) == official.floored(name), (name, i)
