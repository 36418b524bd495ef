"""FTPAdamW and FTPSGD against their definition: the fifteen properties of method-trainable-projection 12.

Which test holds which property, here or elsewhere (`test_the_table_names_tests_that_exist` reads this):

    1  bound                        test_rows_stay_within_the_radius
    2  idempotent                   test_projecting_again_moves_nothing
    3  base where inactive          test_rows_inside_the_ball_are_the_base_steps_bit_for_bit, test_an_infinite_radius_is_torchs_twin_to_an_ulp
    4  excluded, frozen, accessor   test_excluded_parameters_are_torchs_bit_for_bit, test_the_accessor_tells_the_true_anchor_at_every_step
    5  radius gradient              test_the_radius_gradient_is_autograds_of_the_unclamped_map, test_the_masked_gradient_is_autograds_with_the_clamp
    6  parity                       test_it_follows_the_published_recurrence_over_200_steps
    7  range, first steps           test_first_steps_and_range_of_the_radius
    8  kappa                        test_kappa_0_never_shrinks_a_radius, test_kappa_cancels_where_all_gradients_shrink
    9  scale, rows, sign            test_loss_scale_row_order_and_sign_do_not_matter
    10 lazy clip                    test_the_clip_does_not_change_what_is_projected
    11 resume                       test_optim_ftp_saving: test_resume_is_bit_exact, test_optim_ftp_gpu: test_resume_on_a_gpu
    12 gradients come and go        test_optim_ftp_rules: test_state_follows_the_parameter_when_gradients_come_and_go, test_unknown_names_are_refused_with_the_nearest
    13 found_inf, NaN               test_optim_ftp_rules: test_an_overflow_of_the_scaler_changes_nothing, test_a_nan_leaves_radius_and_other_rows_valid
    14 syncs, capture, ranks        test_optim_ftp_gpu: test_no_step_waits_for_the_device, test_a_captured_step_is_the_eager_one, test_optim_ftp_rules: test_two_runs_are_equal_bit_for_bit, optim_ftp_workers: ftp_ddp_ranks_are_bit_equal
    15 16-bit weights               test_16_bit_weights_are_stepped_in_a_float32_master
"""  # noqa: E501 - a table

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import one_thread
from official_ftp import Base, Recurrence, Tiny, adamw, batch, gradients, rows, sgd
from torch import Tensor, nn

from cl_kernels.ops.weight_projection import FIRST, FLOORED, GAMMA, LARGEST, SECOND
from cl_kernels.optim import FTPSGD, FTPAdamW

# Two threads sum the tiny net's gradients in another order: a radius 7e-6 above its floor then ends at it.
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TESTS = Path(__file__).parent
SGD_FLAGS = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
MAKERS = {
    "adamw": lambda named, **k: FTPAdamW(named, **{"lr": 1e-3, "weight_decay": 0.1, **k}),
    "sgd": lambda named, **k: FTPSGD(
        named, **{"lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, **k}
    ),
}
kinds = pytest.mark.parametrize("kind", sorted(MAKERS))


def test_the_table_names_tests_that_exist() -> None:
    here = Path(__file__).stem
    table = re.findall(r"^    (\d+)\s+.{28}(.+)$", __doc__ or "", re.M)
    assert [int(number) for number, _ in table] == list(range(1, 16))
    for number, text in table:
        file = here
        for word in text.split(","):
            *stem, name = word.strip().split(": ")
            file = stem[0] if stem else file
            assert f"def {name}(" in (TESTS / f"{file}.py").read_text(encoding="utf-8"), (
                f"{number}: {file} has no {name}"
            )


@cache
def converged() -> Tiny:
    """Where a good part of the tensors falls onto its anchor again and again."""
    net = Tiny(seed=5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for i in range(300):
        images, answers = batch(i)
        optimizer.zero_grad()
        (net(images) - answers).square().mean().backward()
        optimizer.step()
    return net


def start(kind: str = "fresh", seed: int = 5) -> Tiny:
    return copy.deepcopy(converged()) if kind == "converged" else Tiny(seed=seed)


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def backward(net: nn.Module, i: int) -> None:
    dtype = next(net.parameters()).dtype
    images, answers = batch(i, dtype)
    net.zero_grad()
    (net(images) - answers).square().mean().backward()


def record_of(optimizer: Any, p: Tensor) -> Tensor:
    record: Tensor = optimizer.state[p]["radius"]
    return record


# -- 6: the published recurrence ---------------------------------------------------------------------------------------

PARITY = [  # kind, start, kappa, lr, base, does any tensor fall back onto its anchor?
    ("adamw", "fresh", 0.0, 1e-3, adamw(decay=0.1), False),
    ("adamw", "fresh", 0.5, 1e-3, adamw(decay=0.1), False),
    ("adamw", "converged", 1.0, 1e-3, adamw(decay=0.1), True),
    ("sgd", "fresh", 0.0, 1e-4, sgd(0.9, nesterov=True, decay=0.01), False),
    ("sgd", "converged", 0.5, 1e-4, sgd(0.9, nesterov=True, decay=0.01), True),
]


@pytest.mark.parametrize(("kind", "at", "kappa", "lr", "base", "floors"), PARITY)
def test_it_follows_the_published_recurrence_over_200_steps(
    kind: str, at: str, kappa: float, lr: float, base: Base, floors: bool
) -> None:
    """Weights, radii and which tensors lie on their anchor; with kappa = 0.5 the first step has lr = 0 (warm-up)."""
    net = start(at)
    official = Recurrence(weights_of(net), base, kappa, excluded=("head.weight", "head.bias"))
    optimizer = MAKERS[kind](net.named_parameters(), lr=lr, kappa=kappa)
    apart, radius_apart, relative, fell, acted = 0.0, 0.0, 0.0, 0, 0
    opened: set[str] = set()
    for i in range(200):
        rate = 0.0 if kappa == 0.5 and i == 0 else lr
        optimizer.param_groups[0]["lr"] = rate
        official.step(gradients(net, official.weights, i), rate)
        backward(net, i)
        optimizer.step()
        radii = optimizer.radii()
        for name, p in net.named_parameters():
            apart = max(apart, float((p.detach() - official.weights[name]).abs().max()))
            if name in radii:
                wanted, down = float(official.radii[name]), official.floored(name)
                assert down == bool(record_of(optimizer, p)[FLOORED]), f"{name}, step {i + 1}"
                fell += down and name in opened
                opened |= set() if down else {name}
                radius_apart = max(radius_apart, abs(radii[name] - wanted))
                relative = max(relative, (abs(radii[name] - wanted) - 2e-8) / wanted)
        acted += sum(share > 0 for share in optimizer.projected_fraction().values())
    assert bool(fell) == floors
    assert acted > 400  # of 1,600 tensor-steps
    if floors:
        assert apart <= 1e-4
        assert radius_apart <= 5e-4
    else:
        assert apart <= 2e-6
        assert relative <= 1e-5


@kinds
def test_it_follows_the_recurrence_in_float64(kind: str) -> None:
    """Where only the first step differs: W is W_0 exactly there, and within 1e-8 of it a row officially."""
    net = start().double()
    base = adamw(decay=0.1, amsgrad=True) if kind == "adamw" else sgd(0.9, dampening=0.5, decay=0.01)
    official = Recurrence(weights_of(net), base, 1.0, excluded=("head.weight", "head.bias"))
    own = {"amsgrad": True} if kind == "adamw" else {"nesterov": False, "dampening": 0.5}
    optimizer = MAKERS[kind](net.named_parameters(), **own)
    for i in range(40):
        official.step(gradients(net, official.weights, i), optimizer.param_groups[0]["lr"])
        backward(net, i)
        optimizer.step()
        for name, p in net.named_parameters():
            assert float((p.detach() - official.weights[name]).abs().max()) <= 3e-8, (name, i)


# -- the ball ----------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("at", ["fresh", "converged"])
def test_rows_stay_within_the_radius(kind: str, at: str) -> None:
    net = start(at)
    anchors = weights_of(net)
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-2 if kind == "adamw" else 1e-3)
    touched = 0
    for i in range(40):
        backward(net, i)
        optimizer.step()
        radii = optimizer.radii()
        for name, radius in radii.items():
            w = rows(dict(net.named_parameters())[name].detach())
            lengths = (w.double() - rows(anchors[name]).double()).abs().sum(1)
            slack = w.shape[1] * 2**-24 * w.abs().amax(1).double()
            assert bool((lengths <= radius * (1 + 4 * 2**-23) + slack).all()), (name, i)
            touched += int((lengths >= 0.999 * radius).sum())
    assert touched > 100
    assert optimizer.distances().keys() == radii.keys()
    assert all(value <= 1.001 * radii[name] + 1e-6 for name, value in optimizer.distances().items())


@kinds
def test_projecting_again_moves_nothing(kind: str) -> None:
    """A step without gradient and rate at a radius that many rows touch."""
    from cl_kernels.ops.weight_projection import project_to_anchor

    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-2 if kind == "adamw" else 1e-3)
    for i in range(10):
        backward(net, i)
        optimizer.step()
    anchors, radii = optimizer.anchors(), optimizer.radii()
    for name, p in net.named_parameters():
        if name in radii:
            again = project_to_anchor(p.detach(), anchors[name], radii[name])
            w = rows(p.detach())
            moved = (rows(again) - w).abs().sum(1)
            assert bool((moved <= w.shape[1] * 2**-24 * w.abs().amax(1) + 1e-12).all()), name


def trained(kind: str, steps: int = 30, **options: Any) -> tuple[Tiny, Any]:
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), **options)
    for i in range(steps):
        backward(net, i)
        optimizer.step()
    return net, optimizer


@kinds
def test_rows_inside_the_ball_are_the_base_steps_bit_for_bit(kind: str) -> None:
    net, optimizer = trained(kind)
    other, free = copy.deepcopy((net, optimizer))
    free.param_groups[0]["radius"] = float("inf")
    for n, o in ((net, optimizer), (other, free)):
        backward(n, 100)
        o.step()
    inside = 0
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        if name.startswith("head"):
            assert torch.equal(p, q)
            continue
        lengths = (rows(q.detach()) - rows(optimizer.anchors()[name])).abs().sum(1)
        kept = lengths < 0.999 * record_of(optimizer, p)[GAMMA]
        inside += int(kept.sum())
        assert torch.equal(rows(p.detach())[kept], rows(q.detach())[kept]), name
    assert inside >= 5


def ulp(x: Tensor) -> Tensor:
    return torch.nextafter(x.abs(), torch.full_like(x, torch.inf)) - x.abs()


TWINS = [
    ("adamw", {"weight_decay": 0.1}),
    ("adamw", {"amsgrad": True, "maximize": True}),
    ("adamw", {"eps": 1e-4, "betas": (0.8, 0.95), "weight_decay": 0.0}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5, "nesterov": False, "maximize": True}),
    ("sgd", {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
]


@pytest.mark.parametrize(("kind", "options"), TWINS)
def test_an_infinite_radius_is_torchs_twin_to_an_ulp(kind: str, options: dict[str, Any]) -> None:
    net, twin = start(), start()
    ours = MAKERS[kind](net.named_parameters(), lr=1e-3, radius=float("inf"), exclude=(), **options)
    given = {key: ours.param_groups[0][key] for key in {"lr", "weight_decay", *options}}
    torchs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](twin.named_parameters(), **given)
    generator = torch.Generator().manual_seed(2)
    for i in range(50):
        before = weights_of(twin)
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                p.copy_(q)  # from the same weights, so that each step is compared by itself
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
        torchs.step()
        ours.step()
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            old, new = before[name], q.detach()
            allowed = ulp(torch.maximum(old.abs(), new.abs())) + 4 * ulp((new - old).abs().max())  # and of the update
            assert bool(((p.detach() - new).abs() <= allowed).all()), (name, i)
    assert set(ours.projected_fraction().values()) == {0.0}
    assert set(ours.radii().values()) == {float("inf")}


@kinds
def test_a_fixed_radius_is_a_fixed_radius(kind: str) -> None:
    net = start()
    anchors = weights_of(net)
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-2 if kind == "adamw" else 1e-3, radius=0.01)
    for i in range(20):
        backward(net, i)
        optimizer.step()
    assert all(radius == pytest.approx(0.01) for radius in optimizer.radii().values())
    assert max(optimizer.distances().values()) == pytest.approx(0.01, rel=1e-4)
    at_zero = MAKERS[kind](net.named_parameters(), anchors=anchors, radius=0.0)
    backward(net, 0)
    at_zero.step()
    for name in at_zero.radii():
        assert torch.equal(dict(net.named_parameters())[name], anchors[name])


# -- 4: who is held, and to what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@kinds
def test_excluded_parameters_are_torchs_bit_for_bit(kind: str, flags: dict[str, Any]) -> None:
    """Both get the same gradients: the others' weights differ."""
    net, twin = start(), start()
    left_out = [name for name, _ in net.named_parameters() if name.startswith(("fc1.", "head."))]
    ours = MAKERS[kind](net.named_parameters(), exclude=("fc1.*", "head"), **flags)
    torchs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    given = {k: ours.param_groups[0][k] for k in ("lr", "weight_decay", "momentum", "nesterov") if k in ours.defaults}
    theirs = torchs([p for n, p in twin.named_parameters() if n in left_out], **given, **flags)
    for i in range(20):
        backward(net, i)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) == (name in left_out), name
    assert left_out
    assert not set(left_out) & set(ours.radii())


@kinds
@pytest.mark.parametrize("at", ["fresh", "converged"])
@pytest.mark.parametrize("anchor_dtype", [None, "auto"])
def test_the_accessor_tells_the_true_anchor_at_every_step(kind: str, at: str, anchor_dtype: Any) -> None:
    net = start(at)
    if anchor_dtype:
        net = net.bfloat16().float()  # as a checkpoint that was released in bfloat16
    anchors, frozen = weights_of(net), net.pos.detach().clone()
    net.pos.requires_grad_(False)
    optimizer = MAKERS[kind](net.named_parameters(), anchor_dtype=anchor_dtype)
    prints, floors = optimizer.fingerprints(), 0
    for i in range(25):
        backward(net, i)
        optimizer.step()
        now = optimizer.anchors()
        assert all(torch.equal(value, anchors[name]) and value.dtype == torch.float32 for name, value in now.items())
        for value in now.values():
            value.zero_()  # a copy: nobody's memory
        assert optimizer.fingerprints() == prints
        floors += optimizer.floor_rate() > 0
    assert floors >= 1
    assert torch.equal(net.pos, frozen)
    assert "pos" not in optimizer.anchors()
    slots = [held.slot for held in optimizer._held.values()]
    assert {slot.dtype for slot in slots} == {torch.bfloat16 if anchor_dtype else torch.float32}
    places = {p.data_ptr() for p in net.parameters()}
    assert not places & {slot.data_ptr() for slot in slots}
    assert all("anchors" not in key for group in optimizer.param_groups for key in group)


# -- 5: the radius gradient --------------------------------------------------------------------------------------------


def mid_run(masked: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], dict[str, Tensor], Any]:
    """Anchors, weights, radii, gradients at those weights, and the optimizer that has just stepped with them."""
    net = start().double()
    optimizer = FTPAdamW(net.named_parameters(), lr=1e-3, masked=masked)
    for i in range(25):
        backward(net, i)
        optimizer.step()
    anchors, weights, radii = optimizer.anchors(), weights_of(net), optimizer.radii()
    backward(net, 99)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    return anchors, weights, radii, grads, optimizer


def test_the_radius_gradient_is_autograds_of_the_unclamped_map() -> None:
    """h = d/dgamma of <G, W_0 + (gamma / n) c> with n the norm: of rows inside too, where the clamp has slope 0."""
    anchors, weights, radii, grads, optimizer = mid_run(masked=False)
    found = optimizer.radius_gradients()
    for name, h in found.items():
        d = rows(weights[name]) - rows(anchors[name])
        lengths = d.abs().sum(1) + 1e-8
        gamma = torch.tensor(radii[name], dtype=torch.float64, requires_grad=True)
        r = torch.minimum(gamma.detach(), lengths)  # rows on the sphere were scaled from c = d n / gamma
        mapped = gamma / r[:, None] * d
        (wanted,) = torch.autograd.grad((rows(grads[name]) * mapped).sum(), gamma)
        assert h == pytest.approx(float(wanted), rel=1e-6), name
        assert abs(h) <= float(rows(grads[name]).abs().amax(1).sum()) * (1 + 1e-6)


def test_the_masked_gradient_is_autograds_with_the_clamp() -> None:
    anchors, weights, radii, grads, optimizer = mid_run(masked=True)
    found, inside = optimizer.radius_gradients(), 0
    for name, h in found.items():
        d, radius = rows(weights[name]) - rows(anchors[name]), radii[name]
        on = d.abs().sum(1) >= radius * (1 - 1e-4)
        inside += int((~on).sum())
        wanted = ((rows(grads[name]) * d).sum(1) / radius)[on].sum()
        assert h == pytest.approx(float(wanted), rel=1e-5, abs=1e-12), name
    assert inside >= 5


# -- 7 to 10 -----------------------------------------------------------------------------------------------------------


@kinds
def test_first_steps_and_range_of_the_radius(kind: str) -> None:
    net = start()
    anchors = weights_of(net)
    optimizer = MAKERS[kind](net.named_parameters(), lr=0.1)
    grads = {p: torch.randn_like(p) for p in net.parameters()}
    for i in range(20):
        for p, grad in grads.items():
            p.grad = grad if i < 2 else torch.randn_like(p)  # two batches that agree: outward is downhill
        optimizer.step()
        for name, p in net.named_parameters():
            if name.startswith("head"):
                continue
            record = record_of(optimizer, p)
            assert 0.99e-8 <= float(record[GAMMA]) <= float(record[LARGEST]) * (1 + 1e-6)
            if i == 0:
                assert torch.equal(p, anchors[name])
                assert float(record[GAMMA]) == pytest.approx(1e-8)
            if i == 1:
                assert float(record[GAMMA]) == pytest.approx(0.7441e-2, rel=1e-3)


@kinds
def test_kappa_0_never_shrinks_a_radius(kind: str) -> None:
    """But for the clip to the largest row, which comes after."""
    net = start()
    optimizer = MAKERS[kind](net.named_parameters(), kappa=0.0)
    before: dict[str, float] = {}
    positive = 0
    for i in range(60):
        backward(net, i)
        optimizer.step()
        now = optimizer.radii()
        for name, p in net.named_parameters():
            if name in before:
                largest = float(record_of(optimizer, p)[LARGEST])
                assert now[name] >= min(before[name], largest) * (1 - 1e-6), (name, i)
        positive += sum(h > 0 for h in optimizer.radius_gradients().values())
        before = now
    assert positive >= 3


def test_kappa_cancels_where_all_gradients_shrink() -> None:
    """Adam is scale invariant: 50 steps with h > 0 take the radius the same way for 1, 0.5 and 0.1."""
    paths = {}
    for kappa in (1.0, 0.5, 0.1):
        p = nn.Parameter(torch.zeros(4, 16))
        optimizer = FTPSGD([("w", p)], lr=1e-9, kappa=kappa)
        p.grad = torch.ones_like(p)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["radius"] = torch.tensor([0.9, 0, 0, 9.0, 0, 0, 0, 0])
        saved["state"][0].pop("anchor_slot")
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            p.fill_(0.0625)
        path = []
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert optimizer.radius_gradients()["w"] > 0
            path.append(optimizer.radii()["w"])
        paths[kappa] = torch.tensor(path)
    assert paths[1.0][0] > paths[1.0][-1] + 0.3
    for kappa in (0.5, 0.1):
        torch.testing.assert_close(paths[kappa], paths[1.0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("change", ["scaled", "permuted", "mirrored"])
def test_loss_scale_row_order_and_sign_do_not_matter(change: str) -> None:
    """SGD at a rate divided by the loss's scale; rows in another order; weights and gradients mirrored at zero."""
    torch.manual_seed(3)
    anchor, order = 0.02 * torch.randn(6, 10), torch.randperm(6)
    targets = anchor + 0.05 * torch.randn(6, 10)
    scale = 64.0 if change == "scaled" else 1.0
    plain, other = nn.Parameter(anchor.clone()), nn.Parameter(anchor[order] if change == "permuted" else anchor.clone())
    if change == "mirrored":
        with torch.no_grad():
            other.neg_()
    a, b = FTPSGD([("w", plain)], lr=0.1, momentum=0.9), FTPSGD([("w", other)], lr=0.1 / scale, momentum=0.9)
    for i in range(30):
        noise = torch.randn(6, 10, generator=torch.Generator().manual_seed(i))
        grad = plain.detach() - targets + 0.05 * noise
        plain.grad = grad
        other.grad = {"scaled": grad * scale, "permuted": grad[order], "mirrored": -grad}[change]
        a.step()
        b.step()
        assert a.radii()["w"] == pytest.approx(b.radii()["w"], rel=2e-5, abs=1e-9)
    back = {"scaled": other, "permuted": other[torch.argsort(order)], "mirrored": -other}[change]
    torch.testing.assert_close(back, plain, rtol=0, atol=1e-6)
    assert a.radii()["w"] > 1e-3


def test_the_clip_does_not_change_what_is_projected() -> None:
    """A radius above every norm scales no row, clipped or not: the record's radius is clipped after the projection."""
    net, optimizer = trained("adamw", 5)
    p = net.fc1.weight
    free, unclipped = copy.deepcopy((net, optimizer))
    for o, n in ((optimizer, net), (unclipped, free)):
        record = record_of(o, n.fc1.weight)
        record[FIRST], record[SECOND] = 0.0, 0.0
    record_of(unclipped, free.fc1.weight)[GAMMA] = 1e3
    record_of(optimizer, p)[GAMMA] = 1.0
    for o, n in ((optimizer, net), (unclipped, free)):
        backward(n, 50)
        o.step()
    assert torch.equal(p, free.fc1.weight)
    assert record_of(optimizer, p)[GAMMA] == record_of(optimizer, p)[LARGEST]
    assert record_of(unclipped, free.fc1.weight)[GAMMA] == record_of(optimizer, p)[LARGEST]


# -- 15: 16-bit weights ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_stepped_in_a_float32_master(kind: str, dtype: torch.dtype) -> None:
    net = start().to(dtype)
    anchors = {name: w.float() for name, w in weights_of(net).items()}
    optimizer = MAKERS[kind](net.named_parameters(), lr=1e-3)
    for i in range(30):
        grads = gradients(start(), {name: w.float() for name, w in weights_of(net).items()}, i)
        for name, p in net.named_parameters():
            p.grad = grads[name].to(dtype)
        optimizer.step()
        for name, radius in optimizer.radii().items():
            p = dict(net.named_parameters())[name]
            state = optimizer.state[p]
            master = state["master"]
            assert {v.dtype for v in state.values()} == {torch.float32}
            assert torch.equal(p, master.to(dtype))
            w = rows(master).double()
            lengths = (w - rows(anchors[name]).double()).abs().sum(1)
            assert bool((lengths <= radius * (1 + 4 * 2**-23) + w.shape[1] * 2**-24 * w.abs().amax(1)).all()), (name, i)
    assert max(optimizer.radii().values()) > 1e-3
    assert {held.slot.dtype for held in optimizer._held.values()} == {dtype}
