"""What the FTP steps promise, on every backend: the bound, the base step, the radius and its gradient, the anchor."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_projection_cases import written

import cl_kernels as clk
from cl_kernels.ops import _native
from cl_kernels.ops import weight_projection as wp
from cl_kernels.ops.weight_projection import lists, reference
from cl_kernels.ops.weight_projection.reference import as_rows, row_norms

SHAPES: list[tuple[int, ...]] = [(6, 147), (300,), (4, 3, 3, 3), (1, 5, 64), (12, 1)]
ULP, MU, TINY = 2.0**-23, 1e-2, 1e-8


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with clk.use_backend(request.param):
        yield request.param


def start(base: str = "adam", dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any) -> Any:
    """Pre-trained weights on their anchors, fresh state."""
    anchors = [(torch.randn(s, dtype=torch.float64) * 0.02).to(dtype) for s in shapes]
    p: dict[str, Any] = {"params": [a.clone() for a in anchors], "grads": [torch.zeros_like(a) for a in anchors]}
    p |= {"anchors": anchors, "steps": [torch.zeros(()) for _ in anchors]}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p["radii"] = [torch.zeros(8, dtype=wide) for _ in anchors]
    if base == "adam":
        p |= {"exp_avgs": [torch.zeros_like(a, dtype=wide) for a in anchors]}
        p |= {"exp_avg_sqs": [torch.zeros_like(a, dtype=wide) for a in anchors]}
        p |= {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    else:
        p |= {"momentum_buffers": [torch.zeros_like(a, dtype=wide) for a in anchors]}
        p |= {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.0}
    return p | options


def move(p: dict[str, Any], grads: list[Tensor] | None = None) -> None:
    if grads is not None:
        for target, value in zip(p["grads"], grads, strict=True):
            target.copy_(value)
    (wp.ftp_adam_step_ if "beta1" in p else wp.ftp_sgd_step_)(**p)


def anchors_of(p: dict[str, Any]) -> list[Tensor]:
    """The true anchors: the weights themselves while the buffers hold c."""
    floored = [bool(r[wp.FLOORED]) for r in p["radii"]]
    return [w if f else a for w, a, f in zip(p["params"], p["anchors"], floored, strict=True)]


def train(p: dict[str, Any], steps: int, seed: int = 0) -> Iterator[int]:
    """A quadratic loss around a target away from the anchor, with noise; yields after each step."""
    generator = torch.Generator().manual_seed(seed)
    targets = [a + torch.randn(a.shape, generator=generator).to(a) * 0.02 for a in p["anchors"]]
    for t in range(steps):
        noise = [torch.randn(w.shape, generator=generator).to(w) * 0.01 for w in p["params"]]
        move(p, [w - goal + n for w, goal, n in zip(p["params"], targets, noise, strict=True)])
        yield t


# -- property 1: the bound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("norm", ["row_l1", "row_l2", "l2"])
def test_rows_stay_within_the_radius(backend, base, norm):
    p = start(base, norm=norm, lr=3e-3 if base == "adam" else 0.3)
    code, hit = wp.NORMS[norm], 0.0
    for _ in train(p, 30):
        for w, a, r in zip(p["params"], anchors_of(p), p["radii"], strict=True):
            rows, away = as_rows(w.double(), code), as_rows(w.double() - a.double(), code)
            slack = rows.shape[1] * 2.0**-24 * rows.abs().amax(1)
            assert (row_norms(away, code) <= float(r[wp.GAMMA]) * (1 + 4 * ULP) + slack).all()
            hit += float(r[wp.PROJECTED])
    assert hit > 10  # rows were projected


def test_the_radius_lies_between_its_floor_and_the_largest_row(backend):
    p = start(lr=3e-3)
    for _ in train(p, 40):
        for r in p["radii"]:
            assert float(torch.tensor(TINY)) <= float(r[wp.GAMMA]) <= float(r[wp.LARGEST])
            assert 0 <= float(r[wp.PROJECTED]) <= 1
    assert all(0 < float(r[wp.FIRED]) <= 40 for r in p["radii"])


# -- property 3: the base step where nothing is projected --------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_rows_within_the_radius_are_those_of_the_base_step_bit_for_bit(backend, base):
    """Half the rows of one step are outside; the others are what an infinite radius gives."""
    p = start(base)
    for _ in train(p, 3):
        pass
    free = copy.deepcopy(p) | {"fixed_radius": math.inf}
    move(p | {"fixed_radius": 0.05})
    move(free)
    shares = []
    for w, base_w, a in zip(p["params"], free["params"], anchors_of(free), strict=True):
        n = row_norms(as_rows(base_w - a, 0), 0) + TINY
        inside = n <= 0.05 * (1 - 1e-5)
        assert torch.equal(as_rows(w, 0)[inside], as_rows(base_w, 0)[inside])
        outside = n > 0.05 * (1 + 1e-5)
        assert (as_rows(w, 0)[outside] != as_rows(base_w, 0)[outside]).any(1).all()
        shares.append(float(inside.double().mean()))
    assert 0 < sum(shares) / len(shares) < 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_infinite_radius_is_adamw_to_an_ulp_a_step(backend, decay):
    p = start(fixed_radius=math.inf, weight_decay=decay)
    twins = [torch.nn.Parameter(w.clone()) for w in p["params"]]
    twin = torch.optim.AdamW(twins, lr=p["lr"], weight_decay=decay, foreach=False)
    for t in train(p, 20):
        for own, g in zip(twins, p["grads"], strict=True):
            own.grad = g.clone()
        twin.step()
        for w, own in zip(p["params"], twins, strict=True):
            ulp = torch.finfo(torch.float32).eps * torch.maximum(own.detach().abs(), torch.tensor(0.02))
            assert ((w - own.detach()).abs() <= (t + 1) * 2 * ulp).all()


@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening"), [(0.9, True, 0.0), (0.9, False, 0.3), (0.0, False, 0.0)]
)
def test_an_infinite_radius_is_sgd_to_an_ulp_a_step(backend, momentum, nesterov, dampening):
    settings = {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": 0.1}
    p = start("sgd", fixed_radius=math.inf, **settings) | ({} if momentum else {"momentum_buffers": None})
    twins = [torch.nn.Parameter(w.clone()) for w in p["params"]]
    twin = torch.optim.SGD(twins, lr=p["lr"], foreach=False, **settings)
    for t in train(p, 20):
        for own, g in zip(twins, p["grads"], strict=True):
            own.grad = g.clone()
        twin.step()
        for w, own in zip(p["params"], twins, strict=True):
            ulp = torch.finfo(torch.float32).eps * torch.maximum(own.detach().abs(), torch.tensor(0.02))
            assert ((w - own.detach()).abs() <= (t + 1) * 2 * ulp).all()


# -- property 5: the radius gradient -----------------------------------------------------------------------------------


def settled(dtype: torch.dtype = torch.float64, gamma: float = 0.3, **options: Any) -> tuple[dict[str, Any], Any]:
    """W = project(W_0 + c) with a known radius: rows 0 to 3 outside (active), rows 4 and 5 well inside."""
    p = start(dtype=dtype, shapes=[(6, 20)], **options)
    c = torch.randn(6, 20, dtype=dtype)
    c = c / c.abs().sum(1, keepdim=True) * torch.tensor([1.0, 0.7, 0.5, 0.4, 0.2, 0.1], dtype=dtype)[:, None]
    n = c.abs().sum(1, keepdim=True) + TINY
    p["params"][0] = p["anchors"][0] + (gamma / n).clamp(max=1.0) * c
    p["radii"][0][[wp.GAMMA, wp.FIRST, wp.SECOND]] = torch.tensor([gamma, 0.1, 0.1], dtype=p["radii"][0].dtype)
    p["steps"] = [torch.tensor(5.0)]
    p["grads"] = [torch.randn(6, 20, dtype=dtype)]
    return p, (c, n)


def radius_gradient(c: Tensor, n: Tensor, grad: Tensor, gamma: float, clamp: bool) -> float:
    """Autograd of <G, W_0 + s c> in gamma, s = gamma / n with n constant."""
    g = torch.tensor(gamma, dtype=c.dtype, requires_grad=True)
    s = g / n.detach()
    ((s.clamp(0, 1) if clamp else s) * c * grad).sum().backward()
    return float(g.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_the_radius_gradient_is_autograds(backend, masked):
    """All rows as if active by default; with the mask, what the clamp lets through; and a central difference of it.

    The cached form divides by the norm before the projection, this one by the norm of what is left: equal exactly.
    """
    p, (c, n) = settled(masked=masked)
    grad = p["grads"][0].clone()
    move(p)
    found = float(p["radii"][0][wp.GRADIENT])
    assert found == pytest.approx(radius_gradient(c, n, grad, 0.3, clamp=masked), rel=1e-6)
    assert found != pytest.approx(radius_gradient(c, n, grad, 0.3, clamp=not masked), rel=1e-3)
    if masked:
        up, down = (((0.3 + e) / n).clamp(max=1.0) * c * grad for e in (1e-6, -1e-6))
        assert found == pytest.approx(float((up - down).sum()) / 2e-6, rel=1e-6)


def test_with_all_rows_outside_mask_and_clamp_change_nothing(backend):
    found = []
    for masked in (False, True):
        torch.manual_seed(3)
        p, (c, n) = settled(gamma=0.09, masked=masked)
        grad = p["grads"][0].clone()
        move(p)
        found.append(float(p["radii"][0][wp.GRADIENT]))
        assert found[-1] == pytest.approx(radius_gradient(c, n, grad, 0.09, clamp=True), rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_no_cache_gives_the_cached_radius_gradient(backend, dtype, share):
    """Against c and n kept from the step before, over a training, floored steps included; as a share of sum |term|."""
    p = start(dtype=dtype, lr=3e-3)
    true = [a.clone() for a in p["anchors"]]
    targets = [a + torch.randn_like(a) * 0.02 for a in true]
    kept: list[tuple[Tensor, Tensor]] = []
    floored = 0
    for _ in range(25):
        grads = [w - goal + torch.randn_like(w) * 0.01 for w, goal in zip(p["params"], targets, strict=True)]
        free = copy.deepcopy(p) | {"fixed_radius": math.inf}  # gives W - u
        move(free, grads)
        move(p, grads)
        for (c, n), g, r in zip(kept, grads, p["radii"], strict=bool(kept)):
            terms = (as_rows(g, 0) * c).sum(1) / n
            assert abs(float(r[wp.GRADIENT]) - float(terms.sum())) <= share * float(terms.abs().sum())
        rows = [as_rows(w - a, 0) for w, a in zip(free["params"], true, strict=True)]
        kept = [(c, row_norms(c, 0) + TINY) for c in rows]
        floored += sum(bool(r[wp.FLOORED]) for r in p["radii"])
    assert floored >= len(SHAPES)  # the first step of each at least
    assert all(float(r[wp.FIRED]) > 1 for r in p["radii"])


def test_the_radius_gradient_is_bounded_by_the_gradient(backend):
    """Hoelder: |h| <= sum_i max_j |G_ij|."""
    p = start(lr=3e-3)
    for _ in train(p, 30):
        for g, r in zip(p["grads"], p["radii"], strict=True):
            assert abs(float(r[wp.GRADIENT])) <= float(as_rows(g, 0).abs().amax(1).sum()) * (1 + 1e-3)


# -- properties 4, 7, 8: how the radius moves --------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_first_step_returns_to_the_anchor_and_the_second_opens_the_radius(backend, base):
    p = start(base)
    for w in p["params"]:
        w += torch.randn_like(w) * 0.01  # not even from the anchor
    true = [a.clone() for a in p["anchors"]]
    grads = [torch.randn_like(w) for w in p["params"]]
    free = copy.deepcopy(p) | {"fixed_radius": math.inf}
    move(free, grads)
    move(p, grads)
    for i, r in enumerate(p["radii"]):
        assert torch.equal(p["params"][i], true[i])
        assert r[wp.FLOORED] == 1
        assert float(r[wp.GAMMA]) == float(torch.tensor(TINY))
        assert torch.equal(p["anchors"][i], free["params"][i] - true[i])  # c waits in the anchor's buffer
    move(p, grads)  # the same gradient again: h is negative, the radius opens by 0.7441 mu
    for i, r in enumerate(p["radii"]):
        assert r[wp.FLOORED] == 0
        assert torch.equal(p["anchors"][i], true[i])
        assert float(r[wp.GRADIENT]) < 0
        assert float(r[wp.GAMMA]) - TINY == pytest.approx(0.7441 * MU, rel=1e-3)


def test_the_anchors_bytes_survive_every_step(backend):
    """In the weights while the radius is at its floor, in the buffer otherwise; from a converged start, which falls."""
    for dtype in (torch.float32, torch.bfloat16):
        p = start(lr=1e-2)
        true = [a.bfloat16().float() for a in p["anchors"]]
        p["params"] = [a.clone() for a in true]
        p["anchors"] = [a.to(dtype, copy=True) for a in true]
        falls = 0
        for t in range(60):
            move(p, [w - a + torch.randn_like(w) * 0.01 for w, a in zip(p["params"], true, strict=True)])
            assert all(torch.equal(x.float(), a) for x, a in zip(anchors_of(p), true, strict=True))
            falls += sum(bool(r[wp.FLOORED]) for r in p["radii"]) if t else 0
        assert falls > 3


def test_kappa_0_never_shrinks_the_radius_of_its_own_accord(backend):
    """Before the clip: gamma falls below the last one only to the largest row, which the clip allows."""
    p = start(lr=3e-3, kappa=0.0)
    last = [0.0] * len(SHAPES)
    positive = 0
    for _ in train(p, 40):
        for i, r in enumerate(p["radii"]):
            gamma, largest = float(r[wp.GAMMA]), float(r[wp.LARGEST])
            assert gamma >= last[i] or gamma == largest
            positive += float(r[wp.GRADIENT]) > 0
            last[i] = gamma
    assert positive > 10


def test_kappa_cancels_while_all_gradients_are_positive(backend):
    """Adam does not see the scale: only kappa = 0, which leaves nothing, differs."""
    paths = []
    for kappa in (1.0, 0.5, 0.01, 0.0):
        torch.manual_seed(1)
        p, _ = settled(gamma=0.3, kappa=kappa, lr=0.0)
        p["radii"][0][[wp.FIRST, wp.SECOND]] = 0.0
        path = []
        for _ in range(8):
            d = p["params"][0] - p["anchors"][0]
            move(p, [d.sign() * 0.1])  # moving outwards raises the loss
            path.append(float(p["radii"][0][wp.GAMMA]))
        paths.append(path)
    assert paths[0] == pytest.approx(paths[1], rel=1e-6)
    assert paths[0] == pytest.approx(paths[2], rel=1e-4)
    assert paths[0][-1] < 0.3 - 4 * MU
    assert paths[3] == pytest.approx([0.3] * 8, rel=1e-12)


def test_rates_and_radii_of_each_parameter_are_its_own(backend):
    """One radius_lr for each, one fixed radius for each; what one parameter has does not reach the others."""
    speeds = [1e-2, 2e-2, 0.0, 1e-3, 1e-2]
    p, twins = start(radius_lr=speeds), [start(radius_lr=speed) for speed in speeds]
    for q in twins:
        for key in ("params", "anchors"):
            q[key] = [t.clone() for t in p[key]]
    for _ in range(4):
        grads = [torch.randn_like(w) for w in p["params"]]
        move(p, grads)
        for i, q in enumerate(twins):
            move(q, grads)
            assert torch.equal(p["params"][i], q["params"][i])
            assert torch.equal(p["radii"][i], q["radii"][i])
    fixed = [0.1, 0.2, 0.3, math.inf, 0.0]
    p = start(fixed_radius=fixed)
    move(p, [torch.randn_like(w) for w in p["params"]])
    assert [float(r[wp.GAMMA]) for r in p["radii"]] == pytest.approx(fixed)
    assert torch.equal(p["params"][4], p["anchors"][4])


# -- property 9: symmetries --------------------------------------------------------------------------------------------


def test_the_scale_of_the_loss_does_not_matter(backend):
    p, q = (start(dtype=torch.float64, eps=1e-30) for _ in range(2))
    q["params"], q["anchors"] = [w.clone() for w in p["params"]], [w.clone() for w in p["anchors"]]
    for _ in range(12):
        grads = [torch.randn_like(w) for w in p["params"]]
        move(p, grads)
        move(q, [g * 1024.0 for g in grads])  # a power of two: only the 1e-8 beside the root differs
        for a, b in zip(p["radii"], q["radii"], strict=True):
            assert float(a[wp.GAMMA]) == pytest.approx(float(b[wp.GAMMA]), abs=1e-4 * MU)


def test_rows_may_change_places_and_signs_may_flip(backend):
    p = start(shapes=[(8, 40)])
    order = torch.randperm(8)
    permuted, mirrored = copy.deepcopy(p), copy.deepcopy(p)
    permuted["params"], permuted["anchors"] = [p["params"][0][order]], [p["anchors"][0][order]]
    mirrored["params"], mirrored["anchors"] = [-p["params"][0]], [-p["anchors"][0]]
    for _ in range(10):
        grad = torch.randn(8, 40)
        move(p, [grad])
        move(permuted, [grad[order]])
        move(mirrored, [-grad])
        assert torch.allclose(permuted["params"][0], p["params"][0][order], rtol=0, atol=1e-7)
        assert torch.allclose(permuted["radii"][0], p["radii"][0], rtol=1e-4, atol=1e-8)
        assert torch.equal(mirrored["params"][0], -p["params"][0])
        assert torch.equal(mirrored["radii"][0], p["radii"][0])


# -- property 10: the clip may wait ------------------------------------------------------------------------------------


def test_the_upper_clip_could_come_before_the_projection(backend):
    """Rows scaled with the radius after its clip, by hand, are the rows that the step scaled before it."""
    p = start(lr=3e-3)
    true = [a.clone() for a in p["anchors"]]
    clipped = 0
    for _ in range(30):
        grads = [torch.randn_like(w) * 0.1 + w for w in p["params"]]
        free = copy.deepcopy(p) | {"fixed_radius": math.inf}
        move(free, grads)
        move(p, grads)
        for w, moved, a, r in zip(p["params"], free["params"], true, p["radii"], strict=True):
            if r[wp.FLOORED]:
                continue
            clipped += bool(r[wp.GAMMA] == r[wp.LARGEST])
            eager = wp.project_to_anchor(moved, a, r[wp.GAMMA])
            assert torch.allclose(w, eager, rtol=0, atol=4e-9)
    assert clipped > 5


# -- property 13, and what else may go wrong with numbers --------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_found_inf_changes_nothing_and_a_scale_divides_the_gradients(backend, base):
    p = start(base)
    for _ in train(p, 3):
        pass
    before = copy.deepcopy(written(p))
    move(p | {"found_inf": torch.ones(()), "grad_scale": torch.tensor(4.0)})
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))
    scaled = copy.deepcopy(p)
    grads = [torch.randn_like(w) for w in p["params"]]
    move(scaled | {"found_inf": torch.zeros(()), "grad_scale": torch.tensor(4.0)}, [g * 4 for g in grads])
    move(p, grads)
    assert all(torch.equal(a, b) for a, b in zip(written(scaled), written(p), strict=True))


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 1, 6])  # fresh, floored, open
def test_one_bad_element_spoils_its_row_alone(backend, base, bad, when):
    """As under Adam: a NaN stays where it came in. Radius, moments of the radius and finite rows stay valid."""
    p = start(base, shapes=[(6, 40), (12, 9)])
    true = [a.clone() for a in p["anchors"]]
    for _ in train(p, when):
        pass
    for t in range(6):
        grads = [torch.randn_like(w) * 0.1 for w in p["params"]]
        if t == 0:
            grads[0][2, 5] = bad
        move(p, grads)
        assert all(buffer.isfinite().all() for buffer in p["anchors"])  # at the floor a spoiled row's c is kept as 0
        for i, r in enumerate(p["radii"]):
            assert r.isfinite().all()
            w, a = p["params"][i], anchors_of(p)[i]
            assert torch.equal(a, true[i])
            good = torch.ones(len(w), dtype=torch.bool)
            good[2] = i != 0
            assert w[good].isfinite().all()
            away = (w[good].double() - a[good].double()).abs().sum(1)
            assert (away <= float(r[wp.GAMMA]) * (1 + 4 * ULP) + w.shape[1] * 2.0**-24 * w[good].abs().max()).all()
        spoiled = p["params"][0][2].isfinite()
        assert spoiled[torch.arange(40) != 5].all()  # elements beside the bad one go on, as under Adam


def test_a_row_that_overflows_is_left_as_the_base_step_left_it(backend):
    """Its norm is infinite: scaled to the radius, the rest of the row would silently be the anchor."""
    p = start("sgd", shapes=[(6, 40)], lr=10.0, momentum=0.0, nesterov=False, momentum_buffers=None, fixed_radius=0.1)
    grads = [torch.full((6, 40), 1e-3)]
    grads[0][2, 5] = 3e38
    free = copy.deepcopy(p) | {"fixed_radius": math.inf}
    move(free, grads)
    move(p, grads)
    assert p["params"][0][2, 5] == -math.inf
    assert torch.equal(p["params"][0][2], free["params"][0][2])
    assert not torch.equal(p["params"][0][1], free["params"][0][1])


def test_no_change_keeps_the_sign_of_zero(backend):
    p = start(lr=0.0, fixed_radius=math.inf)
    for w in p["params"]:
        w.view(-1)[::2] = -0.0
    signs = [w.signbit() for w in p["params"]]
    move(p, [torch.randn_like(w) for w in p["params"]])
    assert all(torch.equal(w.signbit(), sign) for w, sign in zip(p["params"], signs, strict=True))


def test_no_finite_row_keeps_the_radius(backend):
    p = start(shapes=[(300,), (4, 30)])
    for _ in train(p, 5):
        pass
    before = [r.clone() for r in p["radii"]]
    grads = [torch.full_like(w, math.nan) for w in p["params"]]
    move(p, grads)
    for r, old in zip(p["radii"], before, strict=True):
        assert torch.equal(r[[wp.GAMMA, wp.FIRST, wp.SECOND, wp.LARGEST]], old[[0, 1, 2, 3]])
        assert float(r[wp.PROJECTED]) == 0


def test_a_huge_gradient_does_not_end_the_life_of_the_radius(backend):
    p = start("sgd", shapes=[(6, 40)], lr=1e-3)
    for _ in train(p, 4):
        pass
    move(p, [torch.full((6, 40), 1e30)])
    assert p["radii"][0].isfinite().all()
    for _ in train(p, 3):
        assert p["radii"][0].isfinite().all()


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("steps", [0, 1, 5])  # fresh, floored, open
@pytest.mark.parametrize("lr", [0.0, torch.zeros(())])
def test_no_gradient_at_lr_0_leaves_weights_and_radius_alone(backend, base, steps, lr):
    """The step that checkpointing makes to allocate state. One element of a gradient is enough to move the radius."""
    p = start(base)
    for _ in train(p, steps):
        pass
    before = copy.deepcopy(p)
    move(p | {"lr": lr}, [torch.zeros_like(w) for w in p["params"]])
    for key in ("params", "anchors", "radii"):
        assert all(torch.equal(a, b) for a, b in zip(p[key], before[key], strict=True))
    assert all(int(a) == int(b) + 1 for a, b in zip(p["steps"], before["steps"], strict=True))
    if base == "adam":  # moments follow the base step
        assert all(torch.allclose(a, 0.9 * b) for a, b in zip(p["exp_avgs"], before["exp_avgs"], strict=True))
    for g in p["grads"]:
        g.view(-1)[-1] = 1e-3
    move(p | {"lr": lr})
    assert not any(torch.equal(a, b) for a, b in zip(p["radii"], before["radii"], strict=True))


def test_empty_parameters_only_count(backend):
    p = start(shapes=[(0, 5), (5, 0), (4, 6), (0,)])
    move(p, [torch.randn_like(w) for w in p["params"]])
    move(p)
    assert [float(s) for s in p["steps"]] == [2.0] * 4
    assert [bool(r.any()) for r in p["radii"]] == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_learn_a_radius(backend, dtype):
    """Computed in float32, rounded once: no NaN where a row does not move, and c at the floor in its own precision."""
    p = start(dtype=dtype, lr=1e-3)
    true = [a.clone() for a in p["anchors"]]
    for t in range(12):
        grads = [torch.randn_like(w) for w in p["params"]]
        if t == 0:
            grads[0][3] = 0.0
        move(p, grads)
        assert all(torch.equal(a, b) for a, b in zip(anchors_of(p), true, strict=True))
        for w, r in zip(p["params"], p["radii"], strict=True):
            assert w.isfinite().all()
            assert r.isfinite().all()
        if t == 0:  # lr of Adam's first step, which a weight of 0.02 would round to 1.2e-4
            c = p["anchors"][0].float().abs()
            assert torch.allclose(c[[0, 1, 2, 4, 5]], torch.tensor(1e-3), rtol=1e-2)
            assert (c[3] == 0).all()
    assert any(float(r[wp.GAMMA]) > 1e-3 for r in p["radii"])


def test_a_zero_anchor_takes_no_memory_and_is_a_ball_around_zero(backend):
    """What is zero before training (adapters): the steps of an anchor of zeros, but for rounding at the floor."""
    shapes = [(6, 40), (30,)]
    p, q = start(shapes=shapes), start(shapes=shapes)
    p["params"] = [torch.zeros_like(w) for w in p["params"]]
    q["params"], q["anchors"] = [w.clone() for w in p["params"]], [torch.zeros_like(w) for w in p["params"]]
    p["anchors"] = [None, None]
    for t in range(15):
        grads = [torch.randn_like(w) for w in p["params"]]
        move(p, grads)
        move(q, grads)
        for a, b, r, s in zip(p["params"], q["params"], p["radii"], q["radii"], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-8), t
            assert torch.allclose(r[:4], s[:4], rtol=1e-4, atol=1e-8)
            assert r[wp.FLOORED] == 0


# -- the dispatcher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_step_compiles_whole_and_bumps_versions(backend, base):
    p = start(base, shapes=[(4, 6), (5,)])
    for g in p["grads"]:
        g.normal_()
    q = copy.deepcopy(p)
    options = {k: p[k] for k in p if not isinstance(p[k], list)}
    lists = [p[k] for k in p if isinstance(p[k], list)]
    names = [k for k in p if isinstance(p[k], list)]
    versions = [t._version for t in written(p)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*lists: list[Tensor]) -> None:
        (wp.ftp_adam_step_ if base == "adam" else wp.ftp_sgd_step_)(**dict(zip(names, lists, strict=True)), **options)

    compiled(*lists)
    move(q)
    assert all(torch.equal(a, b) for a, b in zip(written(p), written(q), strict=True))
    assert all(t._version > old for t, old in zip(written(p), versions, strict=True))


def test_a_step_under_autograd_is_noticed():
    """A graph that holds the weight must not be walked backwards over a weight that has changed since."""
    p = start(shapes=[(4, 6)])
    weight = p["params"][0].requires_grad_()
    loss = (weight * weight).sum()
    move(p, [torch.ones(4, 6)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- all or nothing, and no new memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [1, 4, 9])
def test_running_out_of_memory_leaves_all_as_it_was(monkeypatch, fails):
    """Copies are made of what the kernels cannot take; the one that fails is neither the first nor the last."""
    p = start(shapes=[(4, 16), (6, 16), (5, 3)])
    p["exp_avgs"] = [m.bfloat16() for m in p["exp_avgs"]]
    p["grads"] = [torch.randn_like(w) for w in p["params"]]
    before, calls, real = copy.deepcopy(written(p)), [], lists.Lists.written

    def short(self: lists.Lists, value: Tensor, dtype: torch.dtype) -> Tensor:
        calls.append(1)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("no memory")
        return real(self, value, dtype)

    monkeypatch.setattr(lists.Lists, "written", short)
    with clk.use_backend("native"), pytest.raises(torch.OutOfMemoryError):
        move(p)
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))


def test_the_reference_makes_everything_before_it_writes(monkeypatch):
    p = start(shapes=[(4, 16), (6, 16), (5, 3)])
    p["grads"] = [torch.randn_like(w) for w in p["params"]]
    before, calls, real = copy.deepcopy(written(p)), [], reference.decided

    def short(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(reference, "decided", short)
    with clk.use_backend("reference"), pytest.raises(torch.OutOfMemoryError):
        move(p)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_memory_from_torch(dtype):
    """No cached displacement, no temporaries: 20 bytes a parameter are all there is, and 18 with a bfloat16 anchor."""
    if _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    p = start(dtype=dtype, shapes=[(512, 256), (256,)])
    for _ in range(2):
        move(p, [torch.randn_like(w) for w in p["params"]])
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        move(p)
    assert sum(max(event.cpu_memory_usage, 0) for event in recorded.function_events) == 0


def test_a_step_is_one_call_and_has_no_loop_of_operators():
    """The official loop runs 45 operators a tensor; here there is the step, whatever their number."""
    p = start(shapes=[(8, 16)] * 20)
    with torch.autograd.profiler.profile() as recorded:
        move(p)
    names = [event.name for event in recorded.function_events]
    assert names.count("cl_kernels::ftp_adam_step_") == 1
    if _native.load() is not None:
        assert len(names) <= 3
