"""`project_updates`: optimizers that other packages ship, projected without touching them.

The stand-ins have the shapes of their originals, and none of their code: Lion takes the sign of an interpolation, Muon
orthogonalises momentum (torch's own is used where torch has it), SOAP runs Adam in an eigenbasis that it keeps in its
state.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.optim import ProjectedAdamW, project_updates

ROUNDING = 5e-5


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            a, b = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(torch.sign(a * m + (1 - a) * p.grad), alpha=-group["lr"])
                    m.mul_(b).add_(p.grad, alpha=1 - b)
        return loss


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of G G^T, which it turns after every other step."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            g, s = p.grad.flatten(1) if p.ndim > 1 else p.grad[None], self.state[p]
            if not s:
                s.update(n=0, l=torch.zeros(len(g), len(g)), q=torch.eye(len(g)))
                s.update(m=torch.zeros_like(g), v=torch.zeros_like(g))
            s["l"].lerp_(g @ g.mT, 0.05)
            turned = s["q"].mT @ g
            s["m"].lerp_(turned, 0.1)
            s["v"].lerp_(turned**2, 0.01)
            s["n"] += 1
            step = s["q"] @ (s["m"] / (s["v"].sqrt() + 1e-3))
            p.sub_(step.view_as(p), alpha=self.param_groups[0]["lr"])
            if s["n"] % 2 == 0:
                s["q"] = torch.linalg.eigh(s["l"])[1]


class Lookahead(torch.optim.AdamW):
    """A subclass that calls its parent's step: torch fires every step hook twice."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                p.lerp_(slow, 0.5)
                slow.copy_(p)
        return loss


def torch_muon(named: Any) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon([pair for pair in named if pair[1].ndim == 2], lr=0.02, weight_decay=0.1)


MAKERS = {
    "lion": lambda named: Lion(named, lr=1e-3),
    "soap": lambda named: Soap(named, lr=1e-3),
    "muon": torch_muon,
    "lookahead": lambda named: Lookahead(named, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda named: torch.optim.AdamW(named, lr=1e-2, foreach=True),
    "adamw-fused": lambda named: torch.optim.AdamW(named, lr=1e-2, fused=True),
    "lbfgs": lambda named: torch.optim.LBFGS([p for _, p in named], lr=0.1, max_iter=3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(24, 8), nn.Linear(8, 3)
        self.prompt = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wide(x))).square().mean() + self.prompt.square().mean()


def basis(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r))[0]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(5)
    return Net()


def subspace() -> dict[str, Any]:
    torch.manual_seed(11)
    return {
        "wide.weight": Projector(basis(24, 5)),
        "prompt": Sides(Projector(basis(4, 1)), Projector(basis(12, 3), 0.6, 0.6)),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(6, 24, generator=generator)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def leak(model: nn.Module, before: dict[str, Tensor], store: dict[str, Any]) -> float:
    moved = model.wide.weight.detach() - before["wide.weight"]
    assert moved.norm() > 1e-4
    return float((moved @ store["wide.weight"].basis).norm() / moved.norm())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_optimizers_of_other_packages(net: Net, kind: str, low_memory: bool) -> None:
    optimizer, store = MAKERS[kind](list(net.named_parameters())), subspace()
    before = values(net)
    project_updates(optimizer, {"wide.weight": store["wide.weight"]}, model=net, low_memory=low_memory)
    train(net, optimizer, 30)
    assert leak(net, before, store) <= ROUNDING
    plain = Net()
    plain.load_state_dict(before)
    train(plain, MAKERS[kind](list(plain.named_parameters())), 30)
    assert leak(plain, before, store) > 0.05, "without the projection this optimizer would not have leaked"


def test_each_step_is_projected_from_where_it_started(net: Net) -> None:
    """p1 = p0 + P_left (p - p0) P_right, whatever moved p: here a step that only adds a known matrix."""

    class Adds(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p, u in moves.items():
                p.add_(u)

    moves = {p: torch.randn_like(p) for p in net.parameters()}
    optimizer, store = Adds(net.named_parameters()), subspace()
    project_updates(optimizer, store)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = values(net)
    optimizer.step()
    left, right = store["prompt"]
    for name, p in net.named_parameters():
        u = moves[p]
        if name == "prompt":
            u = left.matrix() @ u @ right.matrix()
        elif name == "wide.weight":
            u = u @ store[name].matrix()
        torch.testing.assert_close(p.detach(), before[name] + u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 20, 50])
def test_low_memory_agrees_with_the_copy_and_keeps_less(net: Net, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cl_kernels.optim.project_updates"], "_BLOCK", block)
    twin, store = copy.deepcopy(net), {"wide.weight": subspace()["wide.weight"]}
    optimizers = [torch.optim.AdamW(m.named_parameters(), lr=1e-2) for m in (net, twin)]
    handles = [project_updates(o, store, low_memory=low) for o, low in zip(optimizers, (False, True), strict=True)]
    sizes: list[int] = []
    for handle in handles:
        handle._optimizer.register_step_pre_hook(lambda *_, h=handle: sizes.append(h._kept[0].before.nbytes))
    train(net, optimizers[0], 20)
    train(twin, optimizers[1], 20)
    assert sizes[0] == 8 * 24 * 4
    assert sizes[-1] == 8 * 5 * 8
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_nothing_is_kept_for_parameters_that_cannot_move(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    handle = project_updates(optimizer, subspace())
    kept: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: kept.append(len(handle._kept)))
    optimizer.step()
    net.wide.weight.grad = torch.ones_like(net.wide.weight)
    optimizer.step()
    optimizer.step(lambda: torch.zeros(()))  # a closure may make any gradient
    assert kept == [0, 1, 2]
    assert handle._kept == []


@pytest.mark.parametrize("low_memory", [False, True])
def test_zero_gradient_and_zero_rate_change_no_bit(net: Net, low_memory: bool) -> None:
    with torch.no_grad():
        net.wide.weight[0, 0] = -0.0
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.0)
    project_updates(optimizer, subspace(), low_memory=low_memory)
    before = {name: p.detach().view(torch.int32).clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p.detach().view(torch.int32), before[n]) for n, p in net.named_parameters())


def test_a_step_inside_a_step_is_projected_once(net: Net) -> None:
    """With a mixed projector (eigenvalue 0.4 where it suppresses) a second projection would show as 0.16."""
    twin, v = copy.deepcopy(net), basis(24, 5)
    mixed = {"wide.weight": Projector(v, 1.0, 0.6)}
    train(twin, Lookahead(twin.named_parameters(), lr=1e-2), 1)
    optimizer = Lookahead(net.named_parameters(), lr=1e-2)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    project_updates(optimizer, mixed)
    before = values(net)["wide.weight"]
    train(net, optimizer, 1)
    assert calls == ["post", "post"], "torch fires the hooks of the inner step too; if not, this test is void"
    moved, free = net.wide.weight.detach() - before, twin.wide.weight.detach() - before
    torch.testing.assert_close(moved @ v, 0.4 * (free @ v), rtol=1e-3, atol=1e-6)


def test_after_a_step_that_raised_the_next_one_is_projected(net: Net) -> None:
    optimizer, store = Lookahead(net.named_parameters(), lr=1e-2), subspace()
    project_updates(optimizer, store)

    def broken() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    with torch.no_grad():
        net.wide.weight.add_(1.0)  # somebody else's change between steps is not taken back
    before = values(net)
    train(net, optimizer, 3)
    assert leak(net, before, store) <= ROUNDING


# -- no half-applied step ----------------------------------------------------------------------------------------------


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p.to("cpu"), before[n]) for n, p in net.named_parameters() if p.device.type != "meta")


def test_a_model_that_was_moved_or_resized_is_refused_before_the_step(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    handle = project_updates(optimizer, subspace())
    train(net, optimizer, 2)
    steps = {p: s["step"].clone() for p, s in optimizer.state.items()}
    for changed, error, words in (
        (torch.zeros(4, 12, device="meta"), RuntimeError, r"prompt.*meta.*cpu.*store\.to"),
        (torch.zeros(4, 13), SubspaceMismatchError, r"prompt.*do not fit \(4, 13\)"),
    ):
        net.prompt.grad, other = None, nn.Parameter(changed)
        torch.utils.swap_tensors(net.prompt, other)  # as `Module.to` may: the optimizer's tensor lies elsewhere now
        net.prompt.grad = torch.ones_like(net.prompt)
        before = values(net)
        with pytest.raises(error, match=words):
            optimizer.step()
        assert unchanged(net, before)
        assert all(torch.equal(s["step"], steps[p]) for p, s in optimizer.state.items())
        net.prompt.grad = None
        torch.utils.swap_tensors(net.prompt, other)
    net.double()
    optimizer.state.clear()
    before = values(net)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()  # a converted model is followed
    assert leak(net, before, {"wide.weight": subspace()["wide.weight"].to(torch.float64)}) <= 1e-6
    assert len(handle._kept) == 0


def test_what_fails_after_the_step_puts_the_parameters_back(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = sys.modules["cl_kernels.optim.project_updates"]
    real, calls = hooks.project_sides, []

    def exhausted(update: Tensor, sides: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(update, sides)

    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    project_updates(optimizer, subspace())
    before = values(net)
    monkeypatch.setattr(hooks, "project_sides", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        train(net, optimizer, 1)
    after = values(net)
    assert torch.equal(after["prompt"], before["prompt"])
    assert torch.equal(after["wide.weight"], before["wide.weight"])


def test_a_store_that_changes_to_what_does_not_fit_is_refused_before_the_step(net: Net) -> None:
    from cl_kernels.subspace import SubspaceStore

    store = SubspaceStore(subspace())
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    project_updates(optimizer, store)
    train(net, optimizer, 1)
    store["prompt"] = Projector(basis(5, 2))
    before = values(net)
    with pytest.raises(SubspaceMismatchError, match="prompt"):
        train(net, optimizer, 1)
    assert unchanged(net, before)


# -- handles -----------------------------------------------------------------------------------------------------------


def test_one_handle_an_optimizer(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    handle = project_updates(optimizer, subspace())
    with pytest.raises(ValueError, match="projected already"):
        project_updates(optimizer, subspace())
    assert len(optimizer._optimizer_step_post_hooks) == 1
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    project_updates(optimizer, subspace()).remove()
    with pytest.raises(ValueError, match="set_subspace"):
        project_updates(ProjectedAdamW(net.named_parameters()), subspace())


def test_removing_twice_does_not_free_the_way_for_a_second_projection(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    first = project_updates(optimizer, subspace())

    def failing() -> Any:
        raise KeyError("loss")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    first.remove()
    assert not first._kept, "copies of a step that raised"
    project_updates(optimizer, subspace())
    first.remove()
    with pytest.raises(ValueError, match="already"):
        project_updates(optimizer, subspace())


def test_a_handle_keeps_no_optimizer_alive(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    project_updates(optimizer, subspace())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_bind_lets_go_of_parameters_that_were_replaced(net: Net) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    handle = project_updates(optimizer, subspace())
    old = weakref.ref(net.wide.weight)
    net.wide = nn.Linear(24, 8)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    handle.bind(net)
    gc.collect()
    assert old() is None
    train(net, optimizer, 1)
    del net.wide
    optimizer.param_groups[0]["params"] = list(net.parameters())
    handle.bind(net)
    with pytest.raises(SubspaceMismatchError, match=r"unknown parameters: wide\.weight"):
        handle.set_subspace(subspace())


def test_low_memory_keeps_a_copy_where_a_16_bit_basis_has_to_be_applied_twice() -> None:
    weight, seen = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)), []
    basis = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0].bfloat16()
    optimizer = torch.optim.SGD([("weight", weight)], lr=1.0)
    handle = project_updates(optimizer, {"weight": Projector(basis)}, low_memory=True)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(kept.products for kept in handle._kept))
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    optimizer.step()
    assert seen == [False]
    assert (weight.double() @ basis.double()).norm() <= 8e-4 * weight.double().norm()  # one application leaves 1e-3


def test_a_wrapper_without_hooks_is_refused_with_advice(net: Net) -> None:
    class Wrapper(torch.optim.Optimizer):  # what Accelerate does
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return self.optimizer.param_groups

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    with pytest.raises(TypeError, match="the one inside"):
        project_updates(Wrapper(torch.optim.AdamW(net.named_parameters())), subspace())


def test_shared_memory_is_refused(net: Net) -> None:
    twin = nn.Parameter(net.wide.weight.data)
    store = {"wide.weight": Projector(basis(24, 2)), "again": Projector(basis(24, 2))}
    named = [("wide.weight", net.wide.weight), ("again", twin)]
    with pytest.raises(SubspaceMismatchError, match="weight and again share their memory"):
        project_updates(torch.optim.AdamW(named), store)
    with pytest.raises(SubspaceMismatchError, match="weight and again share their memory"):
        ProjectedAdamW(named, subspace=store)


def test_bfloat16_parameters_round_once(net: Net) -> None:
    net.to(torch.bfloat16)
    optimizer, v = torch.optim.SGD(net.named_parameters(), lr=0.5), basis(24, 5)
    project_updates(optimizer, {"wide.weight": Projector(v)}, low_memory=True)
    before = values(net)["wide.weight"].float()
    net.wide.weight.grad = torch.randn(8, 24).to(torch.bfloat16)
    plain = (values(net)["wide.weight"] - 0.5 * net.wide.weight.grad).float() - before
    optimizer.step()
    wanted = (before + plain - plain @ v @ v.mT).to(torch.bfloat16)
    torch.testing.assert_close(net.wide.weight.detach(), wanted, rtol=2**-7, atol=1e-3)
    assert (net.wide.weight.detach() == wanted).float().mean() > 0.9


def test_a_compiled_step_is_projected_too(net: Net) -> None:
    optimizer, store = torch.optim.AdamW(net.named_parameters(), lr=torch.tensor(1e-2)), subspace()
    project_updates(optimizer, store)
    step = torch.compile(optimizer.step, backend="eager")
    before = values(net)
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        step()
    assert leak(net, before, store) <= ROUNDING
