"""Second moments: golden vectors V3, properties of method-null-space 14.1, layouts, errors, and the noise floor."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, Rows, relative, rows

import cl_kernels as clk
from cl_kernels.ops import (
    _native,
    _registry,
    expand_head_grams,
    update_covariance_,
    update_covariances_,
    update_head_grams_,
)

F64 = torch.float64
BACKENDS = ["reference", "native"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native" and _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    with clk.use_backend(request.param):
        yield request.param


def zeros(d, dtype=F64):
    return torch.zeros(d, d, dtype=dtype)


def gold(x, weight=None):
    flat = x.double().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    w = torch.ones(flat.shape[0], dtype=F64) if weight is None else weight.double().reshape(-1)
    return flat.mT @ (w[:, None] * flat), w @ flat, w.sum()


# -- golden vectors -----------------------------------------------------------------------------------------------


def v3():
    b, h, n, j = torch.meshgrid(*(torch.arange(k, dtype=F64) for k in (3, 2, 3, 2)), indexing="ij")
    q = ((7 * b + 5 * h + 3 * n + 2 * j) % 11 - 5) / 4
    r, c = torch.meshgrid(torch.arange(4, dtype=F64), torch.arange(4, dtype=F64), indexing="ij")
    weight = ((3 * r + 5 * c + r * c) % 7 - 3) / 4
    b, h, n, m = torch.meshgrid(*(torch.arange(k, dtype=F64) for k in (3, 2, 3, 3)), indexing="ij")
    return q, weight, ((2 * b + 3 * h + 5 * n + m**2) % 7 + 1) / 16


def listed(matrix):
    """The order that V3 prints: first row, then the rest of the diagonal."""
    return torch.cat([matrix[0], matrix.diagonal()[1:]])


C1_ROWS = [5.00390625, 0.2109375, 2.71875, 5.2265625, 5.1171875, 6.71875, 12.2421875]


def test_v3_head_grams_and_expansion(backend):
    q, weight, _ = v3()
    grams = update_head_grams_(torch.zeros(2, 2, 2, dtype=F64), q)
    expected = [[[5.5625, -0.5], [-0.5, 5.3125]], [[5.8125, 4.6875], [4.6875, 5.8125]]]
    assert torch.equal(grams, torch.tensor(expected, dtype=F64))
    c1 = expand_head_grams(grams, weight)
    assert torch.equal(listed(c1), torch.tensor(C1_ROWS, dtype=F64))
    alpha = torch.tensor([1, 2, 0.5, 1.5], dtype=F64)
    centre = torch.eye(4, dtype=F64) - 0.25
    folded = centre @ (alpha[:, None] * c1 * alpha) @ centre
    expected = [5.5108642578, -5.4403076172, 1.9346923828, -2.0052490234, 8.2374267578, 2.3233642578, 7.3477783203]
    assert torch.allclose(listed(folded), torch.tensor(expected, dtype=F64), atol=1e-9)


def test_v3_batch_weighting_over_weights_a_short_last_batch(backend):
    q, weight, s = v3()
    grams, c2 = torch.zeros(2, 2, 2, dtype=F64), zeros(3)
    for part in (slice(0, 2), slice(2, 3)):
        mean = 1 / q[part].shape[:3].numel()
        update_head_grams_(grams, q[part], alpha=mean)
        update_covariance_(c2, s[part], alpha=mean)
    expected = [0.5423177083, 0.0419921875, 0.2936197917, 0.5452473958, 0.5983072917, 0.78515625, 1.353515625]
    assert torch.allclose(listed(expand_head_grams(grams, weight)), torch.tensor(expected, dtype=F64), atol=1e-9)
    expected = [0.1302083333, 0.1422526042, 0.0895182292, 0.1735026042, 0.1442057292]
    assert torch.allclose(listed(c2), torch.tensor(expected, dtype=F64), atol=1e-9)


def test_v3_softmax_columns(backend):
    c2 = update_covariance_(zeros(3), v3()[2])
    assert torch.equal(listed(c2) * 256, torch.tensor([312, 329, 212, 399, 330], dtype=F64))
    assert c2[1, 2] * 256 == 252
    sigma = torch.tensor([0.5, 1, 2], dtype=F64)
    folded = c2 / sigma[:, None] / sigma
    assert torch.equal(listed(folded), torch.tensor([4.875, 2.5703125, 0.828125, 1.55859375, 0.322265625], dtype=F64))


@pytest.mark.parametrize(("dtype", "allowed"), [(F64, 1e-13), (torch.float32, 2e-6)])
def test_p3_head_grams_equal_the_expanded_rows(backend, dtype, allowed):
    torch.manual_seed(1)
    weight = torch.randn(768, 768, dtype=F64) / 768**0.5
    q = torch.randn(4, 12, 197, 64, dtype=F64)
    expanded = torch.einsum("bhnj,hjd->hbnd", q, weight.reshape(12, 64, 768))  # J1, one block of rows a head
    direct = gold(expanded)[0]
    grams = update_head_grams_(torch.zeros(12, 64, 64, dtype=dtype), q.to(dtype))
    assert relative(expand_head_grams(grams, weight.to(dtype)), direct) <= allowed


# -- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", BACKENDS)
@given(
    recipe=rows(),
    state=st.sampled_from([F64, torch.float32]),
    weighted=st.booleans(),
    scales=st.sampled_from([(1, 1), (0.5, 0), (-2, 0.25)]),
)
def test_equals_the_formula_for_every_size_dtype_and_layout(backend_name, recipe, state, weighted, scales):
    if backend_name == "native" and _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    alpha, beta = scales
    x = recipe.make()
    weight = torch.rand(x.shape[:-1]) if weighted else None
    before = gold(torch.randn(5, recipe.d))[0].to(state)
    cov, total, count = before.clone(), torch.ones(recipe.d, dtype=state), torch.ones((), dtype=F64)
    with clk.use_backend(backend_name):
        assert update_covariance_(cov, x, alpha=alpha, beta=beta, total=total, count=count, weight=weight) is cov
    product, column_sums, number = gold(x, weight)
    assert torch.equal(cov, cov.mT)
    size = beta * before.abs().max() + product.abs().max() if cov.numel() else 0
    eps = 1e-12 if recipe.dtype == F64 and state == F64 else 5e-6
    assert torch.allclose(
        cov.double(), beta * before.double() + alpha * product, rtol=0, atol=float(eps * size) + 1e-36
    )  # float32 underflows
    reach = gold(x.abs(), None if weight is None else weight.abs())[1]
    assert bool(((total.double() - beta - alpha * column_sums).abs() <= 1e-6 * (1 + 2 * reach)).all())
    assert float(count) == pytest.approx(beta + alpha * float(number), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 24, 33, 100])
def test_every_instruction_set_gives_the_same_matrix(isa, dtype, d):
    x = torch.randn(3, 211, d).to(dtype)
    expected, column_sums, _ = gold(x)
    total = torch.zeros(d, dtype=F64)
    with clk.use_backend("native"):
        cov = update_covariance_(zeros(d), x, total=total)
        weighted = update_covariance_(zeros(d), x, weight=torch.full((3, 211), 0.5))
    assert torch.equal(cov, cov.mT)
    assert relative(cov, expected) <= (1e-14 if dtype == F64 else 5e-7)
    assert relative(weighted, expected / 2) <= (1e-14 if dtype == F64 else 5e-7)
    assert torch.allclose(total, column_sums, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_floor(backend, dtype):
    """At most twice the error of torch in the same dtype with float32 sums, which torch has only after a cast."""
    x = (torch.randn(3001, 130) + 0.5).to(dtype)
    expected = gold(x)[0]
    wide = x if dtype == F64 else x.float()
    floor = relative(wide.mT @ wide, expected)
    ours = relative(update_covariance_(zeros(130), x), expected)
    assert ours <= 2 * floor + 1e-14, f"{ours:.1e} where torch has {floor:.1e}"


def test_sixteen_bit_rows_keep_the_matrix_positive(backend):
    """torch's own bfloat16 product makes it indefinite; sums in float32 leave rounding noise only."""
    mix = torch.linalg.qr(torch.randn(96, 96))[0]
    x = ((torch.randn(4000, 96) * torch.logspace(0, -4, 96)) @ mix).bfloat16()
    ours = torch.linalg.eigvalsh(update_covariance_(zeros(96), x))
    naive = torch.linalg.eigvalsh((x.mT @ x).double())
    assert ours[0] > -1e-7 * ours[-1]
    assert naive[0] < -1e-5 * naive[-1]


def test_float16_squares_do_not_overflow(backend):
    x = torch.full((4, 3), 6e4, dtype=torch.float16)
    assert torch.equal(update_covariance_(zeros(3), x), torch.full((3, 3), 4 * 6e4**2, dtype=F64))


def test_eight_bit_rows_are_widened(backend):
    x = torch.randn(50, 20).to(torch.float8_e4m3fn)
    assert relative(update_covariance_(zeros(20), x), gold(x)[0]) < 1e-6


def test_batches_add_up_whatever_their_split_and_order(backend):
    x = torch.randn(1000, 40)
    whole = update_covariance_(zeros(40), x)
    split = zeros(40)
    for part in x[torch.randperm(1000)].split(137):
        update_covariance_(split, part)
    assert relative(split, whole) <= 5e-7


def test_same_inputs_give_the_same_bits(backend):
    x = torch.randn(2000, 65)
    assert torch.equal(update_covariance_(zeros(65), x), update_covariance_(zeros(65), x))


def test_thread_count_does_not_change_a_bit():
    if _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    x, before = torch.randn(2500, 150), torch.get_num_threads()
    q = torch.randn(2, 6, 700, 32)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total = torch.zeros(150, dtype=F64)
            cov = update_covariance_(zeros(150), x, total=total)
            results.append((cov, total, update_head_grams_(torch.zeros(6, 32, 32), q)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_layers_equal_one_by_one(backend):
    shapes = [(7, 3), (4, 50, 33), (1, 1), (0, 5), (300, 130)]
    xs = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, itertools.cycle(DTYPES), strict=False)]
    covs = [zeros(x.shape[-1], state) for x, state in zip(xs, itertools.cycle([F64, torch.float32]), strict=False)]
    totals = [torch.zeros(x.shape[-1]) for x in xs]
    counts = [torch.zeros((), dtype=F64) for _ in xs]
    weights = [torch.rand(x.shape[:-1]) for x in xs]
    update_covariances_(covs, xs, alpha=0.5, totals=totals, counts=counts, weights=weights)
    for cov, x, total, count, weight in zip(covs, xs, totals, counts, weights, strict=True):
        one = [torch.zeros_like(cov), torch.zeros_like(total), torch.zeros_like(count)]
        update_covariance_(one[0], x, alpha=0.5, total=one[1], count=one[2], weight=weight)
        assert torch.equal(one[0], cov)
        assert torch.equal(one[1], total)
        assert torch.equal(one[2], count)


def test_layers_may_share_their_input_but_not_their_state(backend):
    x, covs = torch.randn(9, 4), [zeros(4), zeros(4)]
    update_covariances_(covs, [x, x])
    assert torch.equal(covs[0], covs[1])
    with pytest.raises(ValueError, match="share memory"):
        update_covariances_([covs[0], covs[0]], [x, x])


def test_no_layers_is_nothing_to_do(backend):
    update_covariances_([], [])


def test_empty_rows_apply_beta_only(backend):
    cov, total, count = torch.eye(6, dtype=F64), torch.ones(6), torch.ones(())
    update_covariance_(cov, torch.empty(0, 6), beta=0.5, total=total, count=count)
    assert torch.equal(cov, torch.eye(6, dtype=F64) / 2)
    assert torch.equal(total, torch.full((6,), 0.5))
    assert float(count) == 0.5


def test_rows_of_width_zero_are_still_counted(backend):
    for shape in ((3000, 0), (2, 3, 0)):
        total, count = torch.zeros(0), torch.ones(())
        update_covariance_(zeros(0), torch.empty(shape), total=total, count=count)
        assert float(count) == 1 + torch.Size(shape[:-1]).numel()


def test_beta_zero_reads_nothing(backend, poison):
    cov, total = torch.full((40, 40), math.nan, dtype=F64), torch.full((40,), math.nan)
    x = torch.randn(70, 40)
    update_covariance_(cov, x, beta=0.0, total=total)
    assert relative(cov, gold(x)[0]) < 1e-6
    assert torch.allclose(total, x.sum(0), atol=1e-4)


def test_only_the_upper_triangle_is_read(backend):
    cov = torch.eye(40, dtype=F64)
    cov[30, 2] = math.nan
    assert bool(update_covariance_(cov, torch.randn(9, 40)).isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values_spread_as_in_a_product(backend, dtype, bad):
    x = torch.randn(80, 40).to(dtype)
    x[17, 5] = bad
    cov = update_covariance_(zeros(40), x)
    spoiled = ~cov.isfinite()
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[5, :] = expected[:, 5] = True
    assert torch.equal(spoiled, expected)


def test_narrow_rows_are_folded_and_leave_none_out(backend):
    for d, n in itertools.product((1, 3, 4, 16), (1, 31, 64, 65, 1030)):
        x, total = torch.randn(n, d), torch.zeros(d, dtype=F64)
        cov = update_covariance_(zeros(d), x, total=total)
        assert relative(cov, gold(x)[0]) < 1e-6
        assert torch.equal(cov, cov.mT)
        assert torch.allclose(total, gold(x)[1], atol=1e-4)


def test_state_may_be_a_strided_view(backend):
    x = torch.randn(20, 6)
    wide = torch.zeros(8, 16, dtype=F64)
    inside = wide[1:7, 2:14:2]
    assert inside.stride() == (16, 2)
    update_covariance_(inside, x)
    assert relative(inside, gold(x)[0]) < 1e-6
    assert int((wide != 0).sum()) == 36


def test_queries_are_read_through_the_view_that_attention_makes(backend):
    qkv = torch.randn(3, 50, 3, 4, 16)
    q = qkv.permute(2, 0, 3, 1, 4)[0]  # [B, H, N, dh] of a fused projection
    grams = update_head_grams_(torch.ones(4, 16, 16, dtype=F64), q, alpha=2.0, beta=3.0)
    assert relative(grams, 3 + 2 * torch.einsum("bhni,bhnj->hij", q.double(), q.double())) < 1e-6
    assert torch.equal(grams, grams.mT)


def test_row_offsets_beyond_two_to_the_31(backend):
    try:
        far = torch.empty(2**31 + 64, dtype=torch.float16)  # 4 GiB of address space, of which two pages are touched
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    x = far.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    assert relative(update_covariance_(zeros(40), x), gold(x)[0]) < 1e-6


def test_autocast_and_matmul_precision_do_not_shorten_products(backend):
    x = torch.randn(600, 64)
    expected = gold(x)[0]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cov = update_covariance_(zeros(64), x)
            grams = torch.eye(8, dtype=F64).expand(4, 8, 8).contiguous()
            expanded = expand_head_grams(grams, x[:32])
    finally:
        torch.set_float32_matmul_precision(precision)
    assert relative(cov, expected) < 1e-6
    assert relative(expanded, gold(x[:32])[0]) < 1e-14


def test_products_are_not_formed_in_float32_where_torch_may_shorten_them(monkeypatch):
    from cl_kernels.ops.covariance.reference import _product_dtype

    x = torch.zeros(1, dtype=torch.bfloat16)
    assert _product_dtype(x) == torch.float32
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert _product_dtype(x) == F64


# -- refusals: a wrong call changes nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cov": zeros(3, torch.bfloat16)}, ValueError, "lose positive definiteness"),
        ({"cov": zeros(3, torch.float16)}, ValueError, "cov: expected torch.float32 or torch.float64"),
        ({"cov": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "cov: expected"),
        ({"cov": torch.zeros(3, 4)}, ValueError, r"cov: expected shape \[d, d\], got \(3, 4\)"),
        ({"cov": zeros(4)}, ValueError, r"x: expected shape \[..., 4\] for cov, got \(5, 3\)"),
        ({"cov": torch.zeros(1, 1).expand(3, 3)}, ValueError, "cov: cannot be written to, it is expanded"),
        ({"cov": torch.zeros(3, 3, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"x": [[1.0, 2.0, 3.0]]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(5, 3, dtype=torch.complex64)}, ValueError, "x: expected a real floating-point"),
        ({"x": torch.zeros(5, 3).to_sparse()}, RuntimeError, "x: expected a dense tensor"),
        ({"x": torch.zeros(5, 3, device="meta")}, RuntimeError, "x is on meta but cov is on cpu"),
        ({"total": torch.zeros(4)}, ValueError, r"total: expected shape \(3,\), got \(4,\)"),
        ({"total": torch.zeros(3, dtype=torch.bfloat16)}, ValueError, "total: expected"),
        ({"count": torch.zeros(1)}, ValueError, r"count: expected shape \(\), got \(1,\)"),
        ({"count": torch.zeros((), dtype=torch.int64)}, ValueError, "count: expected"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"beta": math.inf}, ValueError, "beta"),
        ({"alpha": "1"}, TypeError, "alpha"),
    ],
)
def test_wrong_calls(backend, arguments, error, message):
    call = {"cov": zeros(3), "x": torch.ones(5, 3), "total": torch.zeros(3), "count": torch.zeros(()), **arguments}
    before = {key: value.clone() for key, value in call.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        update_covariance_(call.pop("cov"), call.pop("x"), **call)
    for key, value in before.items():
        if value.layout == torch.strided and value.device.type == "cpu":
            assert torch.equal({**arguments, **call}.get(key, value), value)


def test_a_wrong_entry_changes_no_layer(backend):
    covs = [zeros(3), zeros(4)]
    with pytest.raises(ValueError, match=r"xs\[1\]: expected shape \[..., 4\] for covs\[1\], got \(2, 3\)"):
        update_covariances_(covs, [torch.ones(2, 3), torch.ones(2, 3)])
    with pytest.raises(ValueError, match="totals: expected 2 tensors"):
        update_covariances_(covs, [torch.ones(2, 3), torch.ones(2, 4)], totals=[torch.zeros(3)])
    with pytest.raises(RuntimeError, match=r"covs\[1\] is on meta but covs\[0\] is on cpu"):
        update_covariances_([covs[0], covs[1].to("meta")], [torch.ones(2, 3), torch.ones(2, 4, device="meta")])
    assert not any(bool(cov.any()) for cov in covs)


@pytest.mark.parametrize("shared", ["x", "total", "count", "weight"])
def test_state_must_not_alias_anything(backend, shared):
    memory = torch.ones(60)
    cov = memory[:9].view(3, 3)
    call = {
        "x": {"x": memory[5:20].view(5, 3)},
        "total": {"total": memory[8:11]},
        "count": {"count": memory[8]},
        "weight": {"weight": memory[4:9]},
    }[shared]
    with pytest.raises(ValueError, match="share memory"):
        update_covariance_(cov, **{"x": torch.ones(5, 3), **call})
    assert torch.equal(memory, torch.ones(60))


@pytest.mark.parametrize(
    ("grams", "q", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(1, 2, 3), r"q: expected shape \[B, H, N, dh\]"),
        (torch.zeros(2, 3, 3), torch.zeros(1, 3, 4, 3), r"grams: expected shape \(3, 3, 3\)"),
        (torch.zeros(2, 3, 3).bfloat16(), torch.zeros(1, 2, 4, 3), "grams: expected torch.float32 or torch.float64"),
        (torch.zeros(1, 3, 3).expand(2, 3, 3), torch.zeros(1, 2, 4, 3), "grams: cannot be written to"),
    ],
)
def test_wrong_head_grams(backend, grams, q, message):
    with pytest.raises(ValueError, match=message):
        update_head_grams_(grams, q)


def test_wrong_expansions():
    with pytest.raises(ValueError, match=r"weight: expected shape \[6, D\]"):
        expand_head_grams(torch.zeros(2, 3, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"grams: expected shape \[H, dh, dh\]"):
        expand_head_grams(torch.zeros(3, 3), torch.zeros(3, 4))


# -- registration -------------------------------------------------------------------------------------------------


def opcheck_inputs():
    state = (zeros(3), torch.randn(5, 3), torch.zeros(3), torch.zeros(()), torch.rand(5))
    lists = ([zeros(3), zeros(2)], [torch.randn(5, 3), torch.randn(4, 2).bfloat16()])
    return [
        ("update_covariance_", (*state, 1.0, 0.5)),
        ("update_covariance_", (zeros(3), torch.randn(2, 5, 3), None, None, None, 1.0, 1.0)),
        ("update_covariances_", (*lists, [], [], [], 1.0, 1.0)),
        (
            "update_covariances_",
            (
                *lists,
                [torch.zeros(3), torch.zeros(2)],
                [torch.zeros(()), torch.zeros(())],
                [torch.rand(5), torch.rand(4)],
                1.0,
                0.0,
            ),
        ),
        ("update_head_grams_", (torch.zeros(2, 3, 3), torch.randn(4, 2, 5, 3), 1.0, 1.0)),
        ("expand_head_grams", (torch.randn(2, 3, 3, dtype=F64), torch.randn(6, 4))),
        ("expand_head_grams", (torch.randn(1, 2, 2), torch.randn(2, 4, dtype=F64, requires_grad=True))),
    ]


@pytest.mark.parametrize("case", range(len(opcheck_inputs())))
def test_opcheck(backend, case):
    name, inputs = opcheck_inputs()[case]
    torch.library.opcheck(_registry.OPS[name].overload, inputs)


def test_compiles_in_one_graph(backend):
    def step(cov, x, total, count, grams, q, weight):
        update_covariance_(cov, x, total=total, count=count)
        update_covariances_([cov], [2 * x], alpha=0.5)
        update_head_grams_(grams, q)
        return expand_head_grams(grams, weight) + cov.sum()

    def arguments():
        torch.manual_seed(3)
        state = [zeros(4), torch.randn(6, 4), torch.zeros(4), torch.zeros(())]
        return [*state, torch.zeros(2, 3, 3), torch.randn(2, 2, 5, 3), torch.randn(6, 4)]

    eager, traced = arguments(), arguments()
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    assert torch.equal(actual, expected)
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)


def test_version_counters_grow(backend):
    states = [zeros(3), torch.zeros(3), torch.zeros(()), torch.zeros(1, 3, 3)]
    before = [state._version for state in states]
    update_covariance_(states[0], torch.ones(2, 3), total=states[1], count=states[2])
    update_head_grams_(states[3], torch.ones(1, 1, 2, 3))
    assert all(state._version > old for state, old in zip(states, before, strict=True))


def test_autograd_notices_that_a_saved_tensor_was_written(backend):
    cov, w = zeros(3), torch.ones(3, 3, dtype=F64, requires_grad=True)
    loss = (cov * w).sum()
    update_covariance_(cov, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inputs_that_require_gradients_are_only_read(backend):
    x = torch.randn(4, 3, requires_grad=True)
    assert not update_covariance_(zeros(3), x * 2, weight=torch.rand(4, requires_grad=True)).requires_grad


def test_expand_is_differentiable():
    grams = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(expand_head_grams, (grams, weight))
    assert torch.autograd.gradgradcheck(expand_head_grams, (grams, weight))


def test_recipes_of_the_strategy_are_what_they_say():
    """The strategy itself: a layout that silently became contiguous would test nothing."""
    for layout, check in {
        "transposed": lambda t: t.stride() == (1, 6),
        "sliced": lambda t: t.stride(-1) == 2,
        "offset": lambda t: t.data_ptr() % 16 != 0,
        "expanded": lambda t: t.stride(0) == 0,
    }.items():
        assert check(Rows((6,), 4, torch.float32, layout, "normal", 1).make()), layout
