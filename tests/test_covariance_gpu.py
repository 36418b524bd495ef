"""The CUDA kernels of the second moments against float64; runs on a machine with a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import math
import os

import pytest
import torch
from support import relative

import cl_kernels as clk
from cl_kernels.ops import update_covariance_, update_covariances_, update_head_grams_
from cl_kernels.ops.covariance import plan

pytestmark = pytest.mark.gpu

F64 = torch.float64
DTYPES = [torch.bfloat16, torch.float16, torch.float32, F64]


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")
    with clk.use_backend("triton"):  # a kernel that declines is an error here, not a fallback
        yield


def zeros(d, dtype=F64):
    return torch.zeros(d, d, dtype=dtype, device="cuda")


def normal(*shape, dtype=torch.float32, mean=0.5):
    return (torch.randn(shape, device="cuda") + mean).to(dtype)


def gold(x, weight=None):
    flat = x.double().reshape(-1, x.shape[-1])
    w = torch.ones(flat.shape[0], dtype=F64, device=x.device) if weight is None else weight.double().reshape(-1)
    return flat.mT @ (w[:, None] * flat), w @ flat, w.sum()


def floor(x):
    """The error of torch in the same dtype with float32 sums; TF32 is off by default."""
    wide = x if x.dtype == F64 else x.float()
    return relative((wide.mT @ wide).cpu(), gold(x)[0].cpu())


def check(cov, x):
    """At most twice torch's error, and the rounding of the state itself."""
    assert torch.equal(cov, cov.mT)
    ours = relative(cov.cpu(), gold(x)[0].cpu())
    allowed = 2 * floor(x.reshape(-1, x.shape[-1])) + (1e-14 if cov.dtype == F64 else 1.2e-7)
    assert ours <= allowed, f"{ours:.1e}, allowed {allowed:.1e}"


def without_waiting(call):
    """Run with every wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("state", [F64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (70, 5), (300, 64), (3001, 130), (1000, 256), (777, 260), (5, 40, 768)])
def test_equals_float64(shape, dtype, state):
    x = normal(*shape, dtype=dtype)
    total, count = torch.zeros(shape[-1], dtype=F64, device="cuda"), torch.zeros((), dtype=F64, device="cuda")
    cov = update_covariance_(zeros(shape[-1], state), x, total=total, count=count)
    check(cov, x)
    assert torch.allclose(total, gold(x)[1], rtol=1e-5, atol=1e-3)
    assert float(count) == x.numel() // shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(25216, 384), (25216, 768), (25117, 768), (25216, 1024), (6304, 3072)])
def test_real_shapes(n, d, dtype):
    x = normal(n, d, dtype=dtype)
    check(update_covariance_(zeros(d), x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype):
    x, weight = normal(900, 300, dtype=dtype), torch.rand(900, device="cuda") - 0.25
    total, count = torch.zeros(300, device="cuda"), torch.zeros((), device="cuda")
    cov = update_covariance_(zeros(300), x, weight=weight, total=total, count=count)
    product, sums, number = gold(x, weight)
    assert torch.equal(cov, cov.mT)
    assert float((cov - product).abs().max()) <= 1e-6 * float(gold(x, weight.abs())[0].max())
    assert torch.allclose(total.double(), sums, atol=1e-3)
    assert float(count) == pytest.approx(float(number), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded", "three strides"])
def test_layouts(layout, dtype):
    x = {
        "transposed": lambda: normal(2, 70, 300, dtype=dtype).mT,
        "sliced": lambda: normal(300, 141, dtype=dtype)[:, 1::2],
        "offset": lambda: normal(300 * 70 + 1, dtype=dtype)[1:].view(300, 70),
        "expanded": lambda: normal(1, 70, dtype=dtype).expand(300, 70),
        "three strides": lambda: normal(4, 5, 6, 64, dtype=dtype)[:, ::2, ::3],
    }[layout]()
    check(update_covariance_(zeros(x.shape[-1]), x), x)


def test_rows_of_8_bits():
    x = normal(300, 64).to(torch.float8_e4m3fn)
    assert relative(update_covariance_(zeros(64), x).cpu(), gold(x)[0].cpu()) < 1e-6


def test_many_layers_give_the_bits_of_one_by_one():
    kinds = [(torch.bfloat16, F64), (torch.float32, F64), (torch.float16, torch.float32), (F64, F64)]
    shapes = [(788, 768), (788, 768), (3001, 130), (0, 5), (50, 3072), (9, 0), (300, 64), (77, 31)]
    xs = [normal(*shape, dtype=kinds[i % 4][0]) for i, shape in enumerate(shapes)]
    covs = [zeros(x.shape[-1], kinds[i % 4][1]) for i, x in enumerate(xs)]
    totals = [torch.zeros(x.shape[-1], device="cuda") for x in xs]
    counts = [torch.zeros((), dtype=F64, device="cuda") for _ in xs]
    update_covariances_(covs, xs, alpha=0.5, totals=totals, counts=counts)
    for x, cov, total, count in zip(xs, covs, totals, counts, strict=True):
        one = [torch.zeros_like(cov), torch.zeros_like(total), torch.zeros_like(count)]
        update_covariance_(one[0], x, alpha=0.5, total=one[1], count=one[2])
        assert torch.equal(one[0], cov)
        assert torch.equal(one[1], total)
        assert torch.equal(one[2], count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_a_fused_projection_are_read_in_place(dtype):
    qkv = normal(16, 197, 3, 12, 64, dtype=dtype)
    q = qkv.permute(2, 0, 3, 1, 4)[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grams = update_head_grams_(torch.ones(12, 64, 64, dtype=F64, device="cuda"), q, alpha=2.0, beta=3.0)
    if dtype != F64:
        assert torch.cuda.max_memory_allocated() - before < q.numel() * q.element_size()
    wanted = 3 + 2 * torch.einsum("bhni,bhnj->hij", q.double(), q.double())
    assert relative(grams.cpu(), wanted.cpu()) < 1e-6
    assert torch.equal(grams, grams.mT)


def test_state_may_be_a_strided_view():
    wide, x = torch.zeros(300, 600, dtype=F64, device="cuda"), normal(500, 280)
    inside = wide[10:290, 20:580:2]
    update_covariance_(inside, x)
    check(inside, x)
    assert int((wide != 0).sum()) == 280 * 280


@pytest.mark.parametrize("dtype", DTYPES)
def test_beta_zero_reads_nothing_and_only_the_upper_triangle_is_read(dtype):
    x = normal(600, 200, dtype=dtype)
    cov, total = torch.full((200, 200), math.nan, device="cuda"), torch.full((200,), math.nan, device="cuda")
    update_covariance_(cov, x, beta=0.0, total=total)
    check(cov, x)
    assert bool(total.isfinite().all())
    spoiled = cov.triu() + torch.full_like(cov, math.nan).tril(-1)
    assert bool(update_covariance_(spoiled, x, beta=0.5).isfinite().all())
    assert torch.equal(update_covariance_(cov.clone(), x[:0], beta=0.5), cov * 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values_spread_as_in_a_product(dtype, bad):
    x = normal(800, 300, dtype=dtype)
    x[170, 5] = bad
    expected = torch.zeros(300, 300, dtype=torch.bool, device="cuda")
    expected[5, :] = expected[:, 5] = True
    assert torch.equal(~update_covariance_(zeros(300), x).isfinite(), expected)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e30])
def test_float32_rows_of_any_size(scale):
    x = normal(2000, 300, mean=0) * scale
    wanted = gold(x)[0]
    assert relative(update_covariance_(zeros(300), x).cpu(), wanted.cpu()) < 1e-6


def test_an_outlier_column_leaves_the_others_exact():
    x = normal(3000, 300, mean=0)
    x[:, 3] *= 1e30
    x[:, 7] *= 1e-30
    cov, wanted = update_covariance_(zeros(300), x), gold(x)[0]
    scale = wanted.diagonal().sqrt()
    assert float(((cov - wanted) / scale / scale[:, None]).abs().max()) < 1e-6


def test_sixteen_bit_rows_keep_the_matrix_positive():
    mix = torch.linalg.qr(torch.randn(256, 256, device="cuda"))[0]
    x = ((torch.randn(20000, 256, device="cuda") * torch.logspace(0, -4, 256, device="cuda")) @ mix).bfloat16()
    values = torch.linalg.eigvalsh(update_covariance_(zeros(256), x))
    assert float(values[0]) > -1e-7 * float(values[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype):
    x = normal(5000, 520, dtype=dtype)
    first = update_covariance_(zeros(520), x)
    for _ in range(5):
        assert torch.equal(update_covariance_(zeros(520), x), first)


@pytest.mark.slow
def test_elements_beyond_two_to_the_31():
    rows, d = 2**31 // 1024 + 1000, 1024  # 4.3 GB of bfloat16
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    x[-300:] = normal(300, d, dtype=torch.bfloat16)
    check(update_covariance_(zeros(d), x), x[-300:])
    far = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda").as_strided((2, 40), (2**31, 1))
    far.copy_(normal(2, 40, dtype=torch.bfloat16))
    check(update_covariance_(zeros(40), far), far)


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_waits_for_the_device(dtype):
    xs = [normal(788, d, dtype=dtype) for d in (768, 768, 130)]
    covs, weights = [zeros(x.shape[-1]) for x in xs], [torch.rand(788, device="cuda") for _ in xs]
    totals = [torch.zeros(x.shape[-1], device="cuda") for x in xs]
    counts = [torch.zeros((), device="cuda") for _ in xs]
    grams, q = torch.zeros(12, 64, 64, device="cuda"), normal(2, 12, 197, 64, dtype=dtype)

    def update():
        update_covariances_(covs, xs, totals=totals, counts=counts)
        update_covariances_(covs, xs, weights=weights, totals=totals, counts=counts)
        update_head_grams_(grams, q)

    update()  # compiles, and waits while it does
    without_waiting(update)


def test_runs_on_the_current_stream():
    """Rows that arrive late on a side stream are waited for there, and nothing is read before."""
    x = normal(5000, 768, dtype=torch.bfloat16)
    update_covariance_(zeros(768), x)  # compiled before the clock runs
    late, cov = torch.full_like(x, math.nan), zeros(768)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        update_covariance_(cov, late)
    stream.synchronize()
    check(cov, x)


@pytest.mark.skipif(
    os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1",
    reason="a graph takes its memory from the caching allocator",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_cuda_graph(dtype):
    """Also with rows that exist in the graph only, so that their addresses are new while it is captured."""
    given = normal(788, 768, dtype=dtype)
    covs, total, count = [zeros(768), zeros(768)], torch.zeros(768, device="cuda"), torch.zeros((), device="cuda")

    def step():
        inside = given * 2
        update_covariances_(covs, [given, inside])
        update_covariance_(covs[0], inside, total=total, count=count)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for state in (*covs, total, count):
        state.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    wanted = [torch.zeros_like(cov) for cov in covs]
    for _ in range(3):
        given.copy_(normal(788, 768, dtype=dtype))
        spoiled = [torch.full((1 << 20,), math.nan, device="cuda") for _ in range(4)]  # memory that the graph gave back
        graph.replay()
        product = gold(given)[0]
        wanted[0] += 5 * product
        wanted[1] += 4 * product
        del spoiled
    torch.cuda.synchronize()
    assert all(relative(cov.cpu(), product.cpu()) < 2e-6 for cov, product in zip(covs, wanted, strict=True))
    assert float(count) == 3 * 788


def test_temporaries_are_one_workspace():
    xs = [normal(6304, 768, dtype=torch.bfloat16) for _ in range(12)]
    covs = [zeros(768) for _ in xs]
    update_covariances_(covs, xs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update_covariances_(covs, xs)
    assert torch.cuda.max_memory_allocated() - before <= plan.WORKSPACE_BYTES + (1 << 20)


def test_autocast_does_not_shorten_products():
    x = normal(600, 300)
    with torch.autocast("cuda", torch.bfloat16):
        cov = update_covariance_(zeros(300), x)
    check(cov, x)


def test_wrong_calls_change_nothing():
    cov, x = zeros(300), normal(50, 300)
    with pytest.raises(ValueError, match="lose positive definiteness"):
        update_covariance_(cov.bfloat16(), x)
    with pytest.raises(ValueError, match="share memory"):
        update_covariance_(cov, cov.view(-1)[:3000].view(10, 300))
    with pytest.raises(RuntimeError, match=r"x is on cpu but cov is on cuda"):
        update_covariance_(cov, x.cpu())
    assert not cov.any()


def test_auto_takes_triton_and_explain_says_so():
    with clk.use_backend("auto"):
        assert "triton: runs\n" in clk.explain(update_covariance_, zeros(3), normal(50, 3))
        assert "float64 rows" in clk.explain(update_covariance_, zeros(3), normal(5, 3, dtype=F64))
