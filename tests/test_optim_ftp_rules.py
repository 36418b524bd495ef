"""FTPAdamW and FTPSGD under the rules for all optimizers (O1-O12), in real loops, and with wrong input."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from official_ftp import batch
from test_optim_ftp import MAKERS, backward, kinds, record_of, start, weights_of
from torch import Tensor, nn

from cl_kernels import use_backend
from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.weight_projection import FLOORED, GAMMA
from cl_kernels.optim import FTPSGD, FTPAdamW


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        backward(net, i)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def states(optimizer: Any) -> dict[int, dict[str, Tensor]]:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same_states(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[i][k]) for i, s in a.items() for k, v in s.items())


# -- names -------------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_nearest() -> None:
    for pattern, near in (("heads.*", "head.weight"), ("module.fc3.weight", "fc2.weight"), ("conv_*", "conv")):
        words = f"exclude: {pattern!r} matches no parameter; nearest names: "
        with pytest.raises(ValueError, match=f"{re.escape(words)}.*{near}"):
            FTPAdamW(start().named_parameters(), exclude=("head.*", pattern))
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 2\) is no parameter"):
        FTPAdamW(start().named_parameters(), exclude=[torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="cannot match parameters without names"):
        FTPAdamW(start().parameters(), exclude="head.*")
    body = [pair for pair in start().named_parameters() if not pair[0].startswith("head")]
    FTPAdamW(body)  # the default may match nothing


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_patterns_do_not_depend_on_wrappers(prefix: str) -> None:
    net = start()
    named = [(prefix + name, p) for name, p in net.named_parameters()]
    for exclude in (("fc1.*", "head.*"), (f"{prefix}fc1.*", "head"), [net.fc1.weight, net.fc1.bias, "head"]):
        optimizer = FTPAdamW(named, exclude=exclude)
        assert set(optimizer.anchors()) == {"pos", "gain", "conv.weight", "conv.bias", "fc2.weight", "fc2.bias"}


def test_bare_tensors_are_taken_with_a_word_about_the_head() -> None:
    net = start()
    with pytest.warns(UserWarning, match=r"no names, so none is excluded.*exclude=\(\)"):
        FTPAdamW(net.parameters())
    named, bare = start(), start()
    pair = FTPAdamW(named.named_parameters(), exclude=()), FTPAdamW(bare.parameters(), exclude=())
    for i in range(6):
        for model, optimizer in zip((named, bare), pair, strict=True):
            train(model, optimizer, range(i, i + 1))
    assert same(named, bare)
    assert list(pair[1].radii()) == [str(i) for i in range(10)]


def test_a_parameter_put_in_from_outside_needs_a_name() -> None:
    net = start()
    optimizer = FTPAdamW(net.named_parameters())
    train(net, optimizer, range(2))
    extra = nn.Linear(8, 8)
    optimizer.param_groups[0]["params"] = [*net.parameters(), extra.weight]
    before = weights_of(net)
    backward(net, 2)
    extra.weight.grad = torch.ones(8, 8)
    with pytest.raises(SubspaceMismatchError, match=r"a parameter of shape \(8, 8\) has no name.*bind\(model\)"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    optimizer.bind([*net.named_parameters(), ("extra.weight", extra.weight)])
    optimizer.step()
    assert "extra.weight" in optimizer.radii()


@kinds
def test_anchors_and_radii_follow_a_name_to_a_new_tensor(kind: str) -> None:
    net, twin = start("converged"), start("converged")
    a, b = (MAKERS[kind](n.named_parameters()) for n in (net, twin))
    for n, o in ((net, a), (twin, b)):
        train(n, o, range(1))  # all at their floor: the slots hold c
    net.fc1.weight = nn.Parameter(net.fc1.weight.detach().clone())
    a.param_groups[0]["params"] = list(net.parameters())
    a.bind(net)
    for n, o in ((net, a), (twin, b)):
        train(n, o, range(1, 6))
    assert same(net, twin)
    assert a.radii() == b.radii()
    assert a.fingerprints() == b.fingerprints()
    net.fc2 = nn.Linear(16, 9)
    a.param_groups[0]["params"] = [p for n, p in net.named_parameters() if not n.startswith("head")]
    with pytest.warns(UserWarning, match="resized"):
        a.bind(net)
    assert torch.equal(a.anchors()["fc2.weight"], net.fc2.weight)


def test_groups_can_grow_with_settings_of_their_own() -> None:
    net = start()
    named = dict(net.named_parameters())
    rest = [(n, p) for n, p in named.items() if not n.startswith(("fc", "head"))]
    optimizer = FTPAdamW(rest, lr=1e-3)
    optimizer.add_param_group({"params": [("fc1.weight", net.fc1.weight)], "radius": 0.01, "lr": 1e-2})
    optimizer.add_param_group({"params": [("fc2.weight", net.fc2.weight)], "norm": "l2", "kappa": 0.0, "masked": True})
    optimizer.add_param_group({"params": [("head.weight", net.head.weight)]})
    with pytest.raises(ValueError, match="kappa"):
        optimizer.add_param_group({"params": [("fc1.bias", net.fc1.bias)], "kappa": 2.0})
    assert len(optimizer.param_groups) == 4
    train(net, optimizer, range(15))
    assert optimizer.radii()["fc1.weight"] == pytest.approx(0.01)
    assert optimizer.distances()["fc1.weight"] == pytest.approx(0.01, rel=1e-4)
    moved = net.fc2.weight.detach() - optimizer.anchors()["fc2.weight"]
    assert optimizer.distances()["fc2.weight"] == pytest.approx(float(moved.norm()), rel=1e-5)
    assert float(moved.norm()) <= optimizer.radii()["fc2.weight"] * (1 + 1e-5)
    assert "head.weight" not in optimizer.radii()


@kinds
def test_relative_speed_and_a_raised_floor(kind: str) -> None:
    """The radius moves in units of the anchor's mean row norm; a floor above 1e-8 is a radius like any other."""
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), radius_lr=0.1, relative_radius_lr=True, radius_floor=1e-4)
    anchors = optimizer.anchors()
    grads = {p: torch.randn_like(p) for p in net.parameters()}
    optimizer.param_groups[0]["lr"] = 1.0
    for i in range(2):
        for p, grad in grads.items():
            p.grad = grad
        optimizer.step()
        for name, radius in optimizer.radii().items():
            rows = anchors[name].reshape(anchors[name].shape[0] if anchors[name].ndim > 1 else 1, -1)
            wanted = 1e-4 + (0.07441 * float(rows.abs().sum(1).mean()) if i else 0.0)
            assert radius == pytest.approx(wanted, rel=1e-3), (name, i)
    assert optimizer.floor_rate() == 0.0


# -- gradients ---------------------------------------------------------------------------------------------------------


@kinds
def test_state_follows_the_parameter_when_gradients_come_and_go(kind: str) -> None:
    """Each tensor ends where it ends alone, with its own count of steps."""
    generator = torch.Generator().manual_seed(9)
    net = start()
    names = [name for name, _ in net.named_parameters() if not name.startswith("head")]
    plan = [[bool(torch.rand((), generator=generator) < 0.6) for _ in names] for _ in range(25)]
    grads = [[torch.randn(p.shape, generator=generator) for _, p in net.named_parameters()] for _ in plan]
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-3)
    for present, values in zip(plan, grads, strict=True):
        for (name, p), here, grad in zip(net.named_parameters(), [*present, False, False], values, strict=False):
            p.grad = grad if here and name in names else None
        optimizer.step()
    for i, name in enumerate(names):
        alone = start()
        p = dict(alone.named_parameters())[name]
        o = MAKERS[kind]([(name, p)], lr=1e-3)
        for present, values in zip(plan, grads, strict=True):
            if present[i]:
                p.grad = values[i]
                o.step()
        together = dict(net.named_parameters())[name]
        assert torch.equal(p, together), name
        assert torch.equal(record_of(o, p), record_of(optimizer, together))
        assert float(optimizer.state[together]["step"]) == sum(present[i] for present in plan)


@kinds
def test_no_gradient_is_no_step_and_sparse_ones_are_refused(kind: str) -> None:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters())
    before = weights_of(net)
    optimizer.step()
    assert not optimizer.state
    backward(net, 0)
    net.fc1.weight.grad = net.fc1.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@kinds
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_nan_leaves_radius_and_other_rows_valid(kind: str, backend: str) -> None:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-3)
    with use_backend(backend):
        train(net, optimizer, range(6))
        backward(net, 6)
        net.fc1.weight.grad[3, 2] = float("nan")
        optimizer.step()
        bad = ~torch.isfinite(net.fc1.weight)
        assert bad.nonzero().tolist() == [[3, 2]]
        assert torch.isfinite(record_of(optimizer, net.fc1.weight)).all()
        assert all(torch.isfinite(p).all() for n, p in net.named_parameters() if n != "fc1.weight")
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        good = torch.ones(16, dtype=torch.bool)
        good[3] = False
        assert torch.isfinite(net.fc1.weight[good]).all()
        assert math.isfinite(optimizer.radii()["fc1.weight"])


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_skip_leaves_out_the_whole_step(kind: str, bad: float) -> None:
    net = start("converged")
    optimizer = MAKERS[kind](net.named_parameters(), nonfinite="skip")
    train(net, optimizer, range(1))
    backward(net, 1)
    net.head.weight.grad[0, 0] = bad
    before, kept = weights_of(net), states(optimizer)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert same_states(kept, states(optimizer))
    assert optimizer.skipped_steps() == 1


@kinds
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_scaler_changes_nothing(kind: str, fused: bool) -> None:
    net, plain = start("converged"), start("converged")
    optimizer, other = MAKERS[kind](net.named_parameters(), fused=fused), MAKERS[kind](plain.named_parameters())
    assert optimizer._step_supports_amp_scaling == fused
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, overflow in enumerate((False, True, False, True, False)):
        images, answers = batch(i)
        optimizer.zero_grad()
        loss = (net(images) - answers).square().mean()
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        before, kept, radii = weights_of(net), states(optimizer), optimizer.radii()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
            assert same_states(kept, states(optimizer))
            assert optimizer.radii() == radii
        else:
            backward(plain, i)
            other.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@kinds
def test_zero_gradient_and_zero_rate_change_no_bit_of_a_fresh_optimizer(kind: str) -> None:
    net = start()
    with torch.no_grad():
        net.fc1.weight[0, :2] = -0.0
    optimizer = MAKERS[kind](net.named_parameters(), lr=0.0, weight_decay=0.1)
    before = weights_of(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(
        torch.equal(p.detach().view(torch.int32), before[n].view(torch.int32)) for n, p in net.named_parameters()
    )
    assert set(optimizer.radii().values()) == {0.0}


# -- loops -------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_runs_are_equal_bit_for_bit(kind: str, backend: str) -> None:
    runs = []
    with use_backend(backend):
        for _ in range(2):
            net = start("converged")
            optimizer = MAKERS[kind](net.named_parameters())
            train(net, optimizer, range(12))
            runs.append((net, optimizer.radii()))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@kinds
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_tensor_rates_and_schedulers(kind: str) -> None:
    net, twin = start(), start()
    rate = torch.tensor(1e-3)
    by_tensor, by_number = (MAKERS[kind](n.named_parameters(), lr=lr) for n, lr in ((net, rate), (twin, 1e-3)))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 8) for o in (by_tensor, by_number)]
    for i in range(8):
        for n, o, s in ((net, by_tensor, schedules[0]), (twin, by_number, schedules[1])):
            train(n, o, range(i, i + 1))
            s.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert by_tensor.param_groups[0]["lr"] is rate
    cycled = torch.optim.lr_scheduler.OneCycleLR(by_number, 1e-3, total_steps=4)
    for i in range(3):
        train(twin, by_number, range(8 + i, 9 + i))
        cycled.step()


@kinds
def test_a_compiled_step_is_one_graph_and_is_not_compiled_again(kind: str) -> None:
    net, twin = start(), start()
    rates = [torch.tensor(1e-3), torch.tensor(1e-3)]
    compiled, eager = (MAKERS[kind](n.named_parameters(), lr=r) for n, r in zip((net, twin), rates, strict=True))
    graphs, counts = [], []

    def backend(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module

    torch.compiler.reset()
    step = torch.compile(compiled.step, backend=backend, fullgraph=True)
    for i in range(5):
        backward(twin, i)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad.clone()
        for rate in rates:
            rate.fill_(1e-3 / (i + 1))
        step()
        eager.step()
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2, 2]
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert all(torch.equal(a, start().state_dict()[name]) for name, a in compiled.anchors().items())


@kinds
def test_closures_hooks_and_accumulated_clipped_gradients(kind: str) -> None:
    net, twin = start(), start()
    a, b = MAKERS[kind](net.named_parameters()), MAKERS[kind](twin.named_parameters())
    calls: list[str] = []
    a.register_step_pre_hook(lambda *_: calls.append("pre"))
    a.register_step_post_hook(lambda *_: calls.append("post"))
    assert type(a).__mro__[-2] is not torch.optim.AdamW
    assert not isinstance(a, torch.optim.AdamW | torch.optim.SGD)
    for i in range(4):
        images, answers = batch(i)
        a.zero_grad()
        for part, wanted in zip(images.chunk(4), answers.chunk(4), strict=True):
            ((net(part) - wanted).square().mean() / 4).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        a.step()

        def closure(i: int = i) -> Tensor:
            backward(twin, i)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            return torch.tensor(float(i))

        with torch.no_grad():
            assert float(b.step(closure)) == i
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
    assert calls == ["pre", "post"] * 4


@kinds
def test_state_is_tensors_and_the_step_a_scalar(kind: str) -> None:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(2))
    for p, _ in optimizer._present():
        state = optimizer.state[p]
        assert all(isinstance(value, Tensor) for value in state.values())
        assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
        assert (state["radius"].shape, state["radius"].dtype) == ((8,), torch.float32)
    assert not any("radius" in optimizer.state[p] for p in net.head.parameters())


def test_diagnostics_agree_with_the_weights() -> None:
    net = start()
    optimizer = FTPAdamW(net.named_parameters(), lr=1e-2)
    assert optimizer.radii().keys() == optimizer.anchors().keys()
    assert set(optimizer.radii().values()) == {0.0}
    assert optimizer.projected_fraction() == optimizer.radius_gradients() == optimizer.fire_rate() == {}
    assert optimizer.floor_rate() == 0.0
    train(net, optimizer, range(1))
    assert optimizer.floor_rate() == 1.0
    fired = dict.fromkeys(optimizer.radii(), 1)
    for i in range(1, 12):
        train(net, optimizer, range(i, i + 1))
        shares = optimizer.projected_fraction()
        for name, share in shares.items():
            fired[name] += share > 0
            assert 0 <= share <= 1
        rates = optimizer.fire_rate()
        assert all(rates[name] == pytest.approx(count / (i + 1)) for name, count in fired.items())
    assert max(fired.values()) > 1
    w = net.fc1.weight.detach() - optimizer.anchors()["fc1.weight"]
    assert optimizer.distances()["fc1.weight"] == pytest.approx(float(w.abs().sum(1).max()), rel=1e-6)


# -- wrong input -------------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (FTPAdamW, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    (FTPAdamW, {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0"),
    (FTPAdamW, {"eps": -1.0}, ValueError, "Invalid epsilon"),
    (FTPAdamW, {"weight_decay": -1.0}, ValueError, "Invalid weight_decay"),
    (FTPAdamW, {"kappa": 1.5}, ValueError, "Invalid kappa value: 1.5"),
    (FTPAdamW, {"kappa": float("nan")}, ValueError, "Invalid kappa"),
    (FTPAdamW, {"radius_lr": -1e-2}, ValueError, "Invalid radius_lr value: -0.01"),
    (FTPAdamW, {"radius_lr": float("inf")}, ValueError, "Invalid radius_lr"),
    (FTPAdamW, {"radius_floor": 0.0}, ValueError, "Invalid radius_floor"),
    (FTPAdamW, {"radius": -1.0}, ValueError, "Invalid radius value: -1.0"),
    (FTPAdamW, {"radius": float("nan")}, ValueError, "Invalid radius"),
    (FTPAdamW, {"norm": "l1"}, ValueError, "Invalid norm value: 'l1'.*row_l1"),
    (FTPAdamW, {"nonfinite": "ignore"}, ValueError, "nonfinite"),
    (FTPAdamW, {"differentiable": True}, ValueError, "differentiable"),
    (FTPAdamW, {"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
    (FTPAdamW, {"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr as a Tensor"),
    (FTPSGD, {"momentum": -0.1}, ValueError, "Invalid momentum"),
    (FTPSGD, {"nesterov": True}, ValueError, "Nesterov"),
]


@pytest.mark.parametrize(("maker", "options", "error", "words"), BAD)
def test_bad_settings_are_refused(maker: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        maker(start().named_parameters(), **options)


@kinds
@pytest.mark.parametrize(("key", "value"), [("kappa", 2.0), ("norm", "l1"), ("radius_floor", 0.0), ("radius", -1.0)])
def test_an_edit_out_of_range_stops_the_step_before_it_begins(kind: str, key: str, value: Any) -> None:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters())
    train(net, optimizer, range(3))
    backward(net, 3)
    optimizer.param_groups[0][key] = value
    before, kept = weights_of(net), states(optimizer)
    with pytest.raises(ValueError, match=f"{key}|fixed_radius"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())  # the head's, too
    assert same_states(kept, states(optimizer))


@kinds
def test_complex_and_shared_weights_are_refused(kind: str) -> None:
    with pytest.raises(RuntimeError, match="z: complex parameters cannot be held to an anchor"):
        MAKERS[kind]([("z", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    MAKERS[kind]([("z", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))], exclude="z")
    whole = torch.randn(4, 6)
    a, b = nn.Parameter(whole), nn.Parameter(whole)
    with pytest.raises(SubspaceMismatchError, match="a and b share their memory"):
        MAKERS[kind]([("a", a), ("b", b)])


MISFITS = {
    "resized state": (lambda p, s: s.update({k: v[:4].clone() for k, v in s.items() if v.ndim == 2}), ValueError),
    "moved state": (lambda p, s: s.update({k: v.to("meta") for k, v in s.items() if v.ndim == 2}), RuntimeError),
    "moved radius": (lambda p, s: s.update({"radius": s["radius"].to("meta")}), RuntimeError),
}


@kinds
@pytest.mark.parametrize("misfit", sorted(MISFITS))
def test_what_does_not_fit_stops_the_step_before_it_begins(kind: str, misfit: str) -> None:
    change, error = MISFITS[misfit]
    net = start()
    named = list(net.named_parameters())
    late = [pair for pair in named if pair[0] == "fc1.weight"]
    optimizer = MAKERS[kind]([{"params": [p for p in named if p not in late]}, {"params": late}])
    train(net, optimizer, range(5))
    backward(net, 5)
    change(net.fc1.weight, optimizer.state[net.fc1.weight])
    before = weights_of(net)
    with pytest.raises(error, match=r"fc1\.weight"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@kinds
def test_odd_shapes_and_layouts(kind: str) -> None:
    """Scalars, empty tensors, channels-last and transposed weights, one row and one column."""
    torch.manual_seed(4)
    shapes = {"scalar": (), "empty": (0, 5), "one": (1,), "row": (1, 7), "column": (7, 1), "conv": (4, 3, 2, 2)}
    plain = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
    plain["turned"] = nn.Parameter(0.02 * torch.randn(6, 5).t().contiguous())
    odd = {name: nn.Parameter(p.detach().clone()) for name, p in plain.items()}
    odd["conv"] = nn.Parameter(odd["conv"].detach().to(memory_format=torch.channels_last))
    odd["turned"] = nn.Parameter(odd["turned"].detach().t().contiguous().t())
    a, b = MAKERS[kind](plain.items(), lr=1e-3), MAKERS[kind](odd.items(), lr=1e-3)
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        for name, p in plain.items():
            p.grad = torch.randn(p.shape, generator=generator) + 0.5
            odd[name].grad = p.grad.clone()
        a.step()
        b.step()
    for name, p in plain.items():
        torch.testing.assert_close(odd[name], p, rtol=0, atol=1e-7, msg=name)
    assert a.radii()["conv"] == pytest.approx(b.radii()["conv"], rel=1e-5)
    assert float(record_of(a, plain["turned"])[GAMMA]) > 0
    assert not float(record_of(a, plain["turned"])[FLOORED])
    assert a.radii()["empty"] == 0.0
