"""Projection onto a ball around an anchor, the primitives of FTP's relatives, and what wrong calls say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from weight_projection_cases import problem, written

import cl_kernels as clk
from cl_kernels.ops import weight_projection as wp
from cl_kernels.ops.weight_projection.reference import as_rows, row_norms

NORMS = ["row_l1", "row_l2", "l2"]


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with clk.use_backend(request.param):
        yield request.param


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    anchor = torch.randn(shape, dtype=torch.float64) * 0.02
    return (anchor + torch.randn(shape, dtype=torch.float64) * 0.01).to(dtype), anchor.to(dtype)


def lengths(weight: Tensor, anchor: Tensor | None, norm: str) -> Tensor:
    c = weight.double() if anchor is None else weight.double() - anchor.double()
    return row_norms(as_rows(c, wp.NORMS[norm]), wp.NORMS[norm])


# -- project_to_anchor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(6, 147), (300,), (4, 3, 3, 3), (1, 5, 64), (3, 3072), (7, 1), ()])
def test_rows_outside_are_put_on_the_sphere_and_rows_inside_are_left_alone(backend, norm, shape):
    weight, anchor = pair(*shape)
    before = lengths(weight, anchor, norm)
    radius = float(before.median())
    out = wp.project_to_anchor(weight, anchor, radius, norm=norm)
    rows, was = as_rows(out, wp.NORMS[norm]), as_rows(weight, wp.NORMS[norm])
    slack = rows.shape[1] * 2.0**-24 * rows.double().abs().amax(1)
    after = lengths(out, anchor, norm)
    assert (after <= radius * (1 + 4 * 2.0**-23) + slack).all()
    outside = before > radius * (1 + 1e-5)
    assert (after[outside] >= radius * (1 - 1e-5) - slack[outside]).all()
    inside = before < radius * (1 - 1e-5)
    assert torch.equal(rows[inside], was[inside])
    # radial: what is left points the way it pointed
    c, d = (as_rows((x - anchor).double(), wp.NORMS[norm]) for x in (weight, out))
    cosine = torch.nn.functional.cosine_similarity(c, d, dim=1)
    assert (cosine[before > 1e-6] > 1 - 1e-6).all()


def test_a_second_projection_moves_nothing_but_roundings(backend):
    """An L1 distance of M 2^-24 max|W| a row, at every size of row."""
    for columns in (64, 768, 4608):
        weight, anchor = pair(8, columns)
        once = wp.project_to_anchor(weight, anchor, 0.05)
        twice = wp.project_to_anchor(once, anchor, 0.05)
        allowed = columns * 2.0**-24 * once.double().abs().amax(1)
        assert ((twice.double() - once.double()).abs().sum(1) <= allowed).all()


def test_radii_0_and_infinite_and_one_for_each_row(backend):
    weight, anchor = pair(5, 30)
    assert torch.equal(wp.project_to_anchor(weight, anchor, 0.0), anchor)
    out = wp.project_to_anchor(weight, anchor, math.inf)
    assert torch.equal(out, weight)
    assert out.data_ptr() != weight.data_ptr()
    radii = torch.tensor([0.0, 0.1, 0.2, 1.0, math.inf])
    out = wp.project_to_anchor(weight, anchor, radii)
    apart = [wp.project_to_anchor(weight[i : i + 1], anchor[i : i + 1], radii[i])[0] for i in range(5)]
    assert torch.equal(out, torch.stack(apart))
    assert torch.allclose(
        wp.project_to_anchor(weight, None, 0.1), weight * (0.1 / (weight.abs().sum(1) + 1e-8))[:, None]
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(4, 6), (5,), (2, 3, 2, 2)])
def test_gradients_of_weight_anchor_and_radius(backend, norm, shape):
    """And theirs. Some rows lie inside, some outside, none at an edge."""
    weight, anchor = (t.double().requires_grad_() for t in pair(*shape, dtype=torch.float64))
    rows = 1 if norm == "l2" or len(shape) < 2 else shape[0]
    radius = (lengths(weight, anchor, norm) * torch.linspace(0.4, 1.7, rows + 1, dtype=torch.float64)[:rows]).detach()
    for r in (radius.clone().requires_grad_(), (radius.min() * 0.9).requires_grad_()):
        call = lambda w, a, x: wp.project_to_anchor(w, a, x, norm=norm)  # noqa: E731
        assert torch.autograd.gradcheck(call, (weight, anchor, r), eps=1e-7, atol=1e-5)
        assert torch.autograd.gradgradcheck(call, (weight, anchor, r), eps=1e-7, atol=1e-4)


def test_a_row_on_its_anchor_has_a_gradient(backend):
    """No 0 / 0: the direction of a zero displacement is zero."""
    for norm in NORMS:
        anchor = torch.randn(3, 4)
        weight, radius = anchor.clone().requires_grad_(), torch.tensor(0.0, requires_grad=True)
        wp.project_to_anchor(weight, anchor, radius, norm=norm).sum().backward()
        for grad in (weight.grad, radius.grad):
            assert grad is not None
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_computed_in_float32(backend, dtype):
    weight, anchor = pair(8, 300, dtype=dtype)
    exact = wp.project_to_anchor(weight.double(), anchor.double(), 0.5)
    out = wp.project_to_anchor(weight, anchor, 0.5)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    mixed = wp.project_to_anchor(weight.float(), anchor, 0.5)  # a 16-bit anchor of float32 weights
    assert torch.allclose(mixed.double(), exact, rtol=1e-6, atol=1e-8)


def test_views_and_empty_weights(backend):
    weight, anchor = pair(40, 24)
    wanted = wp.project_to_anchor(weight.mT.contiguous(), anchor.mT.contiguous(), 0.1)
    assert torch.allclose(wp.project_to_anchor(weight.mT, anchor.mT, 0.1), wanted, rtol=0, atol=1e-8)
    weight, anchor = (t.to(memory_format=torch.channels_last) for t in pair(4, 3, 5, 5))
    wanted = wp.project_to_anchor(weight.contiguous(), anchor.contiguous(), 0.1)
    assert torch.allclose(wp.project_to_anchor(weight, anchor, 0.1), wanted, rtol=0, atol=1e-8)
    for shape in ((0, 4), (4, 0), (0,)):
        for norm in NORMS:
            assert wp.project_to_anchor(torch.zeros(shape), torch.zeros(shape), 0.1, norm=norm).shape == shape


def test_nan_and_huge_rows_stay_by_themselves(backend):
    weight, anchor = pair(4, 6)
    weight[1, 2], weight[2] = math.nan, 1e30
    out = wp.project_to_anchor(weight, anchor, 0.01)
    assert out[[0, 3]].isfinite().all()
    assert out[1, 2].isnan()
    assert torch.allclose(lengths(out[2:3], anchor[2:3], "row_l1"), torch.tensor(0.01, dtype=torch.float64), rtol=1e-4)


def test_it_compiles_whole(backend):
    weight, anchor = pair(6, 9)
    weight.requires_grad_()
    radius = torch.tensor(0.05, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(w: Tensor, a: Tensor, r: Tensor) -> Tensor:
        return (wp.project_to_anchor(w, a, r) ** 2).sum()

    found = torch.autograd.grad(loss(weight, anchor, radius), (weight, radius))
    wanted = torch.autograd.grad((wp.project_to_anchor(weight, anchor, radius) ** 2).sum(), (weight, radius))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


# -- the primitives ----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), columns=st.sampled_from([1, 2, 15, 33, 147, 1030]), seed=st.integers(0, 10**6))
def test_products_of_displacements(rows, columns, seed):
    torch.manual_seed(seed)
    (weight, anchor), grad = pair(rows, columns), torch.randn(rows, columns)
    found = wp.displacement_products([grad, grad], [weight, weight], [anchor, None])
    for row, base in zip(found, (anchor.double(), torch.zeros(()).double()), strict=True):
        d, g = weight.double() - base, grad.double()
        wanted = [(g * d).sum(), d.abs().sum(), (d * d).sum(), d.abs().sum(1).max(), (g * g).sum()]
        scale = [(g * d).abs().sum(), *wanted[1:]]
        for a, b, s in zip(row, wanted, scale, strict=True):
            assert abs(float(a - b)) <= 2e-6 * float(s)


def test_products_without_gradients_of_16_bit_and_of_nothing(backend):
    weight, anchor = pair(4, 30, dtype=torch.bfloat16)
    found = wp.displacement_products(None, [weight, torch.zeros(0, 3)], [anchor, None])
    assert found.dtype == torch.float64
    assert found[:, [wp.DOT, wp.GRADIENT_SQUARES]].eq(0).all()
    assert float(found[0, wp.L1]) == pytest.approx(float((weight.double() - anchor.double()).abs().sum()), rel=1e-6)
    assert found[1].eq(0).all()
    assert wp.displacement_products(None, [], []).shape == (0, 5)


def test_rescale_towards_the_anchor(backend):
    """1 leaves a row bit for bit, 0 gives the anchor exactly, scales of rows and of tensors side by side."""
    (w, a), (v, b), (x, c) = pair(5, 40), pair(30), pair(4, 3, 3, 3)
    params = [w.clone(), v.clone(), x.clone(), w.clone()]
    scales = [torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0]), 0.25, torch.tensor(0.0), 0.5]
    wp.rescale_(params, [a, b, c, None], scales)
    assert torch.equal(params[0][0], a[0])
    assert torch.equal(params[0][[1, 4]], w[[1, 4]])
    assert torch.allclose(params[0][2:4], a[2:4] + torch.tensor([[0.5], [2.0]]) * (w - a)[2:4], rtol=1e-6, atol=1e-8)
    assert torch.allclose(params[1], b + 0.25 * (v - b), rtol=1e-6, atol=1e-8)
    assert torch.equal(params[2], c)
    assert torch.allclose(params[3], w * 0.5)
    whole = x.clone()
    wp.rescale_([whole], [c], [torch.tensor([0.5])], norm="l2")
    assert torch.allclose(whole, c + 0.5 * (x - c), rtol=1e-6, atol=1e-8)


def test_rescale_bumps_versions_and_needs_no_graph():
    weight = torch.randn(3, 4, requires_grad=True)
    loss = (weight * weight).sum()
    wp.rescale_([weight], [None], [0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- wrong calls -------------------------------------------------------------------------------------------------------


def _replace(key: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def spoil(p: dict[str, Any]) -> None:
        p[key][1] = value(p[key][1])

    return spoil


def _option(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda p: p.update(options)


BOTH: list[tuple[str, Callable[[dict[str, Any]], None], type[Exception], str]] = [
    ("short list", lambda p: p["steps"].pop(), ValueError, "steps: expected 3 entries"),
    ("short anchors", lambda p: p["anchors"].pop(), ValueError, "anchors: expected 3 entries"),
    ("gradient shape", _replace("grads", lambda t: t.mT), ValueError, r"params\[1\]: shape \(4, 3\).*\(3, 4\)"),
    ("integer gradient", _replace("grads", lambda t: t.long()), ValueError, r"grads\[1\].*torch.int64"),
    ("sparse gradient", _replace("grads", lambda t: t.to_sparse()), RuntimeError, r"grads\[1\].*dense"),
    ("complex weight", _replace("params", lambda t: t.cfloat()), ValueError, r"params\[1\].*complex64"),
    ("not a tensor", _replace("params", lambda t: t.tolist()), TypeError, r"params\[1\].*list"),
    ("anchor shape", _replace("anchors", lambda t: t[:2]), ValueError, r"anchors\[1\]: shape \(2, 3\)"),
    ("anchor dtype", _replace("anchors", lambda t: t.double()), ValueError, r"anchors\[1\]: expected torch.float32"),
    ("anchor device", _replace("anchors", lambda t: t.to("meta")), RuntimeError, r"anchors\[1\] is on meta"),
    ("expanded anchor", _replace("anchors", lambda t: t[:1].expand(4, 3)), ValueError, r"anchors\[1\].*expanded"),
    ("radius shape", _replace("radii", lambda t: t[:7]), ValueError, r"radii\[1\]: expected shape \(8,\)"),
    ("radius dtype", _replace("radii", lambda t: t.half()), ValueError, r"radii\[1\]: expected torch.float32"),
    ("steps shape", _replace("steps", lambda t: t.expand(3)), ValueError, r"steps\[1\]: expected one number"),
    ("lr", _option(lr=-1.0), ValueError, "lr value: -1.0"),
    ("lr tensor", _option(lr=torch.ones(2)), ValueError, "lr: expected one number"),
    ("weight decay", _option(weight_decay=-0.1), ValueError, "weight_decay value: -0.1"),
    ("kappa", _option(kappa=1.5), ValueError, "kappa value: 1.5"),
    ("kappa nan", _option(kappa=math.nan), ValueError, "kappa value: nan"),
    ("radius_lr", _option(radius_lr=-1e-2), ValueError, "radius_lr value: -0.01"),
    ("radius_lr list", _option(radius_lr=[0.1, 0.1]), ValueError, "radius_lr: expected 3 entries"),
    ("radius_lr entry", _option(radius_lr=[0.1, -0.1, 0.1]), ValueError, r"radius_lr\[1\] value: -0.1"),
    ("floor", _option(radius_floor=0.0), ValueError, "radius_floor value: 0.0"),
    ("infinite floor", _option(radius_floor=math.inf), ValueError, "radius_floor value: inf"),
    ("fixed radius", _option(fixed_radius=-1.0), ValueError, "fixed_radius value: -1.0"),
    ("fixed radii", _option(fixed_radius=[1.0]), ValueError, "fixed_radius: expected 3 entries"),
    ("norm", _option(norm="l1"), ValueError, "norm value: 'l1' .*'row_l1', 'row_l2', 'l2'"),
    ("grad_scale", _option(grad_scale=torch.ones(3)), ValueError, "grad_scale: expected one number"),
    ("found_inf", _option(found_inf=torch.ones(3)), ValueError, "found_inf: expected one number"),
    ("same memory", lambda p: p["anchors"].__setitem__(1, p["params"][1]), ValueError, "same memory appears twice"),
    ("anchor of two", lambda p: p["anchors"].__setitem__(1, p["anchors"][0]), ValueError, "appears twice"),
]  # fmt: skip
ADAM = [
    ("beta1", _option(beta1=1.0), ValueError, "beta1 value: 1.0"),
    ("eps", _option(eps=-1e-8), ValueError, "eps value"),
    ("moment shape", _replace("exp_avgs", lambda t: t[:2]), ValueError, r"params\[1\].*\(2, 3\)"),
    ("amsgrad", _option(max_exp_avg_sqs=[]), ValueError, "max_exp_avg_sqs: expected 3 entries"),
]
SGD = [
    ("no buffers", _option(momentum_buffers=None), ValueError, "momentum_buffers: expected 3 buffers"),
    ("momentum", _option(momentum=-0.5), ValueError, "momentum value: -0.5"),
    ("nesterov", _option(dampening=0.1), ValueError, "nesterov: expected a momentum and no dampening"),
]
WRONG = [("adam", *case) for case in (*BOTH, *ADAM)] + [("sgd", *case) for case in (*BOTH, *SGD)]


@pytest.mark.parametrize(("base", "kind", "spoil", "error", "words"), WRONG, ids=[f"{b} {k}" for b, k, *_ in WRONG])
def test_a_wrong_call_names_the_argument_and_changes_nothing(backend, base, kind, spoil, error, words):
    p = problem(base, shapes=[(4, 3)] * 3)
    p["anchors"] = [torch.randn(4, 3) for _ in range(3)]
    spoil(p)
    kept = [t for t in written(p) if isinstance(t, Tensor) and t.device.type == "cpu" and not t.is_sparse]
    before = copy.deepcopy(kept)
    with pytest.raises(error, match=words):
        (wp.ftp_adam_step_ if base == "adam" else wp.ftp_sgd_step_)(**p)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_wrong_calls_of_the_others(backend):
    weight, anchor = pair(4, 3)
    for call, error, words in (
        (lambda: wp.project_to_anchor(weight.long(), anchor, 0.1), ValueError, "weight.*int64"),
        (lambda: wp.project_to_anchor(weight, anchor.mT, 0.1), ValueError, r"anchor: shape \(3, 4\)"),
        (lambda: wp.project_to_anchor(weight, anchor.to("meta"), 0.1), RuntimeError, "anchor is on meta"),
        (lambda: wp.project_to_anchor(weight, anchor, -0.1), ValueError, "radius value: -0.1"),
        (lambda: wp.project_to_anchor(weight, anchor, torch.ones(3)), ValueError, "one for each of the 4 rows"),
        (lambda: wp.project_to_anchor(weight, anchor, torch.ones(4), norm="l2"), ValueError, "of the 1 rows"),
        (lambda: wp.project_to_anchor(weight, anchor, 0.1, norm="mars"), ValueError, "norm value: 'mars'"),
        (lambda: wp.displacement_products([], [weight], [anchor]), ValueError, "grads: expected 1 entries"),
        (lambda: wp.displacement_products([weight.mT], [weight], [anchor]), ValueError, r"grads\[0\]: shape"),
        (lambda: wp.rescale_([weight] * 2, [anchor] * 2, [0.5] * 2), ValueError, "params: the same memory"),
        (lambda: wp.rescale_([weight], [anchor], []), ValueError, "scales: expected 1 entries"),
        (lambda: wp.rescale_([weight[:1].expand(4, 3)], [anchor], [0.5]), ValueError, r"params\[0\].*expanded"),
        (lambda: wp.rescale_([weight], [anchor], [torch.ones(5)]), ValueError, r"scales\[0\]: expected one"),
        (lambda: wp.rescale_([weight], [anchor], ["half"]), TypeError, r"scales\[0\]: expected a number"),
    ):
        with pytest.raises(error, match=words):
            call()
