"""The projected update: golden steps, the promise that nothing leaks, and the contract of the operations."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cl_kernels as clk
from cl_kernels.ops import Projector, project, projected_adam_step_
from cl_kernels.ops._registry import OPS
from cl_kernels.ops.projection import autograd
from cl_kernels.ops.projection.arguments import Step
from cl_kernels.ops.projection.reference import BASIS, DENSE, NONE, matrix_shape

HYPER = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
# The moments that the null-space page prints for its golden step, and the parameters for both blends.
GOLDEN_M = [[-0.02099527, -0.00800236, 0.04700946], [0.02500097, 0.03000188, -0.03100281]]
GOLDEN_P = {
    1.0: [[0.4974225579, -0.2474225579, 0.9874738533], [0.1025774421, 0.1974225579, -0.2874738533]],
    0.97: [[0.4975678653, -0.2469891277, 0.9872754816], [0.1021972255, 0.1972023514, -0.2873609150]],
}


def basis(d: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].to(dtype)


def blended(v: Tensor, eta: float, free: int, normalize: bool) -> Projector:
    scale = eta / free**0.5 if normalize else eta
    return Projector(v, scale + 1 - eta, scale)


def state(params: list[Tensor], amsgrad: bool = False) -> dict[str, Any]:
    moments = {"exp_avgs": [torch.zeros_like(p) for p in params], "exp_avg_sqs": [torch.zeros_like(p) for p in params]}
    moments["steps"] = [torch.zeros(()) for _ in params]
    return moments | ({"max_exp_avg_sqs": [torch.zeros_like(p) for p in params]} if amsgrad else {})


def run(
    params: list[Tensor], grads: list[Tensor], moments: dict[str, Any], left: Any, right: Any, **options: Any
) -> None:
    options = HYPER | {"weight_decay": 0.0, "decoupled_weight_decay": False} | options
    largest = moments.get("max_exp_avg_sqs")
    args = (moments["exp_avgs"], moments["exp_avg_sqs"], moments["steps"], left, right)
    projected_adam_step_(params, grads, *args, max_exp_avg_sqs=largest, **options)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whatever runs by default here, and the reference."""
    with clk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("eta", [1.0, 0.97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_two_steps(backend, eta, dtype):
    p = torch.tensor([[0.5, -0.25, 1], [0.1, 0.2, -0.3]], dtype=dtype)
    steps = [[[0.1, -0.2, 0.3], [0, 0.5, -0.4]], [[-0.3, 0.1, 0.2], [0.25, -0.15, 0.05]]]
    half = 0.5**0.5
    # Both blends normalise: a = eta / sqrt(R) + 1 - eta.
    right = blended(torch.tensor([[half], [half], [0]], dtype=dtype), eta, 2, True)
    left = blended(torch.tensor([[half], [half]], dtype=dtype), eta, 1, True)
    moments = state([p])
    for g in steps:
        run([p], [torch.tensor(g, dtype=dtype)], moments, [left], [right], weight_decay=5e-5)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    assert (p - torch.tensor(GOLDEN_P[eta], dtype=dtype)).abs().max() <= tolerance
    assert (moments["exp_avgs"][0] - torch.tensor(GOLDEN_M, dtype=dtype)).abs().max() <= max(tolerance, 1e-8)
    assert moments["steps"][0] == 2


def test_isotropic_updates_shrink_by_the_root_of_the_dimension():
    torch.manual_seed(0)
    for free in (100, 400, 745):
        q = torch.linalg.qr(torch.randn(768, free, dtype=torch.float64))[0]
        u = torch.randn(4000, 768, dtype=torch.float64)
        kept = project(u, right=Projector(q, 0.0, -(free**-0.5)))
        assert abs(kept.norm() / u.norm() - 768**-0.5) <= 3e-4


def test_dense_and_basis_forms_agree():
    v = basis(768, 100)
    u = torch.randn(4, 768, dtype=torch.float64)
    projector = Projector(v, 0.3, 0.25)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        thin = project(u.to(dtype), right=projector.to(dtype))
        dense = project(u.to(dtype), right=Projector.from_dense(projector.matrix().to(dtype)))
        assert (thin - dense).norm() / dense.norm() <= tolerance


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_leaks_into_the_protected_directions(dense):
    for seed in range(4):
        torch.manual_seed(seed)
        v = basis(768, 100)
        u = torch.randn(4, 768, dtype=torch.float64).float().double()
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
            p = Projector(v.to(dtype))
            y = project(u.to(dtype), right=Projector.from_dense(p.matrix()) if dense else p)
            # The leak is a property of y: measured against the exact basis, in float64.
            leak = (y.double() @ v.to(dtype).double()).norm() / (u @ v).norm()
            assert leak <= tolerance


def accumulate(dtype: torch.dtype, **options: Any) -> tuple[float, float]:
    """200 steps under fixed projectors; the shares of the movement inside the two protected spaces."""
    torch.manual_seed(0)
    v1, v2 = basis(768, 25), basis(4, 1)
    p = torch.empty(4, 768, dtype=torch.float64).uniform_(-1, 1).to(dtype)
    start, moments = p.clone(), state([p])
    left, right = Projector(v2.to(dtype), 3**-0.5, 3**-0.5), Projector(v1.to(dtype), 743**-0.5, 743**-0.5)
    for _ in range(200):
        g = torch.randn(4, 768, dtype=torch.float64).to(dtype)
        run([p], [g], moments, [left], [right], **({"weight_decay": 5e-5} | options))
    moved = (p - start).double()
    return float((moved @ v1).norm() / moved.norm()), float((v2.mT @ moved).norm() / moved.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("decoupled", [False, True])
def test_accumulated_updates_stay_in_the_space(backend, dtype, tolerance, decoupled):
    assert max(accumulate(dtype, decoupled_weight_decay=decoupled)) <= tolerance


def test_unprojected_decay_leaves_the_space():
    # The negative half of the property above: 4e-3 and 1e-2 measured, so the test can tell.
    right, left = accumulate(torch.float64, decoupled_weight_decay=True, project_decay=False)
    assert 2e-3 <= right <= 8e-3
    assert 5e-3 <= left <= 2e-2


CASES = [
    ((4, 96), 2, 8, BASIS),
    ((1, 4, 96), 1, 33, BASIS),
    ((3, 4, 40), 2, 5, BASIS),
    ((1, 7), 1, 3, BASIS),
    ((7, 1), 3, 1, BASIS),
    ((37, 129), None, 17, BASIS),
    ((130, 64), None, 64, BASIS),
    ((64, 48), 40, None, BASIS),
    ((8, 3, 3, 3), None, 20, BASIS),
    ((9,), None, 4, BASIS),
    ((33, 65), 33, 65, DENSE),
    ((5, 16), None, 0, BASIS),
    ((0, 16), None, 4, BASIS),
]


def case(shape: tuple[int, ...], left: int | None, right: int | None, form: int, dtype: torch.dtype) -> Any:
    columns = shape[-1] if len(shape) < 4 else shape[1] * shape[2] * shape[3]
    rows = (shape[-2] if len(shape) < 4 else shape[0]) if len(shape) > 1 else 1
    sides = []
    for size, rank, scales in ((rows, left, (0.9, 0.7)), (columns, right, (1.0, 1.0))):
        p = None if rank is None else Projector(basis(size, min(rank, size), dtype), *scales)
        sides.append(Projector.from_dense(p.matrix().contiguous()) if p is not None and form == DENSE else p)
    return sides


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"maximize": True, "weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
)
def test_step_is_adam_then_projection(backend, dtype, amsgrad, options):
    """Against torch's own Adam in float64, its difference projected by dense matrices: all shapes in one call."""
    shapes = [shape for shape, *_ in CASES]
    sides = [case(*entry, dtype) for entry in CASES]
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    exact = [p.double().requires_grad_() for p in params]
    twin = torch.optim.Adam(exact, lr=0.01, amsgrad=amsgrad, foreach=False, **options)
    moments = state(params, amsgrad)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        before = [p.detach().clone() for p in exact]
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double()
        twin.step()
        for p, old, (left, right) in zip(exact, before, sides, strict=True):
            with torch.no_grad():
                u = (p - old).reshape(matrix_shape(p.shape, left and left.dim, right and right.dim))
                u = u if left is None else left.matrix().double() @ u
                u = u if right is None else u @ right.matrix().double()
                p.copy_(old + u.reshape(old.shape))
        run(params, grads, moments, [s[0] for s in sides], [s[1] for s in sides], **options)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for p, q, shape in zip(params, exact, shapes, strict=True):
        assert p.numel() == 0 or (p.double() - q).abs().max() <= tolerance, shape


def test_lr_as_a_tensor_is_the_same_step(backend):
    results = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        torch.manual_seed(1)
        p = torch.randn(4, 32)
        run([p], [torch.randn(4, 32)], state([p]), [None], [Projector(basis(32, 3, torch.float32))], lr=lr)
        results.append(p)
    assert torch.equal(*results)


def test_scaled_gradients_and_found_inf(backend):
    v = Projector(basis(32, 3, torch.float32))
    p, q, g = torch.randn(4, 32), None, torch.randn(4, 32)
    q = p.clone()
    run([p], [g], state([p]), [None], [v])
    moments = state([q])
    before = copy.deepcopy((q, moments))
    run([q], [g * 8], moments, [None], [v], grad_scale=torch.tensor(8.0), found_inf=torch.ones(()))
    assert torch.equal(q, before[0])
    assert all(torch.equal(a, b) for key in moments for a, b in zip(moments[key], before[1][key], strict=True))
    run([q], [g * 8], moments, [None], [v], grad_scale=torch.tensor(8.0), found_inf=torch.zeros(()))
    assert torch.equal(p, q)


def test_nan_gradient_propagates_and_a_skipped_one_does_not(backend):
    v = Projector(basis(32, 3, torch.float32))
    p, g = torch.randn(4, 32), torch.full((4, 32), float("nan"))
    q = p.clone()
    run([q], [g], state([q]), [None], [v], found_inf=torch.ones(()))
    assert torch.equal(p, q)
    run([p], [g], state([p]), [None], [v])
    assert p.isnan().all()


def test_zero_gradient_and_zero_rate_change_nothing(backend):
    p = torch.randn(4, 32)
    p[0] = -0.0
    before, moments = p.clone(), state([p])
    run(
        [p],
        [torch.zeros(4, 32)],
        moments,
        [Projector(basis(4, 1, torch.float32))],
        [Projector(basis(32, 3, torch.float32))],
        lr=0.0,
    )
    assert torch.equal(p.view(torch.int32), before.view(torch.int32))  # -0.0 too
    assert moments["steps"][0] == 1


def test_eps_zero_gives_no_nan_where_the_gradient_is_zero(backend):
    p = torch.randn(4, 32)
    before = p.clone()
    run([p], [torch.zeros(4, 32)], state([p]), [None], [Projector(basis(32, 3, torch.float32))], eps=0.0)
    assert torch.equal(p, before)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "flipped_gradient", "offset"])
def test_layouts(backend, layout):
    v = Projector(basis(32, 3, torch.float32))
    if layout == "channels_last":
        p = torch.randn(6, 8, 2, 2).to(memory_format=torch.channels_last)
        g = torch.randn(6, 8, 2, 2)
    elif layout == "transposed":
        p, g = torch.randn(32, 5).mT, torch.randn(5, 32)
    elif layout == "offset":
        p, g = torch.randn(1 + 5 * 32)[1:].view(5, 32), torch.randn(1 + 5 * 32)[1:].view(5, 32)
    else:
        p, g = torch.randn(5, 32), torch.randn(5, 32).flip(1)
    q = p.clone(memory_format=torch.contiguous_format)
    strides = p.stride()
    run([p], [g], state([p]), [None], [v])
    run([q], [g.contiguous()], state([q]), [None], [v])
    assert torch.allclose(p, q, rtol=0, atol=1e-7)
    assert p.stride() == strides


def test_sixteen_bit_parameters(backend):
    v = basis(64, 5, torch.float32)
    p = torch.randn(4, 64).bfloat16()
    start, moments = (
        p.clone(),
        {"exp_avgs": [torch.zeros(4, 64)], "exp_avg_sqs": [torch.zeros(4, 64)], "steps": [torch.zeros(())]},
    )
    for _ in range(3):
        run([p], [torch.randn(4, 64).bfloat16()], moments, [None], [Projector(v)], lr=0.1)
    moved = (p - start).float()
    assert p.dtype == torch.bfloat16
    assert (moved @ v).norm() <= 0.05 * moved.norm()


def test_versions_grow_and_early_graphs_notice(backend):
    p = torch.randn(4, 32, requires_grad=True)
    loss = (p * p).sum()
    moments = state([p.detach()])
    written = [p, *moments["exp_avgs"], *moments["exp_avg_sqs"], *moments["steps"]]
    versions = [t._version for t in written]
    run([p], [torch.randn(4, 32)], moments, [None], [Projector(basis(32, 3, torch.float32))])
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists_do_nothing():
    projected_adam_step_([], [], [], [], [], [], [], weight_decay=0.0, decoupled_weight_decay=False, **HYPER)


def wrong_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    v = basis(32, 3, torch.float32)
    return {
        "grad_shape": ({"grads": [torch.ones(32, 4)]}, ValueError, r"\(4, 32\).*\(32, 4\)"),
        "too_few": ({"grads": []}, ValueError, "grads: expected 1 entries"),
        "size": ({"right": [Projector(basis(31, 3))]}, ValueError, "31 .right. do not fit"),
        "expanded": ({"params": [torch.ones(1, 32).expand(4, 32)]}, ValueError, "expanded"),
        "beta": ({"beta1": 1.0}, ValueError, "beta1"),
        "eps": ({"eps": float("nan")}, ValueError, "eps"),
        "integer": ({"params": [torch.ones(4, 32, dtype=torch.int64)]}, ValueError, "floating"),
        "sparse": ({"grads": [torch.ones(4, 32).to_sparse()]}, RuntimeError, "dense"),
        "type": ({"right": [v]}, TypeError, "Projector"),
        "step": ({"steps": [torch.zeros(2)]}, ValueError, "one number"),
        "device": ({"right": [Projector(v.to("meta"))]}, RuntimeError, "move one"),
    }


@pytest.mark.parametrize("kind", sorted(wrong_calls()))
def test_a_wrong_call_changes_nothing(kind):
    change, error, words = wrong_calls()[kind]
    p = torch.randn(4, 32)
    args: dict[str, Any] = {"params": [p], "grads": [torch.randn(4, 32)], "left": [None]} | state([p])
    args |= {
        "right": [Projector(basis(32, 3, torch.float32))],
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
    } | HYPER
    before = copy.deepcopy({k: args[k] for k in ("params", "exp_avgs", "exp_avg_sqs", "steps")})
    with pytest.raises(error, match=words):
        projected_adam_step_(**(args | change))
    for key, values in before.items():
        assert all(torch.equal(a, b) for a, b in zip(args[key], values, strict=True))


# -- project -----------------------------------------------------------------------------------------------------------


@given(
    batch=st.sampled_from([(), (2,), (2, 3)]),
    m=st.sampled_from([1, 2, 3, 7, 16, 33]),
    d=st.sampled_from([1, 2, 5, 17, 64]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_project_properties(batch, m, d, share, dtype, seed):
    torch.manual_seed(seed)
    left, right = (Projector(basis(n, int(share * n), dtype)) for n in (m, d))
    u, w = torch.randn(*batch, m, d, dtype=dtype), torch.randn(*batch, m, d, dtype=dtype)
    y = project(u, left, right)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    bound = tolerance * (1 + float(u.abs().max()))
    assert y.shape == u.shape
    assert (project(y, left, right) - y).abs().max() <= bound  # idempotent
    assert (y @ right.basis).abs().sum() + (left.basis.mT @ y).abs().sum() <= 100 * bound * max(m, d)
    assert (project(project(u, left), None, right) - project(project(u, None, right), left)).abs().max() <= bound
    assert (project(2 * u - w, left, right) - (2 * y - project(w, left, right))).abs().max() <= 4 * bound  # linear


def test_project_without_projectors_is_a_copy():
    u = torch.randn(3, 4)
    y = project(u)
    assert torch.equal(u, y)
    assert y.data_ptr() != u.data_ptr()


@pytest.mark.parametrize("bad", ["left", "right"])
def test_project_names_what_does_not_fit(bad):
    with pytest.raises(ValueError, match=f"{bad}: a projector of size 5"):
        project(torch.randn(3, 4), **{bad: Projector(basis(5, 2, torch.float32))})


@pytest.mark.parametrize("doubled", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "a gradient"])
def test_the_same_memory_twice_is_refused_and_nothing_is_written(backend, doubled):
    params, grads = [torch.randn(4, 6) for _ in range(2)], [torch.randn(4, 6) for _ in range(2)]
    moments = state(params, amsgrad=True)
    if doubled == "a gradient":
        grads[1] = params[0]
    else:
        lists = moments | {"params": params}
        lists[doubled][1] = lists[doubled][0]
    before = copy.deepcopy((params, moments))
    with pytest.raises(ValueError, match="twice"):
        run(params, grads, moments, [None] * 2, [Projector(basis(6, 2, torch.float32))] * 2)
    assert all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
    for name, values in before[1].items():
        assert all(torch.equal(a, b) for a, b in zip(values, moments[name], strict=True))


@pytest.mark.parametrize("asked", [*range(4), *range(5, 8)])
def test_the_backward_of_project_makes_only_what_is_asked_for(asked):
    number = torch.tensor(0.9, dtype=torch.float64)
    u, left, right = torch.randn(3, 5, dtype=torch.float64), basis(3, 1), basis(5, 2)
    saved = (u, left, number, number, right, number, number)
    needed = tuple(at == asked for at in range(9))
    context = types.SimpleNamespace(saved_tensors=saved, forms=(BASIS, BASIS), needs_input_grad=needed)
    made = autograd.backward(context, torch.randn(3, 5, dtype=torch.float64))
    assert [gradient is not None for gradient in made] == list(needed)


def test_project_has_two_gradients():
    u, vl, vr = (t.requires_grad_() for t in (torch.randn(2, 3, 5).double(), basis(3, 1), basis(5, 2)))
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.9, 0.7))

    def thin(u: Tensor, vl: Tensor, vr: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return project(u, Projector(vl, a, b), Projector(vr, 1.0, b))

    assert torch.autograd.gradcheck(thin, (u, vl, vr, a, b))
    assert torch.autograd.gradgradcheck(thin, (u, vl, vr, a, b))


@pytest.mark.parametrize("batched", [False, True])
def test_project_has_gradients_of_dense_and_batched_sides(batched):
    u = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    left = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    v = torch.stack([basis(5, 2), basis(5, 2)]) if batched else torch.randn(5, 5, dtype=torch.float64)
    v.requires_grad_()

    def f(u: Tensor, left: Tensor, v: Tensor) -> Tensor:
        return project(u, Projector.from_dense(left), Projector(v) if batched else Projector.from_dense(v))

    assert torch.autograd.gradcheck(f, (u, left, v))
    assert torch.autograd.gradgradcheck(f, (u, left, v))


def test_vmap_agrees():
    """Either refused or right: torch's fallback runs the operation slice by slice."""
    v = basis(8, 2, torch.float32)
    u = torch.randn(3, 4, 8)
    mapped = torch.vmap(lambda x: project(x, right=Projector(v)))(u)
    assert torch.allclose(mapped, project(u, right=Projector(v)), atol=1e-6)


def op_args(name: str) -> list[tuple[Any, ...]]:
    v = basis(8, 2, torch.float32)
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    if name == "project":
        u = torch.randn(2, 4, 8, requires_grad=True)
        dense = torch.randn(4, 4, requires_grad=True)
        return [
            (u, None, None, None, NONE, v.requires_grad_(), one, zero, BASIS),
            (u, dense, None, None, DENSE, None, None, None, NONE),
            (torch.randn(4, 8).bfloat16(), None, None, None, NONE, None, None, None, NONE),
        ]
    p = [torch.randn(4, 8), torch.randn(8, 8)]
    lists = [p, [torch.randn_like(x) for x in p], *([torch.rand_like(x) for x in p] for _ in range(3))]
    steps = [torch.ones(()) for _ in p]
    sides = (
        [None, torch.eye(8)],
        [v, None],
        [NONE, BASIS, DENSE, NONE],
        [1.0, 1.0, 0.9, 0.5, 0.0, 0.0, 1.0, 1.0],
        None,
    )
    tail = (0.9, 0.99, 1e-8, 0.1, True, True, False)
    return [
        (*lists, steps, *sides, 0.1, None, *tail, None, None),
        (*lists, steps, *sides, 0.0, torch.tensor(0.1), *tail, torch.tensor(2.0), torch.tensor(0.0)),
        (*lists[:4], [], steps, *sides, 0.1, None, *tail, None, None),
    ]


@pytest.mark.parametrize("name", ["project", "projected_adam_step_"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_opcheck(name, which):
    torch.library.opcheck(OPS[name].overload, op_args(name)[which])


def test_the_arguments_have_the_order_of_the_schema():
    schema = OPS["projected_adam_step_"].overload._schema
    assert tuple(argument.name for argument in schema.arguments) == Step._fields


def test_compiles_in_one_graph():
    def f(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, w: Tensor) -> Tensor:
        run([p], [g], {"exp_avgs": [m], "exp_avg_sqs": [v], "steps": [step]}, [None], [Projector(w)])
        return project(p, right=Projector(w))

    args = [
        torch.randn(4, 8),
        torch.randn(4, 8),
        torch.zeros(4, 8),
        torch.zeros(4, 8),
        torch.zeros(()),
        basis(8, 2, torch.float32),
    ]
    same = copy.deepcopy(args)
    expected = f(*args)
    got = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")(*same)
    assert torch.allclose(expected, got)
    assert all(torch.equal(a, b) for a, b in zip(args, same, strict=True))


def test_explain_names_the_implementation():
    assert "runs" in clk.explain(projected_adam_step_, [torch.zeros(2)])
