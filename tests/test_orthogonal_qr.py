"""Batched QR, polar factor, extension of a basis, penalty: the document's table, gradients, and the ugly inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import relative
from torch import Tensor

import cl_kernels as clk
from cl_kernels.errors import NonFiniteError, SubspaceError
from cl_kernels.ops import extend_basis, orthogonality_penalty, polar, qr
from cl_kernels.ops.orthogonal_qr import reference

F32, F64 = torch.float32, torch.float64
U = {F32: 2.0**-24, F64: 2.0**-53}
RESIDUAL = {F32: 2e-6, F64: 1e-14}


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whatever runs by default here, and the reference."""
    with clk.use_backend(request.param):
        yield request.param


def conditioned(m: int, n: int, kappa: float, batch: int = 2) -> Tensor:
    """Singular values spread evenly over the decades, all columns alike."""
    left = torch.linalg.qr(torch.randn(batch, m, n, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(batch, n, n, dtype=F64)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(kappa, dtype=F64)).item(), n, dtype=F64)
    return (left * values) @ right


def orthogonality(q: Tensor) -> Tensor:
    q = q.double()
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=F64)).norm(dim=(-2, -1))


def assert_qr(a: Tensor, q: Tensor, r: Tensor, dtype: torch.dtype) -> None:
    n = a.shape[-1]
    assert q.shape == a.shape
    assert r.shape == (*a.shape[:-2], n, n)
    assert torch.equal(r, r.triu())
    assert (r.diagonal(dim1=-2, dim2=-1) >= 0).all()
    if a.numel():
        assert orthogonality(q).max() <= 10 * U[dtype] * n
        residual = (a.double() - q.double() @ r.double()).norm(dim=(-2, -1))
        assert (residual <= RESIDUAL[dtype] * a.double().norm(dim=(-2, -1))).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kappa", [1.3, 10.0, 1e4, 1e7])
@pytest.mark.parametrize(("m", "n"), [(768, 16), (768, 4), (512, 64), (300, 160), (40, 40), (9, 1)])
def test_the_table_of_tolerances(backend, m, n, kappa, dtype):
    a = conditioned(m, n, kappa).to(dtype)
    assert_qr(a, *qr(a), dtype)


@pytest.mark.parametrize("kappa", [10.0, 1e4, 1e7])
def test_it_is_the_unique_factorisation(kappa):
    """float32 input against LAPACK in float64: 1e-7 whatever the condition, where Householder in float32 has 3e-8 k."""
    a = conditioned(300, 24, kappa).float()
    q, r = qr(a)
    with clk.use_backend("reference"):
        exact = qr(a.double())
    assert relative(q, exact.q) <= 2e-7
    assert relative(r, exact.r) <= 2e-7


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("angle", [1.2, 0.9])
def test_pivots_that_hide_the_condition(backend, angle, dtype):
    """Kahan's matrix: no pivot is small, the last singular value is; the bound of the condition must see it."""
    n = 60
    sine, cosine = torch.tensor(angle, dtype=F64).sin(), torch.tensor(angle, dtype=F64).cos()
    kahan = torch.eye(n, dtype=F64) - cosine * torch.ones(n, n, dtype=F64).triu(1)
    kahan = sine ** torch.arange(n, dtype=F64)[:, None] * kahan
    a = (torch.linalg.qr(torch.randn(2, 150, n, dtype=F64)).Q @ kahan).to(dtype)
    assert_qr(a, *qr(a), dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_columns_of_very_different_length_have_full_rank(backend, dtype):
    a = (torch.randn(64, 5, dtype=F64) * torch.tensor([1e15, 1.0, 1e-15, 1e-6, 1e6])).to(dtype)
    q, r = qr(a, check=True)
    assert orthogonality(q) <= 10 * U[dtype] * 5
    for j in range(5):
        assert (a[:, j].double() - q.double() @ r[:, j].double()).norm() <= RESIDUAL[dtype] * a[:, j].double().norm()


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e18), (F32, 1e30), (F32, 1e-20), (F64, 1e300), (F64, 1e-290)])
def test_huge_and_tiny(backend, dtype, scale):
    a = conditioned(50, 7, 100.0).to(dtype) * scale
    q, r = qr(a, check=True)
    assert orthogonality(q).max() <= 10 * U[dtype] * 7
    assert relative(q.double() @ (r.double() / scale), a.double() / scale) <= RESIDUAL[dtype]


DEFICIENT = ["zero", "duplicate", "zero_column", "combination", "rank_one", "zero_first"]


def deficient(kind: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    a = torch.randn(2, m, n, dtype=F64).to(dtype)
    if kind == "zero":
        a[1] = 0
    elif kind == "duplicate":
        a[1, :, -1] = a[1, :, 1]
    elif kind == "zero_column":
        a[1, :, n // 2] = 0
    elif kind == "combination":
        a[1, :, n // 2] = a[1, :, : n // 2].double().sum(-1).to(dtype)
    elif kind == "rank_one":
        a[1] = a[1, :, :1]
    else:
        a[1, :, 0] = 0
    return a


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("m", "n"), [(200, 16), (12, 5), (6, 6), (130, 40)])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_deficient_rank_is_flagged_orthonormal_and_damped(backend, kind, m, n, dtype):
    a = deficient(kind, m, n, dtype).requires_grad_()
    q, r = qr(a)
    assert_qr(a.detach(), q.detach(), r.detach(), dtype)
    (grad,) = torch.autograd.grad((q * torch.linspace(-1, 1, q.numel()).to(q).view_as(q)).sum(), a)
    assert grad.isfinite().all()
    delta = 10 * n * U[dtype] * r[1].diagonal().max().item()
    assert delta == 0 or grad[1].norm() <= 10 * m * n / delta
    with pytest.raises(SubspaceError, match=r"a\[1\] is numerically rank deficient"):
        qr(a, check=True)
    if kind == "zero":
        assert torch.equal(q[1], torch.eye(m, n, dtype=dtype))
        assert torch.equal(r[1], torch.zeros(n, n, dtype=dtype))
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    alone = qr(a[:1].detach())
    assert torch.equal(alone.q[0], q[0])


def test_the_damped_gradient_is_the_documents_formula(backend):
    a = deficient("duplicate", 60, 6, F32)
    _, r, solve, status = torch.ops.cl_kernels.qr(a)
    assert status.tolist() == [reference.OK, reference.DEFICIENT]
    wide = r[1].double()
    delta = 10 * 6 * U[F32] * wide.diagonal().max()
    expected = wide @ torch.linalg.inv(wide.mT @ wide + delta**2 * torch.eye(6, dtype=F64))
    assert relative(solve[1], expected) <= 1e-5
    assert relative(solve[0], torch.linalg.inv(r[0].double()).mT) <= 1e-5


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_poisons_itself_only(backend, dtype, value):
    a = torch.randn(3, 30, 4, dtype=dtype)
    clean = qr(a)
    a[1, 7, 2] = value
    x = a.clone().requires_grad_()
    q, r = qr(x)
    assert q[1].isnan().all()
    assert r[1].triu().isnan().sum() == 10
    assert torch.equal(r[1].tril(-1), torch.zeros_like(r[1]))
    for i in (0, 2):
        assert torch.equal(q[i], clean.q[i])
        assert torch.equal(r[i], clean.r[i])
    (grad,) = torch.autograd.grad(q[0].sum() + q[1].sum() + r[2].sum(), x)
    assert grad[[0, 2]].isfinite().all()
    with pytest.raises(NonFiniteError, match=r"a\[1\] holds NaN"):
        qr(a, check=True)
    assert polar(a)[1].isnan().all()
    assert polar(a)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 7, 7), (3, 1, 1), (5, 1)])
def test_empty_batches_and_single_entries(backend, shape):
    a = torch.randn(shape, requires_grad=True)
    q, r = qr(a)
    assert_qr(a.detach(), q.detach(), r.detach(), F32)
    (q.sum() + r.sum()).backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape
    assert polar(a).shape == a.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_is_computed_in_float32(backend, dtype):
    a = torch.randn(2, 64, 8).to(dtype).requires_grad_()
    q, r = qr(a)
    wide = qr(a.detach().float())
    assert (q.dtype, r.dtype) == (dtype, F32)
    assert torch.equal(q, wide.q.to(dtype))
    assert torch.equal(r, wide.r)
    q.float().square().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == dtype
    assert polar(a).dtype == dtype
    assert extend_basis(wide.q[..., :2], a).q.dtype == dtype


@given(
    m=st.sampled_from([1, 2, 3, 7, 8, 9, 33, 64, 257]),
    n=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31]),
    lead=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "flipped"]),
    dtype=st.sampled_from([F32, F64]),
    scale=st.sampled_from([1.0, 1e6, 1e-6]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_layout(m, n, lead, layout, dtype, scale, seed):
    m = max(m, n)
    torch.manual_seed(seed)
    a = torch.randn(*lead, m, n, dtype=dtype) * scale
    if layout == "transposed":
        a = a.mT.contiguous().mT
    elif layout == "sliced":
        a = torch.cat([a, a], -1)[..., ::2]
    elif layout == "expanded":
        a = a.expand(2, *a.shape)
    elif layout == "flipped":
        a = a.flip(-1)
    q, r = qr(a)
    assert_qr(a, q, r, dtype)
    assert q.is_contiguous()
    if layout == "expanded" and a.numel():
        assert torch.equal(q[0], q[1])


@given(n=st.sampled_from([1, 3, 4, 16, 20]), batch=st.sampled_from([2, 5]), seed=st.integers(0, 10**6))
def test_permuted_batches_give_the_same_bits(n, batch, seed):
    torch.manual_seed(seed)
    a = torch.randn(batch, 65, n)
    order = torch.randperm(batch)
    q, r = qr(a)
    moved = qr(a[order])
    assert torch.equal(moved.q, q[order])
    assert torch.equal(moved.r, r[order])
    assert torch.equal(qr(a[0]).q, q[0])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_torchs_switch_for_fast_products_changes_nothing(precision):
    a, p = torch.randn(3, 100, 8), torch.linalg.qr(torch.randn(3, 100, 20)).Q
    before = torch.get_float32_matmul_precision()
    exact = [qr(a).q, polar(a), extend_basis(p, a).q]
    try:
        torch.set_float32_matmul_precision(precision)
        fast = [qr(a).q, polar(a), extend_basis(p, a).q]
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(x, y) for x, y in zip(exact, fast, strict=True))


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5), (9, 1), (5, 5), (2, 3, 7, 4)])
def test_gradcheck(backend, shape):
    a = torch.randn(shape, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(qr(x)), a, atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradcheck(polar, a, atol=1e-7, rtol=1e-5)
    p = torch.linalg.qr(torch.randn(*shape[:-1], 2, dtype=F64)).Q
    if shape[-2] >= shape[-1] + 2:
        assert torch.autograd.gradcheck(lambda x: tuple(extend_basis(p, x))[:3], a, atol=1e-7, rtol=1e-5)


def test_gradgradcheck(backend):
    a = torch.randn(2, 6, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(qr(x)), a)


def positive(a: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own, with the signs of ours: differentiable by torch."""
    q, r = torch.linalg.qr(a)
    sign = torch.where(r.detach().diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(a)
    return q * sign[..., None, :], r * sign[..., :, None]


@pytest.mark.parametrize("loss", ["q", "r", "both"])
@pytest.mark.parametrize(("m", "n"), [(12, 5), (9, 1), (5, 5), (768, 16), (200, 64), (300, 4)])
def test_gradients_agree_with_torch_autograd(backend, m, n, loss):
    a = torch.randn(2, m, n, dtype=F64)
    gq, gr = torch.randn_like(a), torch.randn(2, n, n, dtype=F64)
    grads = []
    for factor in (qr, positive):
        x = a.clone().requires_grad_()
        q, r = factor(x)
        outputs = {"q": (q,), "r": (r,), "both": (q, r)}[loss]
        grads.append(torch.autograd.grad(outputs, x, {"q": (gq,), "r": (gr,), "both": (gq, gr)}[loss])[0])
    assert relative(*grads) <= 1e-12


@pytest.mark.parametrize("kappa", [1.3, 10.0, 1e3, 1e5])
def test_float32_gradients_stay_within_the_documents_bound(backend, kappa):
    a = conditioned(300, 16, kappa)
    gq, gr = torch.randn_like(a), torch.randn(2, 16, 16, dtype=F64)
    x = a.float().requires_grad_()
    (ours,) = torch.autograd.grad(tuple(qr(x)), x, (gq.float(), gr.float()))
    y = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(positive(y), y, (gq.float().double(), gr.float().double()))
    assert relative(ours, exact) <= 2e-6 + 2e-8 * kappa


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-13), (F32, 2e-6)])
def test_invariants_of_the_gradient(backend, dtype, tolerance):
    """Q alone does not see an upper triangular change of A; R alone sees nothing outside of A's span."""
    a = conditioned(100, 12, 10.0).to(dtype).requires_grad_()
    q, r = qr(a)
    (grad,) = torch.autograd.grad(q, a, torch.randn_like(q), retain_graph=True)
    wide, g = a.detach().double(), grad.double()
    assert ((wide.mT @ g).triu().norm() / (wide.norm() * g.norm())) <= tolerance * 10
    (grad,) = torch.autograd.grad(r, a, torch.randn_like(r))
    g, p = grad.double(), q.detach().double()
    assert ((g - p @ (p.mT @ g)).norm() / g.norm()) <= tolerance * 10


def test_what_is_not_wanted_costs_nothing():
    a = torch.randn(4, 20, 3, requires_grad=True)
    q, r = qr(a)
    (gq,) = torch.autograd.grad(q.sum(), a, retain_graph=True)
    (gr,) = torch.autograd.grad(r.sum(), a, retain_graph=True)
    (both,) = torch.autograd.grad(q.sum() + r.sum(), a)
    assert relative(gq + gr, both) <= 1e-5
    assert qr(a.detach()).q.requires_grad is False


# -- polar ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kappa", [1.3, 1e4, 1e7])
def test_polar_is_nearest_and_turns_with_its_input(backend, kappa, dtype):
    a = conditioned(90, 12, kappa).to(dtype)
    q = polar(a)
    assert orthogonality(q).max() <= 10 * U[dtype] * 12
    h = q.double().mT @ a.double()
    assert relative(h, h.mT) <= 1e3 * U[dtype]
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=F64)).Q
    if kappa < 1e3:
        assert relative(polar(a.double() @ turn), q.double() @ turn) <= 1e3 * U[dtype] * kappa


def test_polar_of_deficient_rank_is_orthonormal_with_a_finite_gradient(backend):
    a = deficient("duplicate", 30, 6, F32).requires_grad_()
    q = polar(a)
    assert orthogonality(q.detach()).max() <= 1e-5
    q.cumsum(-1).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


# -- extend_basis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("share", [1.0, 50.0])
def test_extension_of_a_history(backend, dtype, share):
    """The new block is dominated by the old span: one projection leaves 1e-5, two 5e-7."""
    p = torch.linalg.qr(torch.randn(3, 300, 144, dtype=F64)).Q.to(dtype)
    a = (torch.randn(3, 300, 16, dtype=F64) + share * p.double() @ torch.randn(3, 144, 16, dtype=F64)).to(dtype)
    q, s, r, kept = extend_basis(p, a)
    assert kept.all()
    assert orthogonality(q).max() <= 10 * U[dtype] * 16
    assert (p.double().mT @ q.double()).norm(dim=(-2, -1)).max() <= (1e-13 if dtype == F64 else 1e-5 * 3)
    assert relative(p.double() @ s.double() + q.double() @ r.double(), a) <= RESIDUAL[dtype]
    assert torch.equal(r, r.triu())


def test_twelve_tasks_stay_orthonormal_up_to_the_last_column(backend):
    m, width = 96, 8
    basis = torch.zeros(m, 0)
    for _ in range(m // width):
        q, _, _, kept = extend_basis(basis, torch.randn(m, width))
        assert kept.all()
        basis = torch.cat([basis, q], -1)
    assert orthogonality(basis) <= 8e-6
    q, s, r, kept = extend_basis(basis, torch.randn(m, width))  # a thirteenth: nothing is left
    assert not kept.any()
    assert torch.equal(q, torch.zeros_like(q))
    assert torch.equal(r, torch.zeros_like(r))
    assert s.isfinite().all()


def test_dropped_columns_are_constants_and_the_others_have_the_gradient_they_would_have_alone():
    """A column inside the old span gets no gradient, from q, r or the coefficients, and changes none of the others'."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=generator)).Q
    fresh = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    inside = basis @ torch.randn(6, 1, dtype=torch.float64, generator=generator)
    weights = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (40, 6, 4)]  # of q, S and r
    kept = torch.tensor([0, 1, 3])

    def gradient(a: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        a = a.clone().requires_grad_()
        out = extend_basis(basis, a)
        parts = (out.q, out.coefficients, out.r)
        given = (weights[0][:, columns], weights[1][:, columns], weights[2][columns][:, columns])
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(parts, given, strict=True)), a)[0]

    whole = gradient(torch.cat((fresh[:, :2], inside, fresh[:, 2:]), dim=1), torch.arange(4))
    assert torch.equal(whole[:, 2], torch.zeros(40, dtype=torch.float64))
    torch.testing.assert_close(whole[:, kept], gradient(fresh, kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_columns_of_the_old_span_are_dropped_and_the_others_are_not(backend, dtype):
    p = torch.linalg.qr(torch.randn(40, 10, dtype=F64)).Q.to(dtype)
    new = torch.randn(40, 3, dtype=dtype)
    a = torch.stack([new[:, 0], p[:, 3] * 2, new[:, 1], new[:, 0] - new[:, 1], new[:, 2], torch.zeros(40)], -1)
    q, s, r, kept = extend_basis(p, a.to(dtype).clone().requires_grad_())
    assert kept.tolist() == [True, False, True, False, True, False]
    assert torch.equal(q[:, ~kept], torch.zeros(40, 3, dtype=dtype))
    assert orthogonality(q[:, kept].detach()) <= 30 * U[dtype]
    assert relative((p.double() @ s.double() + q.double() @ r.double()).detach(), a) <= 1e-5
    assert not extend_basis(p, a.to(dtype), tolerance=0.999).kept[1]


def test_tolerance_is_relative_to_the_columns_length(backend):
    p = torch.eye(20, 4)
    new = torch.eye(20)[:, 10:11]
    a = 100.0 * (p[:, :1] + 5e-3 * new)
    assert extend_basis(p, a).kept.all()
    assert not extend_basis(p, a, tolerance=1e-2).kept.any()


def test_a_basis_is_shared_and_constant(backend):
    p = torch.linalg.qr(torch.randn(30, 5)).Q.requires_grad_()
    a = torch.randn(4, 30, 3, requires_grad=True)
    extension = extend_basis(p, a)
    assert extension.coefficients.shape == (4, 5, 3)
    extension.q.sum().backward()
    assert p.grad is None
    assert a.grad is not None
    single = extend_basis(p.detach(), a[2].detach())
    assert torch.allclose(single.q, extension.q[2], atol=1e-6)
    bases = torch.linalg.qr(torch.randn(4, 30, 5)).Q
    assert extend_basis(bases, a[0].detach()).q.shape == (4, 30, 3)


def test_no_history_is_a_qr(backend):
    a = torch.randn(2, 30, 4)
    q, s, r, kept = extend_basis(torch.zeros(30, 0), a)
    assert s.shape == (2, 0, 4)
    assert kept.all()
    assert relative(q, qr(a).q) <= 1e-6
    assert relative(r, qr(a).r) <= 1e-6


# -- penalty ----------------------------------------------------------------------------------------------------------


def official(new: Tensor, old: Tensor | None) -> Tensor:
    """The stack's whole Gram matrix against the identity."""
    stack = new if old is None else torch.cat([old, new], -1)
    gram = stack.mT @ stack
    return torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-5)])
@pytest.mark.parametrize("history", [None, 0, 12])
@pytest.mark.parametrize("cached", [False, True])
def test_penalty_is_the_official_one(dtype, tolerance, history, cached):
    new = torch.randn(3, 40, 5, dtype=dtype, requires_grad=True)
    old = None if history is None else torch.randn(3, 40, history, dtype=dtype)
    past = orthogonality_penalty(old).square() if cached and old is not None else None
    ours, theirs = orthogonality_penalty(new, old, past=past), official(new, old)
    assert relative(ours.detach(), theirs.detach()) <= tolerance
    weights = torch.randn(3, dtype=dtype)
    grads = [torch.autograd.grad((value * weights).sum(), new)[0] for value in (ours, theirs)]
    assert relative(*grads) <= tolerance


def test_penalty_gradcheck_and_its_zero():
    new, old = torch.randn(2, 7, 3, dtype=F64, requires_grad=True), torch.randn(2, 7, 2, dtype=F64)
    for norm in ("frobenius", "cross", "l1", "mean_square"):
        assert torch.autograd.gradcheck(lambda x, norm=norm: orthogonality_penalty(x, old, norm=norm), new)
    exact = torch.eye(6, 3, requires_grad=True)
    value = orthogonality_penalty(exact)
    value.backward()
    assert value == 0
    assert torch.equal(exact.grad, torch.zeros(6, 3))


def test_penalty_cannot_fall_below_what_the_capacity_allows():
    stack = torch.linalg.qr(torch.randn(10, 10)).Q
    assert orthogonality_penalty(stack[:, :6], torch.cat([stack[:, 6:], stack[:, :3]], -1)) >= 3**0.5 - 1e-4


def test_norms_of_the_cross_block():
    new, old = torch.randn(2, 9, 3), torch.randn(2, 9, 4)
    c = old.mT @ new
    assert torch.allclose(orthogonality_penalty(new, old, norm="l1"), c.abs().sum((-2, -1)))
    assert torch.allclose(orthogonality_penalty(new, old, norm="cross"), c.norm(dim=(-2, -1)))
    assert torch.allclose(orthogonality_penalty(new, old, norm="mean_square"), c.norm(dim=(-2, -1)) ** 2 / 12)
    assert orthogonality_penalty(new.bfloat16(), old.bfloat16()).dtype == F32


# -- contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [qr, polar])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(3, 4), ValueError, r"m >= n >= 1, got \(3, 4\)"),
        (torch.ones(3, 0), ValueError, "m >= n >= 1"),
        (torch.ones(3), ValueError, "expected shape"),
        (torch.ones(4, 3, dtype=torch.int64), ValueError, "floating-point"),
        (torch.ones(4, 3, dtype=torch.complex64), ValueError, "floating-point"),
        (torch.ones(4, 3).to_sparse(), RuntimeError, "dense"),
        ([[1.0]], TypeError, "torch.Tensor"),
    ],
)
def test_wrong_matrices_are_refused(function, value, error, words):
    with pytest.raises(error, match=words):
        function(value)


def test_wrong_extensions_and_penalties_are_refused():
    a, p = torch.ones(5, 2), torch.ones(5, 3)
    with pytest.raises(ValueError, match="basis"):
        extend_basis(torch.ones(4, 3), a)
    with pytest.raises(ValueError, match="tolerance"):
        extend_basis(p, a, tolerance=1.0)
    with pytest.raises(ValueError, match="m >= n"):
        extend_basis(p, torch.ones(5, 6))
    with pytest.raises(RuntimeError, match="move one"):
        extend_basis(p.to("meta"), a)
    with pytest.raises(ValueError, match="norm"):
        orthogonality_penalty(a, p, norm="l2")
    with pytest.raises(ValueError, match="old"):
        orthogonality_penalty(a, norm="l1")
    with pytest.raises(ValueError, match="old"):
        orthogonality_penalty(a, torch.ones(4, 3))


def test_it_compiles_whole():
    p = torch.linalg.qr(torch.randn(2, 20, 4)).Q

    def loss(a: Tensor) -> Tensor:
        q, r = qr(a)
        e = extend_basis(p, a)
        return q.sum() + r.square().sum() + polar(a).cumsum(-1).sum() + e.q.sum() + orthogonality_penalty(a, p).sum()

    a = torch.randn(2, 20, 3, requires_grad=True)
    (eager,) = torch.autograd.grad(loss(a), a)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    (traced,) = torch.autograd.grad(compiled(a), a)
    assert relative(traced, eager) <= 1e-5


def test_explain_knows_the_room():
    assert "reference" in clk.explain(qr, torch.ones(3, 2))
    assert "reference" in clk.explain("extend_basis")
