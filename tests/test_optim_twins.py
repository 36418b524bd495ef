"""Without a subspace each optimizer is its torch twin, bit for bit, and state moves between the two."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_kernels.ops import Projector
from cl_kernels.optim import ProjectedAdam, ProjectedAdamW, ProjectedSGD

TWINS = {
    "adam": (ProjectedAdam, torch.optim.Adam),
    "adamw": (ProjectedAdamW, torch.optim.AdamW),
    "sgd": (ProjectedSGD, torch.optim.SGD),
}


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (3,), (2, 3, 2, 2), (1, 4, 6))]


def walk(optimizers: list[Any], lists: list[list[Tensor]], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in zip(*lists, strict=True):
            grad = torch.randn(group[0].shape, generator=generator, dtype=torch.float64).to(group[0].dtype)
            for p in group:
                p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x[key], y[key]) for x, y in zip(a.state.values(), b.state.values(), strict=True) for key in y
    )


ADAM_FLAGS = [
    dict(zip(("amsgrad", "maximize", "weight_decay", "foreach"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (0.0, 0.1), (True, False, None))
]
SGD_FLAGS = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x, "foreach": f}
    for m, d, n in ((0, 0, False), (0.9, 0, False), (0.9, 0, True), (0.9, 0.5, False))
    for w, x, f in ((0.0, False, True), (0.1, True, None))
]


@pytest.mark.parametrize("store", [None, {}], ids=["none", "empty"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_twins_are_bit_equal_over_100_steps(name, store):
    ours, torchs = TWINS[name]
    for flags in ADAM_FLAGS:
        a, b = params(), params()
        named = [(f"p{i}", p) for i, p in enumerate(a)]
        pair = [ours(named, lr=1e-2, subspace=store, **flags), torchs(b, lr=1e-2, **flags)]
        walk(pair, [a, b], 100)
        assert equal(a, b), flags
        assert same_state(*pair), flags


@pytest.mark.parametrize("flags", [{"fused": True}, {"fused": True, "amsgrad": True}])
def test_fused_twins_are_equal(flags):
    a, b = params(), params()
    walk([ProjectedAdamW(a, **flags), torch.optim.AdamW(b, **flags)], [a, b], 20)
    assert equal(a, b)


def test_sgd_twins_are_bit_equal_over_100_steps():
    for flags in SGD_FLAGS:
        a, b = params(), params()
        pair = [ProjectedSGD(a, lr=1e-2, **flags), torch.optim.SGD(b, lr=1e-2, **flags)]
        walk(pair, [a, b], 100)
        assert equal(a, b), flags


def test_a_projector_without_directions_is_no_projector():
    a, b = params(), params()
    named = [(f"p{i}", p) for i, p in enumerate(a)]
    store = {"p0": Projector(torch.empty(7, 0))}
    walk([ProjectedAdamW(named, subspace=store), torch.optim.AdamW(b)], [a, b], 20)
    assert equal(a, b)


def test_other_parameters_are_the_same_with_and_without_a_subspace():
    a, b = params(), params()
    named = [(f"p{i}", p) for i, p in enumerate(a)]
    store = {"p0": Projector(torch.linalg.qr(torch.randn(7, 2))[0])}
    walk([ProjectedAdamW(named, subspace=store), torch.optim.AdamW(b)], [a, b], 20)
    assert equal(a[1:], b[1:])
    assert not torch.equal(a[0], b[0])


def test_tensor_learning_rate():
    a, b = params(), params()
    rates = [torch.tensor(1e-2), torch.tensor(1e-2)]
    pair = [ProjectedAdamW(a, lr=rates[0]), torch.optim.AdamW(b, lr=rates[1])]
    for i in range(5):
        walk(pair, [a, b], 1, seed=i)
        for rate in rates:
            rate.mul_(0.5)  # as a scheduler does
    assert equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype):
    a, b = params(dtype), params(dtype)
    walk([ProjectedAdamW(a), torch.optim.AdamW(b)], [a, b], 5)
    assert equal(a, b)


@pytest.mark.parametrize("name", sorted(TWINS))
@pytest.mark.parametrize("forward", [True, False])
def test_state_moves_between_twins(name, forward):
    options = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})
    first, second = TWINS[name] if forward else TWINS[name][::-1]
    a, b = params(), params()
    old, other = first(a, **options), second(b, **options)
    walk([old], [a], 10)
    buffer = io.BytesIO()
    torch.save(old.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    walk([old, other], [a, b], 10, seed=1)
    assert equal(a, b)


def test_adamw_stays_decoupled_when_it_loads_the_state_of_plain_adam():
    a, b = params(), params()
    plain, ours = torch.optim.Adam(a), ProjectedAdamW(b)
    walk([plain], [a], 2)
    ours.load_state_dict(plain.state_dict())
    assert ours.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("name", sorted(TWINS))
def test_state_has_the_names_and_kinds_of_torch(name):
    options = {"momentum": 0.9} if name == "sgd" else {"amsgrad": True}
    a, b = params(), params()
    pair = [TWINS[name][0](a, **options), TWINS[name][1](b, **options)]
    walk(pair, [a, b], 1)
    for x, y in zip(pair[0].state.values(), pair[1].state.values(), strict=True):
        assert x.keys() == y.keys()
        assert all(isinstance(v, Tensor) and v.dtype == y[k].dtype and v.shape == y[k].shape for k, v in x.items())
    assert set(pair[1].param_groups[0]) <= set(pair[0].param_groups[0])


def test_an_empty_state_is_no_state():
    a, b = params(), params()
    pair = [ProjectedAdamW(a), torch.optim.AdamW(b)]
    for p in a:
        pair[0].state[p] = {}
    walk(pair, [a, b], 3)
    assert equal(a, b)


BAD = [
    ("adam", {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ("adam", {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ("adam", {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0"),
    ("adam", {"eps": -1e-8}, ValueError, "Invalid epsilon"),
    ("adam", {"weight_decay": -1}, ValueError, "Invalid weight_decay"),
    ("adam", {"differentiable": True}, ValueError, "differentiable"),
    ("adam", {"nonfinite": "ignore"}, ValueError, "nonfinite"),
    ("adam", {"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr as a Tensor"),
    ("adam", {"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
    ("adam", {"subspace": 3}, TypeError, "subspace"),
    ("sgd", {"momentum": -0.1}, ValueError, "Invalid momentum"),
    ("sgd", {"nesterov": True}, ValueError, "Nesterov"),
]


@pytest.mark.parametrize(("name", "options", "error", "words"), BAD)
def test_bad_settings_are_refused(name, options, error, words):
    with pytest.raises(error, match=words):
        TWINS[name][0](params(), **options)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_sparse_gradients_are_refused_as_in_torch_and_nothing_moves(name):
    a = params()
    optimizer = TWINS[name][0]([("x", a[0]), ("y", a[1])], subspace={"y": Projector(torch.ones(3, 1) / 3**0.5)})
    a[0].grad, a[1].grad = torch.ones(5, 7), torch.ones(3).to_sparse()
    before = copy.deepcopy(a[:2])
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert equal(a[:2], before)
    assert not optimizer.state


def test_groups_are_checked_when_added():
    a = params()
    optimizer = ProjectedAdamW(a[:2])
    for group, words in (({"params": a[2:3], "lr": -1}, "learning rate"), ({"params": a[:1]}, "more than one")):
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group(group)
    optimizer.add_param_group({"params": a[2:], "lr": 0.5})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("scheduler_of", ["step", "onecycle", "plateau", "cosine"])
def test_schedulers(scheduler_of):
    make = {
        "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    }[scheduler_of]
    a, b = params(), params()
    pair = [ProjectedAdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)]
    schedulers = [make(o) for o in pair]
    for i in range(10):
        walk(pair, [a, b], 1, seed=i)
        for s in schedulers:
            s.step(1.0) if scheduler_of == "plateau" else s.step()
    assert equal(a, b)


def test_closures_run_with_gradients_and_their_value_comes_back():
    a, b = params(), params()
    for optimizer, p in ((ProjectedAdamW(a), a[0]), (torch.optim.AdamW(b), b[0])):

        def closure(optimizer: Any = optimizer, p: Tensor = p) -> Tensor:
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).requires_grad
    assert equal(a, b)
    assert torch.optim.AdamW(b).step() is ProjectedAdamW(a).step() is None


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_step_hooks_fire_once(name):
    optimizer = TWINS[name][0](params())
    count = []
    optimizer.register_step_pre_hook(lambda *_: count.append("pre"))
    optimizer.register_step_post_hook(lambda *_: count.append("post"))
    optimizer.step()
    assert count == ["pre", "post"]


def test_the_parent_is_torchs_base_class():
    assert all(
        torch.optim.AdamW not in ours.__mro__ and torch.optim.Adam not in ours.__mro__ for ours, _ in TWINS.values()
    )
