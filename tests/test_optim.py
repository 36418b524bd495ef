"""Projected optimizers: the promise, the rules by which they survive real training loops, and wrong input."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels.errors import NonFiniteError, SubspaceError, SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.optim import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_updates

# After few steps the rounding of the weights themselves (6e-8 of a weight near 1) is this share of the movement.
ROUNDING = 5e-5

OPTIMIZERS = {
    "adamw": lambda named, **k: ProjectedAdamW(named, lr=1e-2, **k),
    "adam": lambda named, **k: ProjectedAdam(named, lr=1e-2, weight_decay=1e-2, amsgrad=True, **k),
    "sgd": lambda named, **k: ProjectedSGD(named, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2, **k),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 8), nn.Linear(8, 3)
        self.conv = nn.Conv2d(3, 4, 2)
        self.prompt = nn.Parameter(torch.randn(1, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        images = self.conv(x[:, :12].reshape(-1, 3, 2, 2)).flatten(1).mean() + self.prompt.square().mean()
        loss: Tensor = self.head(torch.tanh(self.first(x))).square().mean() + images.square()
        return loss


def basis(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r))[0]


def subspace() -> dict[str, Any]:
    torch.manual_seed(11)
    return {
        "first.weight": Projector(basis(12, 5)),
        "conv.weight": Projector(basis(12, 7)),
        "prompt": Sides(Projector(basis(4, 1)), Projector(basis(12, 3), 0.6, 0.6)),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 12, generator=generator)).backward()
        optimizer.step()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(5)
    return Net()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class TinyStore(dict):
    """The part of a SubspaceStore that an optimizer uses, changing in place like the real one."""

    version = 0

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.version += 1

    def sides(self, name: str) -> Sides:
        return Sides.of(self[name])

    def fingerprint(self, name: str) -> str:
        return repr([None if s is None else s.basis.sum() for s in self.sides(name)])


# -- the promise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_projected_parameters_move_only_where_they_may(net, kind):
    store = subspace()
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=store)
    before = values(net)
    train(net, optimizer, 50)
    moved = {name: p - before[name] for name, p in values(net).items()}
    assert all(m.norm() > 1e-4 for m in moved.values())
    right = moved["conv.weight"].flatten(1) @ store["conv.weight"].basis
    left = store["prompt"].left.basis.mT @ moved["prompt"][0]
    assert right.norm() <= 1e-5 * moved["conv.weight"].norm()
    assert left.norm() <= 1e-5 * moved["prompt"].norm()
    violations = optimizer.violations()
    assert violations.keys() == store.keys()
    assert max(violations.values()) <= 1e-5


def test_projecting_gradients_instead_leaks_where_updates_do_not():
    """The reason for this package: a third of AdamW's step ends in the space its gradients were kept from."""
    torch.manual_seed(0)
    v = basis(32, 8)
    start = torch.randn(16, 32) * 0.1
    kept, leaking = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = ProjectedAdamW([("w", kept)], lr=1e-3, subspace={"w": Projector(v)})
    plain = torch.optim.AdamW([leaking], lr=1e-3)
    for _ in range(500):
        g = torch.randn(16, 32) @ torch.diag(torch.linspace(0.1, 2, 32))
        kept.grad, leaking.grad = g, g - g @ v @ v.mT
        ours.step()
        plain.step()
    moved = leaking.detach() - start
    assert (moved @ v).norm() / moved.norm() > 0.1
    assert ours.violations()["w"] <= 1e-5


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_moments_see_raw_gradients(net, kind):
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    twin = copy.deepcopy(net)
    free = OPTIMIZERS[kind](twin.named_parameters())
    train(net, optimizer, 1)
    train(twin, free, 1)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        for key, value in free.state[q].items():
            assert torch.allclose(optimizer.state[p][key], value, rtol=1e-6, atol=1e-12), key


def test_decay_is_projected_unless_told_otherwise():
    v = basis(32, 8)
    leaks = {}
    for projected in (True, False):
        p = nn.Parameter(torch.randn(16, 32))
        optimizer = ProjectedAdamW([("w", p)], subspace={"w": Projector(v)}, weight_decay=0.1, project_decay=projected)
        for _ in range(20):
            p.grad = torch.randn(16, 32)
            optimizer.step()
        leaks[projected] = optimizer.violations()["w"]
    assert leaks[True] <= ROUNDING
    assert leaks[False] > 1e-2


def test_violations_of_the_span_form_and_of_dense_projectors():
    v = basis(32, 8)
    for side in (Projector(v, 0.0, -1.0), Projector.from_dense(Projector(v).matrix())):
        p = nn.Parameter(torch.randn(16, 32))
        optimizer = ProjectedAdamW([("w", p)], subspace={"w": side})
        assert optimizer.violations() == {"w": 0.0}
        p.grad = torch.randn(16, 32)
        optimizer.step()
        assert optimizer.violations()["w"] <= ROUNDING
        with torch.no_grad():
            p.add_(torch.randn(16, 32))  # someone else's step
        assert optimizer.violations()["w"] > 0.1


# -- names and the store -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_do_not_matter(net, prefix):
    named = [(prefix + name, p) for name, p in net.named_parameters()]
    optimizer = ProjectedAdamW(named, subspace=subspace())
    train(net, optimizer, 3)
    assert max(optimizer.violations().values()) <= ROUNDING


def test_compiled_submodules_keep_their_names(net):
    net.first = torch.compile(net.first, backend="eager")
    assert "first._orig_mod.weight" in dict(net.named_parameters())
    ProjectedAdamW(net.named_parameters(), subspace=subspace())


def test_unnamed_parameters_are_refused_with_advice(net):
    with pytest.raises(SubspaceMismatchError, match=r"model.named_parameters\(\)"):
        ProjectedAdamW(net.parameters(), subspace=subspace())
    optimizer = ProjectedAdamW(net.parameters())
    optimizer.bind(net)
    optimizer.set_subspace(subspace())
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.zeros(2)))]})
    with pytest.raises(SubspaceMismatchError, match="no name"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


def wrong_stores() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    bad = basis(12, 5) * 1.01
    return {
        "unknown": (
            {f"x{i}": Projector(basis(3, 1)) for i in range(7)},
            SubspaceMismatchError,
            "x4 and 2 more.*strict",
        ),
        "size": ({"first.weight": Projector(basis(8, 2))}, SubspaceMismatchError, r"first.weight.*8 .right.*\(8, 12\)"),
        "skew": ({"first.weight": Projector(bad)}, SubspaceError, "first.weight.*basis is not orthonormal.*2.0"),
        "nan": ({"first.weight": Projector(bad * float("nan"))}, NonFiniteError, "first.weight.*NaN"),
        "type": ({"first.weight": basis(12, 2)}, TypeError, "Projector"),
    }


@pytest.mark.parametrize("kind", sorted(wrong_stores()))
def test_a_wrong_store_is_refused_and_changes_nothing(net, kind):
    store, error, words = wrong_stores()[kind]
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    with pytest.raises(error, match=words):
        optimizer.set_subspace(store)
    train(net, optimizer, 2)
    assert max(optimizer.violations().values()) <= ROUNDING
    assert len(optimizer.violations()) == 3
    with pytest.raises(error, match=words):
        ProjectedAdamW(net.named_parameters(), subspace=store)


def test_a_store_on_another_device_is_refused(net):
    optimizer = ProjectedAdamW(net.to("meta").named_parameters())
    with pytest.raises(
        RuntimeError, match=r"first.weight: the parameter is on meta but its projector on cpu.*store\.to"
    ):
        optimizer.set_subspace({"first.weight": subspace()["first.weight"]})
    assert optimizer.violations() == {}


def test_unknown_names_are_ignored_on_request_and_lost_ones_noticed(net):
    store = subspace() | {"elsewhere": Projector(basis(4, 1))}
    optimizer = ProjectedAdamW(net.named_parameters())
    optimizer.set_subspace(store, strict=False)
    train(net, optimizer, 2)
    fewer = {name: store[name] for name in ("prompt", "conv.weight")}
    with pytest.raises(SubspaceMismatchError, match="missing from the new subspace: first"):
        optimizer.set_subspace(fewer)
    optimizer.set_subspace(fewer, strict=False)
    assert optimizer.violations().keys() == fewer.keys()
    optimizer.set_subspace(None)
    assert optimizer.violations() == {}


def test_a_changed_store_is_followed(net):
    store = TinyStore()
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=store)
    train(net, optimizer, 2)
    assert optimizer.violations() == {}
    store["first.weight"] = Projector(basis(12, 5))
    before = values(net)["first.weight"]
    train(net, optimizer, 20)
    moved = net.first.weight - before
    assert (moved @ store["first.weight"].basis).norm() <= ROUNDING * moved.norm()
    assert optimizer.violations()["first.weight"] <= ROUNDING
    store["nowhere"] = Projector(basis(12, 5))
    frozen = values(net)
    with pytest.raises(SubspaceMismatchError, match="nowhere"):
        train(net, optimizer, 1)
    assert all(torch.equal(p, frozen[n]) for n, p in net.named_parameters())


def test_moments_survive_a_new_subspace(net):
    optimizer = ProjectedAdamW(net.named_parameters())
    train(net, optimizer, 3)
    kept = optimizer.state[net.first.weight]["exp_avg"].clone()
    optimizer.set_subspace(subspace())
    assert torch.equal(optimizer.state[net.first.weight]["exp_avg"], kept)
    assert optimizer.state[net.first.weight]["step"] == 3


def test_projectors_follow_a_model_that_changes_its_dtype(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    net.double()
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert max(optimizer.violations().values()) <= 1e-6  # the bases are float32


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_zero_gradients_and_zero_rate_are_a_bitwise_no_op(net, kind):
    """What distributed checkpoints do to a fresh optimizer; the reference FTP moved every weight there."""
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace())
    with torch.no_grad():
        net.first.weight[0, 0] = -0.0
    before = values(net)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if kind == "adamw" else 0.0
        group["weight_decay"] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p.detach(), before[name]), name
    if kind != "sgd":
        assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_parameters_without_gradient_are_left_out(net, kind):
    """Another subset at each step, in another order: nothing depends on positions."""
    twin = copy.deepcopy(net)
    pairs = list(net.named_parameters()), list(twin.named_parameters())[::-1]
    optimizers = [OPTIMIZERS[kind](named, subspace=subspace()) for named in pairs]
    twins = dict(twin.named_parameters())
    for i in range(9):
        for j, (name, p) in enumerate(net.named_parameters()):
            p.grad = None if (i + j) % 3 == 0 else torch.randn_like(p)
            twins[name].grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, twins[name]) for name, p in net.named_parameters())


def test_no_gradients_at_all_is_no_step(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace(), nonfinite="skip")
    before = values(net)
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first.weight", "head.bias"])
def test_a_nonfinite_gradient_skips_the_whole_step_or_propagates(net, kind, bad, where):
    plain = copy.deepcopy(net)
    careful = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace(), nonfinite="skip")
    careless = OPTIMIZERS[kind](plain.named_parameters(), subspace=subspace())
    train(net, careful, 2)
    train(plain, careless, 2)
    before, state = values(net), copy.deepcopy(careful.state_dict()["state"])
    for model, optimizer in ((net, careful), (plain, careless)):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        dict(model.named_parameters())[where].grad.view(-1)[0] = bad
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    after = careful.state_dict()["state"]
    assert all(torch.equal(after[i][k], state[i][k]) for i in state for k in state[i])
    assert careful.skipped_steps() == 1
    assert not dict(plain.named_parameters())[where].isfinite().all()
    train(net, careful, 1)
    assert careful.skipped_steps() == 1
    assert not torch.equal(net.first.weight, before["first.weight"])


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_grad_scaler_contract(net, kind):
    """What GradScaler hands to an optimizer that supports it: the scale and the flag, as tensors."""
    twin = copy.deepcopy(net)
    scaled = OPTIMIZERS[kind](net.named_parameters(), subspace=subspace(), fused=True)
    plain = OPTIMIZERS[kind](twin.named_parameters(), subspace=subspace(), fused=True)
    assert scaled._step_supports_amp_scaling
    assert not OPTIMIZERS[kind](net.named_parameters())._step_supports_amp_scaling
    for found in (0.0, 1.0, 0.0):
        before = values(net)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 8
        scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(found)
        scaled.step()
        if found:
            assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
        else:
            plain.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)
        assert scaled.state[p]["step"] == plain.state[q]["step"] == 2


def test_grad_scaler_of_torch(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (False, True, False):
        before = values(net)
        optimizer.zero_grad()
        loss = net(torch.randn(6, 12))
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bad == all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert optimizer.state[net.first.weight]["step"] == 2


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_resume_is_bit_exact(net, kind):
    store = subspace()
    optimizer = OPTIMIZERS[kind](net.named_parameters(), subspace=store)
    train(net, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(net, optimizer, 5, seed=1)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = Net()
    other.load_state_dict(saved["model"])
    again = OPTIMIZERS[kind](other.named_parameters(), subspace=store)
    again.load_state_dict(saved["optimizer"])
    train(other, again, 5, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_another_subspace_is_refused_on_load(net):
    store = subspace()
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=store)
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved["subspace"]["fingerprints"].keys() == store.keys()
    other = ProjectedAdamW(Net().named_parameters(), subspace=store | {"prompt": Projector(basis(12, 3))})
    for target in (other, ProjectedAdamW(Net().named_parameters())):
        with pytest.raises(SubspaceMismatchError, match=r"set_subspace.*prompt"):
            target.load_state_dict(saved)
        assert not target.state
        target.load_state_dict(saved, strict=False)
        assert len(target.state) == len(list(net.parameters()))


def test_distributed_checkpoints_initialise_a_fresh_optimizer_without_moving_anything(net):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    trained = ProjectedAdamW(net.named_parameters(), lr=1e-2, subspace=subspace())
    train(net, trained, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(net, trained))  # else both would share their moments
    other = copy.deepcopy(net)
    fresh = ProjectedAdamW(other.named_parameters(), lr=1e-2, subspace=subspace())
    before = values(other)
    set_optimizer_state_dict(other, fresh, saved)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    train(net, trained, 3)
    train(other, fresh, 3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_an_embedded_subspace_needs_no_store(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(include_subspace=True), buffer)
    buffer.seek(0)
    other = copy.deepcopy(net)
    again = ProjectedAdamW(other.named_parameters())
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.state_dict()["subspace"] == optimizer.state_dict()["subspace"]
    train(net, optimizer, 3)
    train(other, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_load_that_fails_changes_nothing(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    saved = optimizer.state_dict(include_subspace=True)
    foreign = copy.deepcopy(saved)
    foreign["subspace"]["tensors"]["unknown"] = foreign["subspace"]["tensors"]["prompt"]
    short = copy.deepcopy(saved)
    short["param_groups"] = []
    target = ProjectedAdamW(Net().named_parameters())
    for state, error in ((foreign, SubspaceMismatchError), (short, ValueError)):
        with pytest.raises(error):
            target.load_state_dict(state)
        assert not target.state
        assert "subspace" not in target.state_dict()
        assert target.violations() == {}


def test_deepcopy_and_pickle_keep_projecting(net):
    store = TinyStore()
    for name, value in subspace().items():
        store[name] = value
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=store)
    train(net, optimizer, 2)
    workers = pickle.loads(pickle.dumps((net, optimizer)))  # noqa: S301 - as a DataLoader worker gets it
    copies = [copy.deepcopy((net, optimizer)), workers]
    assert copies[0][1]._store is store  # a deepcopy shares the store
    train(net, optimizer, 3)
    for other, again in copies:
        train(other, again, 3)
        assert max(again.violations().values()) <= ROUNDING
        assert again.violations().keys() == store.keys()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_disables_nothing(net, to_none):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    optimizer.zero_grad(set_to_none=to_none)
    train(net, optimizer, 2)
    assert max(optimizer.violations().values()) <= ROUNDING


# -- loops of others ---------------------------------------------------------------------------------------------------


def test_pilots_generator_in_a_group(net):
    """PILOT's l2p replaces a group's parameters by a generator, which can be used once."""
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    optimizer.param_groups[0]["params"] = (p for p in net.parameters())
    train(net, optimizer, 3)
    assert len(optimizer.state) == len(list(net.parameters()))
    assert max(optimizer.violations().values()) <= ROUNDING


def test_avalanches_rewrite_then_bind(net):
    """Avalanche clears the state, leaves empty dictionaries, puts new (and frozen) parameters into the group."""
    store = subspace()
    optimizer = ProjectedAdamW(list(net.named_parameters())[:4])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    net.head = nn.Linear(8, 5)  # the grown head is a new parameter
    net.first.bias.requires_grad_(False)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    optimizer.state.clear()
    for p in net.parameters():
        optimizer.state[p] = {}
    with pytest.raises(SubspaceMismatchError, match="bind"):
        optimizer.set_subspace(store)
    optimizer.bind(net)
    optimizer.set_subspace(store)
    frozen = net.first.bias.detach().clone()
    train(net, optimizer, 3)
    assert max(optimizer.violations().values()) <= ROUNDING
    assert torch.equal(net.first.bias, frozen)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]


def test_mammoths_new_optimizer_for_each_task(net):
    store = TinyStore()
    for task in range(3):
        optimizer = ProjectedAdamW(net.named_parameters(), subspace=store)
        train(net, optimizer, 5, seed=task)
        assert all(v <= ROUNDING for v in optimizer.violations().values())
        store["first.weight"] = Projector(basis(12, 3 + task))
    assert "first.weight" in optimizer.violations()


def test_bind_moves_state_by_name_and_resets_what_was_resized(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 2)
    moment = optimizer.state[net.first.weight]["exp_avg"].clone()
    net.first.weight = nn.Parameter(net.first.weight.detach().clone())
    net.head = nn.Linear(8, 5)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.bind(net)
    assert sorted(str(w.message).partition(",")[0] for w in caught) == [
        "head.bias: resized from (3",
        "head.weight: resized from (3",
    ]
    assert torch.equal(optimizer.state[net.first.weight]["exp_avg"], moment)
    assert net.head.weight not in optimizer.state
    train(net, optimizer, 2)
    assert optimizer.violations()["first.weight"] <= ROUNDING


def test_a_resized_projected_parameter_is_refused_by_bind(net):
    optimizer = ProjectedAdamW(net.named_parameters(), subspace=subspace())
    train(net, optimizer, 1)
    old, bias = net.first, net.first.bias
    net.first = nn.Linear(9, 8)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    held = {p: dict(state) for p, state in optimizer.state.items()}
    with (
        pytest.warns(UserWarning, match=r"first\.weight: resized"),
        pytest.raises(SubspaceMismatchError, match="first"),
    ):
        optimizer.bind(net)
    assert optimizer.state.keys() == held.keys(), "a bind that fails moves no state"
    assert all(optimizer.state[p][key] is value for p, state in held.items() for key, value in state.items())
    net.first = old
    optimizer.param_groups[0]["params"] = list(net.parameters())
    optimizer.bind(net)
    assert optimizer.state[bias]["step"] == 1


def test_groups_can_grow_and_have_their_own_settings(net):
    named = dict(net.named_parameters())
    optimizer = ProjectedAdamW([{"params": [("first.weight", named["first.weight"])], "lr": 0.0, "weight_decay": 0.0}])
    optimizer.add_param_group({"params": [(n, p) for n, p in named.items() if n != "first.weight"], "lr": 0.1})
    optimizer.set_subspace(subspace())
    before = values(net)
    train(net, optimizer, 2)
    assert torch.equal(net.first.weight, before["first.weight"])
    assert not torch.equal(net.prompt, before["prompt"])
    assert max(optimizer.violations().values()) <= ROUNDING


def test_constructor_takes_generators_and_frozen_parameters(net):
    net.prompt.requires_grad_(False)
    optimizer = ProjectedAdamW((pair for pair in net.named_parameters()), subspace=subspace())
    train(net, optimizer, 2)
    assert net.prompt not in optimizer.state


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_compiled_step_is_one_graph_and_is_not_compiled_again(net, kind):
    twin = copy.deepcopy(net)
    rates = [torch.tensor(1e-2), torch.tensor(1e-2)]
    compiled, eager = (
        OPTIMIZERS[kind](m.named_parameters(), subspace=subspace()) for m, rate in zip((net, twin), rates, strict=True)
    )
    for optimizer, rate in zip((compiled, eager), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
    graphs, counts = [], []

    def backend(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module

    torch.compiler.reset()
    step = torch.compile(compiled.step, backend=backend, fullgraph=True)
    for i in range(5):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        for rate in rates:
            rate.fill_(1e-2 / (i + 1))
        step()
        eager.step()
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2, 2]  # the first step makes the state; a rate that changes compiles nothing
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


# -- any optimizer -----------------------------------------------------------------------------------------------------


def others() -> Iterator[Any]:
    yield lambda p: torch.optim.AdamW(p, lr=1e-2)
    yield lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)
    yield lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("make", list(others()), ids=["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("named", [True, False])
def test_project_updates_of_any_optimizer(net, make, named):
    optimizer = make(net.named_parameters() if named else net.parameters())
    store = subspace()
    handle = project_updates(optimizer, store, model=None if named else net)
    before = values(net)
    train(net, optimizer, 10)
    moved = net.first.weight - before["first.weight"]
    assert moved.norm() > 1e-4
    assert (moved @ store["first.weight"].basis).norm() <= ROUNDING * moved.norm()
    handle.remove()
    train(net, optimizer, 5)
    moved = net.first.weight - before["first.weight"]
    assert (moved @ store["first.weight"].basis).norm() > 1e-3 * moved.norm()


AGREE = [
    (ProjectedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    (ProjectedAdam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (ProjectedSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (ProjectedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (ProjectedSGD, torch.optim.SGD, {}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), AGREE)
def test_project_updates_agrees_with_the_projected_optimizer(net, ours, theirs, options):
    twin = copy.deepcopy(net)
    projected = ours(net.named_parameters(), lr=1e-2, subspace=subspace(), **options)
    wrapped = theirs(twin.named_parameters(), lr=1e-2, **options)
    project_updates(wrapped, subspace())
    before = values(net)
    train(net, projected, 5)
    train(twin, wrapped, 5)
    for (name, p), q in zip(values(net).items(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6 + 1e-4 * float((p - before[name]).abs().max())), name


def test_project_updates_refuses_what_it_cannot_name(net):
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(SubspaceMismatchError, match="no names"):
        project_updates(optimizer, subspace())
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(SubspaceMismatchError, match="unknown parameters: y"):
        project_updates(optimizer, {"y": Projector(basis(3, 1))}, model=net)


def test_nothing_warns_in_a_normal_run(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, ProjectedAdamW(net.named_parameters(), subspace=subspace()), 2)
