"""Prefix attention on CUDA against float64; runs on a machine with a GPU (`pytest -m gpu`), and under the sanitizer."""

from __future__ import annotations

import pytest
import torch
from support import relative
from test_prefix_attention import gold, inputs, output_weight, wide, with_gradients

import cl_kernels as clk
from cl_kernels.ops import prefix_attention
from cl_kernels.ops.prefix_attention import plan, reference, tokens

pytestmark = pytest.mark.gpu

NAMES = ("out", "q", "k", "v", "prefix_k", "prefix_v")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with clk.use_backend("triton"):  # a kernel that declines is an error here, not a fallback
        yield


def on_gpu(*sizes, dtype=torch.float32, shared=True, width=64, seed=0):
    made = inputs(*sizes, width, shared, dtype, seed, grad=False)
    return [x.cuda().requires_grad_() for x in made]


def check(given, weight, scale=None):
    """At most twice the error of torch's attention over the joined keys, in the same dtype."""
    dtype, width = given[0].dtype, given[0].shape[-1]
    weight = weight.to("cuda", dtype)
    factor = width**-0.5 if scale is None else scale
    found = with_gradients(lambda *x: prefix_attention(*x, scale=scale), given, weight)
    torchs = with_gradients(lambda *x: reference.concatenated(*x, factor), given, weight)
    wanted = with_gradients(lambda *x: gold(*x, scale), wide(given), weight.cpu())
    for name, ours, theirs, exact in zip(NAMES, found, torchs, wanted, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        allowed = 2 * relative(theirs.cpu(), exact) + 4 * torch.finfo(dtype).eps
        assert relative(ours.cpu(), exact) <= allowed, (
            f"{name}: {relative(ours.cpu(), exact):.1e}, allowed {allowed:.1e}"
        )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 197, 197, 10), (3, 2, 1, 198, 3), (2, 4, 65, 33, 100), (1, 1, 64, 128, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_with_all_gradients(dtype, sizes, shared):
    given = on_gpu(*sizes, dtype=dtype, shared=shared)
    check(given, output_weight(given))


@pytest.mark.parametrize("width", [8, 16, 40, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_of_a_head(dtype, width):
    given = on_gpu(2, 2, 50, 70, 20, dtype=dtype, width=width)
    check(given, output_weight(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_of_torchs_kernels(monkeypatch, dtype):
    """Flash attention serves 16-bit heads; with it taken away the memory-efficient kernel does, and so backward."""
    given = on_gpu(2, 3, 45, 45, 9, dtype=dtype)
    for widest in (256, 0):
        monkeypatch.setattr(tokens, "FUSED_HEAD_DIM", widest)
        q, k, v = (x.detach() for x in given[:3])
        assert tokens.fused(q, k, v, 0.125) is not None
        out, lse = tokens.attend(q, k, v, 0.125)
        assert tokens.fused_gradients(torch.ones_like(out), q, k, v, out, lse, 0.125) is not None
        check(given, output_weight(given))


@pytest.mark.parametrize("layout", ["sliced", "offset", "transposed", "expanded gradient"])
def test_layouts_that_16_byte_loads_cannot_read(layout):
    given = on_gpu(2, 3, 20, 20, 9)
    change = {
        "sliced": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
        "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
        "transposed": lambda x: x.mT.contiguous().mT,
        "expanded gradient": lambda x: x,
    }[layout]
    given = [change(x.detach()).requires_grad_() for x in given]
    weight = output_weight(given)
    check(given, weight[:1, :1, :1].expand(weight.shape) if layout.startswith("expanded") else weight)


def test_huge_scores_and_keys_that_count_for_nothing():
    q, k, v, prefix_k, prefix_v = (x.detach() for x in on_gpu(2, 2, 30, 30, 9))
    for factor in (1e4, -1e4):
        given = [x.requires_grad_() for x in (q.clone(), k * factor, v.clone(), prefix_k.clone(), prefix_v.clone())]
        check(given, output_weight(given))
    q = q.abs() + 0.1
    without = prefix_attention(q, k, v, torch.full_like(prefix_k, -torch.inf), prefix_v)
    assert relative(without.cpu(), torch.nn.functional.scaled_dot_product_attention(q, k, v).cpu()) < 1e-5
    q[0, 1, 2, 3] = torch.nan
    out = prefix_attention(q, k, v, prefix_k, prefix_v)
    assert bool(out[0, 1, 2].isnan().all())
    assert int(out.isnan().any(-1).sum()) == 1


def test_the_same_bits_on_every_run():
    given = on_gpu(16, 6, 197, 197, 20, dtype=torch.bfloat16)
    weight = output_weight(given).to("cuda", torch.bfloat16)
    first, second = (with_gradients(prefix_attention, given, weight) for _ in range(2))
    for name, one, other in zip(NAMES, first, second, strict=True):
        if name in ("out", "prefix_k", "prefix_v"):  # torch's backward adds dq with atomics
            assert torch.equal(one, other), name


def test_it_waits_for_nothing():
    given = on_gpu(2, 3, 40, 40, 9)
    weight = output_weight(given).float().cuda()
    with_gradients(prefix_attention, given, weight)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(prefix_attention, given, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    given = on_gpu(4, 3, 100, 100, 9)
    wanted = prefix_attention(*given).detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [x.detach() + 0 for x in given]
        out = prefix_attention(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, wanted)


def test_a_captured_graph_reads_what_lies_there_at_its_replay():
    given = on_gpu(2, 3, 50, 50, 9, dtype=torch.bfloat16)
    weight = output_weight(given).to("cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with_gradients(prefix_attention, given, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(prefix_attention, given, weight)
    fresh = on_gpu(2, 3, 50, 50, 9, dtype=torch.bfloat16, seed=5)
    with torch.no_grad():
        for x, y in zip(given, fresh, strict=True):
            x.copy_(y)
    graph.replay()
    for one, other in zip(captured, with_gradients(prefix_attention, fresh, weight), strict=True):
        assert relative(one.cpu(), other.cpu().double()) < 1e-2


def test_autocast():
    given = on_gpu(2, 3, 50, 50, 9)
    weight = output_weight(given).to("cuda", torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        out = prefix_attention(*given)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out, given, weight)
    wanted = with_gradients(gold, wide(given), weight.cpu())
    for ours, exact in zip((out, *grads), wanted, strict=True):
        assert relative(ours.detach().cpu(), exact) < 2e-2


def test_a_shared_prefix_is_not_copied_for_every_image():
    given = on_gpu(64, 2, 2, 16, 2000)
    weight = output_weight(given).float().cuda()
    with_gradients(prefix_attention, given, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(prefix_attention, given, weight)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2 * 2000 * 64 * 4 / 2


@pytest.mark.parametrize("grad", [True, False])
def test_the_form_that_auto_takes_is_right_too(grad):
    for sizes in ((2, 3, 50, 50, 9), (2, 3, 2, 50, 9), (2, 3, 20, 20, 40)):
        given = on_gpu(*sizes)
        with clk.use_backend("auto"), torch.set_grad_enabled(grad):
            out = prefix_attention(*given)
        assert relative(out.detach().cpu(), gold(*wide(given)).detach()) < 1e-5
        with torch.no_grad():
            assert plan.merges(*given)


def test_float64_is_concatenated():
    given = on_gpu(2, 3, 20, 20, 9, dtype=torch.float64)
    with clk.use_backend("auto"):
        found = with_gradients(prefix_attention, given, output_weight(given).cuda())
    for ours, exact in zip(found, with_gradients(gold, wide(given), output_weight(given)), strict=True):
        assert relative(ours.cpu(), exact) < 1e-12
