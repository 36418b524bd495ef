"""The CUDA kernels of the second moments, in Triton's interpreter: the bodies of test_covariance.py, and their own.

    TRITON_INTERPRET=1 pytest -m interpret tests/test_covariance_triton.py

float64, float32 and float16 rows: the interpreter multiplies bfloat16 wrongly (errors of 1e10), so that is proved on a
GPU (test_covariance_gpu.py).
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative, rows

pytestmark = pytest.mark.interpret
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is imported, so this is a process of its own
    pytest.skip("needs TRITON_INTERPRET=1 and its own process", allow_module_level=True)
pytest.importorskip("triton")

# One body for all backends: these run here with the fixture below.
from test_covariance import (  # noqa: E402, F401
    gold,
    test_a_wrong_entry_changes_no_layer,
    test_autocast_and_matmul_precision_do_not_shorten_products,
    test_bad_values_spread_as_in_a_product,
    test_batches_add_up_whatever_their_split_and_order,
    test_beta_zero_reads_nothing,
    test_compiles_in_one_graph,
    test_empty_rows_apply_beta_only,
    test_float16_squares_do_not_overflow,
    test_layers_may_share_their_input_but_not_their_state,
    test_no_layers_is_nothing_to_do,
    test_only_the_upper_triangle_is_read,
    test_queries_are_read_through_the_view_that_attention_makes,
    test_row_offsets_beyond_two_to_the_31,
    test_rows_of_width_zero_are_still_counted,
    test_state_may_be_a_strided_view,
    test_state_must_not_alias_anything,
    test_v3_batch_weighting_over_weights_a_short_last_batch,
    test_v3_head_grams_and_expansion,
    test_v3_softmax_columns,
    test_version_counters_grow,
    zeros,
)

import cl_kernels as clk  # noqa: E402
from cl_kernels.errors import BackendUnavailableError  # noqa: E402
from cl_kernels.ops import update_covariance_, update_covariances_  # noqa: E402
from cl_kernels.ops.covariance import plan  # noqa: E402

F64 = torch.float64
DTYPES = (F64, torch.float32, torch.float16)


@pytest.fixture
def backend(request):
    drawn = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if torch.bfloat16 in drawn.values():
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    with clk.use_backend("triton"):
        yield "triton"


@settings(max_examples=12)
@given(
    recipe=rows(dims=(0, 1, 3, 17, 64, 65), dtypes=DTYPES),
    state=st.sampled_from([F64, torch.float32]),
    weighted=st.booleans(),
    scales=st.sampled_from([(1, 1), (0.5, 0), (-2, 0.25)]),
)
def test_equals_the_formula_for_every_size_dtype_and_layout(recipe, state, weighted, scales):
    alpha, beta = scales
    x = recipe.make()
    weight = torch.rand(x.shape[:-1]) - 0.25 if weighted else None
    before = gold(torch.randn(5, recipe.d))[0].to(state)
    cov, total, count = before.clone(), torch.ones(recipe.d, dtype=state), torch.ones((), dtype=F64)
    with clk.use_backend("triton"):
        assert update_covariance_(cov, x, alpha=alpha, beta=beta, total=total, count=count, weight=weight) is cov
    product, column_sums, number = gold(x, weight)
    assert torch.equal(cov, cov.mT)
    reach = gold(x.abs(), None if weight is None else weight.abs())
    size = beta * before.abs().max() + reach[0].max() if cov.numel() else 0
    eps = 1e-12 if recipe.dtype == F64 and state == F64 else 1e-6
    assert torch.allclose(cov.double(), beta * before + alpha * product, rtol=0, atol=float(eps * size) + 1e-36)
    assert bool(((total.double() - beta - alpha * column_sums).abs() <= 1e-6 * (1 + 2 * reach[1])).all())
    assert float(count) == pytest.approx(beta + alpha * float(number), rel=1e-6, abs=1e-6)


def some_layers():
    shapes = [(50, 3), (2, 20, 33), (1, 1), (7, 5), (0, 7), (70, 130), (40, 256), (40, 130), (9, 0)]
    kinds = [(torch.float32, F64), (torch.float16, F64), (F64, torch.float32), (torch.float32, torch.float32)]
    xs = [torch.randn(shape).to(kinds[i % 4][0]) for i, shape in enumerate(shapes)]
    covs = [zeros(x.shape[-1], kinds[i % 4][1]) for i, x in enumerate(xs)]
    totals = [torch.zeros(x.shape[-1], dtype=(F64, torch.float32)[i % 2]) for i, x in enumerate(xs)]
    return covs, xs, totals, [torch.zeros((), dtype=(torch.float32, F64)[i % 2]) for i in range(len(xs))]


@pytest.mark.parametrize("weighted", [False, True])
def test_many_layers_give_the_bits_of_one_by_one(backend, weighted):
    covs, xs, totals, counts = some_layers()
    weights = [torch.rand(x.shape[:-1]) for x in xs] if weighted else None
    update_covariances_(covs, xs, alpha=0.5, totals=totals, counts=counts, weights=weights)
    for i, x in enumerate(xs):
        one = [torch.zeros_like(covs[i]), torch.zeros_like(totals[i]), torch.zeros_like(counts[i])]
        update_covariance_(one[0], x, alpha=0.5, total=one[1], count=one[2], weight=weights and weights[i])
        assert torch.equal(one[0], covs[i])
        assert torch.equal(one[1], totals[i])
        assert torch.equal(one[2], counts[i])
        if x.shape[-1]:
            assert relative(covs[i], gold(x, weights and weights[i])[0] / 2) < 1e-6


def test_several_launches_give_the_bits_of_one(backend, monkeypatch):
    def updated():
        torch.manual_seed(2)
        covs, xs, totals, counts = some_layers()
        update_covariances_(covs, xs, totals=totals, counts=counts)
        return covs + totals + counts

    whole = updated()
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 3 * 4 * 64 * 64)
    assert len(list(plan.launches([matrix(50, 300), matrix(9, 5)], 64, 16))) > 3
    assert all(torch.equal(a, b) for a, b in zip(updated(), whole, strict=True))


def test_chunks_are_summed_to_what_one_chunk_gives(backend, monkeypatch):
    x, weight = torch.randn(500, 70), torch.rand(500)
    results = []
    for most in (plan.MOST_ROWS, 64):
        monkeypatch.setattr(plan, "MOST_ROWS", most)
        plan.row_chunks.cache_clear()
        total, count = torch.zeros(70, dtype=F64), torch.zeros((), dtype=F64)
        results.append((update_covariance_(zeros(70), x, total=total, count=count, weight=weight), total, count))
    plan.row_chunks.cache_clear()
    for value, other, wanted in zip(*results, gold(x, weight), strict=True):
        assert not torch.equal(value, other)  # they are another sum, or the chunks were not taken
        assert relative(value, wanted) < 3e-7
        assert relative(other, wanted) < 3e-7


def test_more_matrices_than_one_launch_takes(backend, monkeypatch):
    monkeypatch.setattr(plan, "MATRICES", 3)
    xs = [torch.randn(2, 1 + i).half() for i in range(5)]
    covs = [zeros(x.shape[-1]) for x in xs]
    update_covariances_(covs, xs)
    assert all(relative(cov, gold(x)[0]) < 1e-6 for cov, x in zip(covs, xs, strict=True))


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-20, 1e15, 1e30])
def test_float32_rows_of_any_size_are_as_right_as_ordinary_ones(backend, scale):
    """Scaled products and float64 sums: not even the squares of 1e30, which no float32 product could hold, are lost."""
    x = torch.randn(200, 20) * scale
    assert relative(update_covariance_(zeros(20), x), gold(x)[0]) < 4e-7
    if scale in (1e-30, 1e30):  # a float32 state goes to 0 and to infinity where it must
        assert torch.equal(update_covariance_(zeros(20, torch.float32), x), gold(x)[0].float())


def test_an_outlier_column_leaves_the_others_exact(backend):
    x = torch.randn(300, 24)
    x[:, 3] *= 1e30
    x[:, 7] *= 1e-30
    cov, wanted = update_covariance_(zeros(24), x), gold(x)[0]
    scale = wanted.diagonal().sqrt()
    assert float(((cov - wanted) / scale / scale[:, None]).abs().max()) < 2e-7  # relative in each row and column


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_any_size_are_scaled_with_their_rows(backend, dtype):
    x, weight = torch.randn(100, 20).to(dtype), torch.rand(100) * torch.logspace(-20, 20, 100)
    wanted = gold(x, weight)[0]
    assert relative(update_covariance_(zeros(20), x, weight=weight), wanted) < 5e-7


def test_outlier_rows_cost_no_more_than_a_float32_product_loses(backend):
    x = torch.randn(300, 24)
    x[5, 3], x[9, 4] = 1e6, -1e6
    wanted = gold(x)[0]
    ours = (update_covariance_(zeros(24), x) - wanted).abs()
    assert bool((ours <= 2 * (x.mT @ x - wanted).abs().max() + 1e-7 * gold(x.abs())[0]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_floor(backend, dtype):
    """At most twice the error of torch in the same dtype with float32 sums."""
    x = (torch.randn(700, 130) + 0.5).to(dtype)
    wide = x if dtype == F64 else x.float()
    allowed = 2 * relative(wide.mT @ wide, gold(x)[0]) + 1e-14
    assert relative(update_covariance_(zeros(130), x), gold(x)[0]) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_rows_give_the_same_bits(backend, dtype):
    x = torch.randn(200, 70).to(dtype)
    assert torch.equal(update_covariance_(zeros(70), x), update_covariance_(zeros(70), x.clone()))


def test_permuted_rows_and_merged_halves_give_the_same_to_rounding(backend):
    x = (torch.randn(400, 40) + 1).half()
    whole = update_covariance_(zeros(40), x)
    first, second = (update_covariance_(zeros(40), part) for part in x.split(150)[:2])
    rest = update_covariance_(zeros(40), x[300:])
    assert relative(first + second + rest, whole) < 2e-7
    assert relative(update_covariance_(zeros(40), x[torch.randperm(400)]), whole) < 2e-7


def test_bfloat16_rows_are_refused_by_name(backend):
    cov = zeros(3)
    with pytest.raises(BackendUnavailableError, match=r"interpreter multiplies torch\.bfloat16 wrongly"):
        update_covariance_(cov, torch.ones(2, 3).bfloat16())
    assert not cov.any()
    assert "triton: not used: Triton's interpreter" in clk.explain("update_covariance_", cov, cov.bfloat16())


def test_explain_says_what_runs(backend):
    assert "triton: runs\n" in clk.explain(update_covariance_, zeros(3), torch.ones(99, 3))
    text = clk.explain(update_covariances_, [zeros(3)], [torch.ones(2, 3, dtype=F64)])
    assert "triton: runs (float64 rows and very few float32 rows through torch's own" in text


@pytest.mark.parametrize("rows", [1, 5, 31, 32, 50])
def test_few_float32_rows_are_as_good_as_torchs_product(backend, rows):
    x = torch.randn(rows, 70) + 0.5
    wanted = gold(x)[0]
    assert relative(update_covariance_(zeros(70), x), wanted) <= 2 * relative(x.mT @ x, wanted)


def matrix(n, d):
    return plan.Matrix(n, d, 0, 1 << 20, d, 1, 0, 0, 0, 0, 0, d, 1, 1, 0, 0)


def test_inputs_that_are_infinite_stay_in_their_column(backend):
    x = torch.randn(80, 40)
    x[3, 5], x[4, 5] = math.inf, -math.inf
    cov = update_covariance_(zeros(40), x)
    assert int((~cov.isfinite()).sum()) == 79
