"""Attention over tokens and a prefix: equal to attention over the joined keys, in value and in every gradient."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative

import cl_kernels as clk
from cl_kernels.ops import prefix_attention
from cl_kernels.ops.prefix_attention import plan, reference, tokens

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
INF = float("inf")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """ "auto" concatenates at these sizes, "reference" merges in plain torch."""
    with clk.use_backend(request.param):
        yield request.param


def inputs(batch=2, heads=3, queries=9, keys=9, prefix=4, width=8, shared=True, dtype=F64, seed=0, grad=True):
    """Laid out as a fused qkv projection gives them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(images, rows):
        made = torch.randn(images, rows, heads, width, generator=generator, dtype=F64).to(dtype).transpose(1, 2)
        return made.requires_grad_(grad)

    images = 1 if shared else batch
    return (
        normal(batch, queries),
        normal(batch, keys),
        normal(batch, keys),
        normal(images, prefix),
        normal(images, prefix),
    )


def gold(q, k, v, prefix_k, prefix_v, scale=None, first=False):
    """The definition; the prefix behind the tokens, or before them."""
    batch = len(q)
    parts_k, parts_v = [k, prefix_k.expand(batch, -1, -1, -1)], [v, prefix_v.expand(batch, -1, -1, -1)]
    keys, values = (torch.cat(parts[:: -1 if first else 1], 2) for parts in (parts_k, parts_v))
    return (q @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ values


def wide(tensors):
    return [x.detach().to("cpu", F64).requires_grad_() for x in tensors]


def with_gradients(function, tensors, grad):
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out))]


def output_weight(tensors, seed=9):
    return torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


BOUNDS = {F64: (1e-12, 1e-12), F32: (1e-6, 1e-5), F16: (1e-2, 3e-2), BF16: (1e-2, 3e-2)}
SHAPES = [(9, 9, 4, 8), (1, 17, 3, 16), (2, 40, 37, 64), (33, 5, 70, 24)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_pa3_equals_attention_over_the_joined_keys_with_all_gradients(backend, dtype, shape, shared):
    queries, keys, prefix, width = shape
    given = inputs(2, 3, queries, keys, prefix, width, shared, dtype)
    weight = output_weight(given).to(dtype)
    found = with_gradients(prefix_attention, given, weight)
    wanted = with_gradients(gold, wide(given), weight)
    torchs = with_gradients(lambda *x: reference.concatenated(*x, width**-0.5), given, weight)
    value, slope = BOUNDS[dtype]
    assert found[0].dtype == dtype
    assert float((found[0].double() - wanted[0]).abs().max()) <= value
    for name, ours, theirs, exact in zip(("out", *NAMES), found, torchs, wanted, strict=True):
        assert ours.shape == exact.shape
        assert relative(ours, exact) <= slope, name
        allowed = 2 * relative(theirs, exact) + 4 * torch.finfo(dtype).eps
        assert relative(ours, exact) <= allowed, f"{name}: {relative(ours, exact):.1e}, allowed {allowed:.1e}"


def test_torchs_log_sum_exp_has_no_gradient_and_ours_does_not_need_it():
    """The trap: a merge differentiated by torch, its log-sum-exp taken for a constant, is wrong by tens of percent."""
    given = inputs(2, 3, 30, 30, 12, 16)

    def naive(q, k, v, prefix_k, prefix_v):
        out, lse = tokens.attend(q, k, v, 0.25)
        scores = q @ prefix_k.mT * 0.25
        share = (scores.logsumexp(-1) - lse.detach()).sigmoid().unsqueeze(-1)
        return (1 - share) * out + share * (scores.softmax(-1) @ prefix_v)

    weight = output_weight(given)
    wanted = with_gradients(gold, wide(given), weight)
    with clk.use_backend("reference"):
        ours = with_gradients(prefix_attention, given, weight)
    theirs = with_gradients(naive, given, weight)
    assert relative(theirs[0], wanted[0]) < 1e-12
    for name, wrong, right, exact in zip(("out", *NAMES), theirs, ours, wanted, strict=True):
        assert relative(right, exact) < 1e-12, name
        if name in ("q", "k"):
            assert relative(wrong, exact) > 0.1, name


@pytest.mark.parametrize(("dtype", "bound"), [(F32, 3e-6), (BF16, 2e-2)], ids=str)
def test_pa2_neither_the_order_of_the_prefix_nor_its_place_matters(backend, dtype, bound):
    q, k, v, prefix_k, prefix_v = inputs(3, 2, 20, 20, 11, 32, dtype=dtype, grad=False)
    plain = prefix_attention(q, k, v, prefix_k, prefix_v).double()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    shuffled = prefix_attention(q, k, v, prefix_k[:, :, order], prefix_v[:, :, order]).double()
    assert float((plain - shuffled).abs().max()) <= bound
    before = gold(*(x.double() for x in (q, k, v, prefix_k, prefix_v)), first=True)
    assert float((plain - before).abs().max()) <= bound
    one, other = prefix_k.split((5, 6), 2), prefix_v.split((5, 6), 2)
    joined = prefix_attention(q, k, v, torch.cat((one[1], one[0]), 2), torch.cat((other[1], other[0]), 2)).double()
    assert float((plain - joined).abs().max()) <= bound


def test_pa12_a_shared_prefix_gets_the_sum_of_the_gradients_of_copies(backend):
    q, k, v, prefix_k, prefix_v = inputs(4, 2, 6, 6, 5, 8)
    weight = output_weight((q,))
    shared = with_gradients(prefix_attention, (q, k, v, prefix_k, prefix_v), weight)
    copies = [x.detach().expand(4, -1, -1, -1).clone().requires_grad_() for x in (prefix_k, prefix_v)]
    separate = with_gradients(prefix_attention, (q, k, v, *copies), weight)
    for ours, theirs in zip(shared[:4], separate[:4], strict=True):
        assert relative(ours, theirs) < 1e-12
    for ours, theirs in zip(shared[4:], separate[4:], strict=True):
        assert ours.shape == (1, 2, 5, 8)
        assert relative(ours, theirs.sum(0, keepdim=True)) < 1e-12


@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 2.5])
def test_the_scale_is_the_callers(backend, scale):
    given = inputs()
    weight = output_weight(given)
    found = with_gradients(lambda *x: prefix_attention(*x, scale=scale), given, weight)
    wanted = with_gradients(lambda *x: gold(*x, scale), wide(given), weight)
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_scores_of_ten_thousand(backend, dtype):
    """Larger than exp can take, of either part: the log-sum-exp is never exponentiated by itself."""
    for k_factor, prefix_factor in ((1e4, 1.0), (1.0, 1e4), (1e4, 1e4), (-1e4, 1e4)):
        q, k, v, prefix_k, prefix_v = inputs(2, 2, 6, 6, 5, 8, dtype=dtype, grad=False)
        given = [x.detach().requires_grad_() for x in (q, k * k_factor, v, prefix_k * prefix_factor, prefix_v)]
        weight = output_weight(given)
        found = with_gradients(prefix_attention, given, weight)
        wanted = with_gradients(gold, wide(given), weight)
        torchs = with_gradients(lambda *x: reference.concatenated(*x, 8**-0.5), given, weight)
        for ours, theirs, exact in zip(found, torchs, wanted, strict=True):
            assert bool(torch.isfinite(ours).all())
            floor = torch.finfo(dtype).eps * 8 * (1 + exact.abs().max())
            allowed = 2 * float((theirs.double() - exact).abs().max()) + floor
            assert float((ours.double() - exact).abs().max()) <= allowed


def test_keys_that_count_for_nothing(backend):
    """Scores of -inf: some tokens, a whole prefix, all tokens."""
    q, k, v, prefix_k, prefix_v = inputs(2, 2, 6, 7, 5, 8, dtype=F32, grad=False)
    q = q.abs() + 0.1
    never = torch.full_like(k, -INF)
    some = torch.where(torch.arange(7)[:, None] % 3 == 0, never, k)
    kept = prefix_attention(q, some, v, prefix_k, prefix_v)
    few = torch.tensor([1, 2, 4, 5])
    assert torch.allclose(kept, gold(q, k[:, :, few], v[:, :, few], prefix_k, prefix_v), atol=1e-6)
    without = prefix_attention(q, k, v, torch.full_like(prefix_k, -INF), prefix_v)
    assert torch.allclose(without, F.scaled_dot_product_attention(q, k, v), atol=1e-6)
    alone = prefix_attention(q, never, v, prefix_k, prefix_v)
    shape = (2, 2, 5, 8)
    assert torch.allclose(
        alone, F.scaled_dot_product_attention(q, prefix_k.expand(shape), prefix_v.expand(shape)), atol=1e-6
    )


def test_a_token_segment_whose_log_sum_exp_is_zero_is_not_taken_for_an_empty_one():
    """torch's kernel for CPUs says 0 where all scores are -inf; one key with the score 0 has that log-sum-exp too."""
    q, k, v, prefix_k, prefix_v = inputs(2, 2, 3, 1, 4, 8, grad=False)
    with clk.use_backend("reference"):
        out = prefix_attention(q * 0, k, v, prefix_k, prefix_v)
    assert torch.allclose(out, (v + prefix_v.sum(2, keepdim=True)).expand(out.shape) / 5, atol=1e-12)


def test_nan_reaches_what_depends_on_it_and_nothing_else(backend):
    for which, poisoned in (("q", (0, 1, 2)), ("k", (0, 1)), ("v", (0, 1)), ("prefix_k", (slice(None), 1))):
        given = inputs(2, 3, 5, 6, 4, 8, dtype=F32, grad=False)
        clean = prefix_attention(*given)
        tensor = given[NAMES.index(which)]
        tensor[0, 1, 2, 3] = float("nan")
        out = prefix_attention(*given)
        hit = torch.zeros(2, 3, 5, 8, dtype=torch.bool)
        hit[poisoned] = True
        touched = out.isnan()
        assert bool((touched <= hit).all()), which
        if which == "q" and backend == "auto":
            continue  # torch's kernel for CPUs gives 0 for a query that is NaN
        columns = touched if which != "v" else touched[..., 3:4]
        assert bool((columns == (hit if which != "v" else hit[..., 3:4])).all()), which
        assert torch.allclose(out[~hit], clean[~hit], atol=1e-6)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "prefix"])
def test_nothing_of_something(backend, empty):
    sizes = {"batch": 2, "queries": 5, "keys": 6, "prefix": 4} | {empty: 0}
    given = inputs(sizes["batch"], 3, sizes["queries"], sizes["keys"], sizes["prefix"], 8)
    out = prefix_attention(*given)
    assert out.shape == (sizes["batch"], 3, sizes["queries"], 8)
    grads = torch.autograd.grad(out.sum(), given, allow_unused=True, materialize_grads=True)
    assert [g.shape for g in grads] == [x.shape for x in given]
    assert torch.allclose(out, gold(*given), atol=1e-12)


def layouts(x, kind):
    if kind == "columns apart":
        apart = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
        apart[..., 1::2] = x
        return apart[..., 1::2]
    if kind == "transposed":
        return x.mT.contiguous().mT
    if kind == "offset":
        flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x.contiguous() if kind == "contiguous" else x


LAYOUTS = ("fused projection", "contiguous", "transposed", "columns apart", "offset")


@settings(max_examples=30)
@given(
    sizes=st.tuples(*(st.sampled_from(some) for some in ((1, 2, 3), (1, 2), (1, 2, 5, 33), (1, 3, 17), (1, 2, 7, 40)))),
    width=st.sampled_from((1, 3, 5, 8, 33, 72, 130)),
    shared=st.booleans(),
    kinds=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    grad_kind=st.sampled_from(("columns apart", "expanded", "contiguous")),
    name=st.sampled_from(("auto", "reference")),
)
def test_any_size_width_and_layout(sizes, width, shared, kinds, grad_kind, name):
    """Columns that are not neighbours, too: aten's kernel for CPUs reads them as if they were."""
    plain = inputs(*sizes, width, shared, F32, grad=False)
    given = [layouts(x, kind).requires_grad_() for x, kind in zip(plain, kinds, strict=True)]
    weight = output_weight(given).float()
    weight = weight[:1, :1, :1].expand(weight.shape) if grad_kind == "expanded" else layouts(weight, grad_kind)
    with clk.use_backend(name):
        found = with_gradients(prefix_attention, given, weight)
    wanted = with_gradients(gold, wide(given), weight)
    for ours, exact in zip(found, wanted, strict=True):
        assert float((ours.double() - exact).abs().max()) <= 2e-5 * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("shared", [True, False])
def test_first_and_second_derivatives(shared):
    given = inputs(2, 2, 3, 4, 3, 2, shared)
    with clk.use_backend("reference"):
        assert torch.autograd.gradcheck(prefix_attention, given)
        assert torch.autograd.gradgradcheck(prefix_attention, given)


@pytest.mark.parametrize("needed", [subset for n in (1, 2) for subset in itertools.combinations(range(5), n)], ids=str)
def test_only_the_gradients_that_are_asked_for(backend, needed):
    given = [x.detach() for x in inputs()]
    for i in needed:
        given[i].requires_grad_()
    weight = output_weight(given)
    found = torch.autograd.grad(prefix_attention(*given), [given[i] for i in needed], weight)
    wanted = with_gradients(gold, wide(given), weight)[1:]
    for i, ours in zip(needed, found, strict=True):
        assert relative(ours, wanted[i]) < 1e-12, NAMES[i]


def test_where_the_prefix_alone_trains_the_tokens_get_no_gradient(monkeypatch):
    """The first block of a frozen model: torch's backward of N keys is left out, and that is chosen by itself."""
    calls = []
    whole = tokens.gradients
    monkeypatch.setattr(tokens, "gradients", lambda *given: (calls.append(1), whole(*given))[1])
    given = [x.detach() for x in inputs(8, 8, 128, 128, 4, 8, dtype=F32)]
    for prefix in given[3:]:
        prefix.requires_grad_()
    assert plan.merges(*given)
    weight = output_weight(given).float()
    exact = with_gradients(gold, wide(given), weight)[4:]
    for name, of_queries, wanted in (("auto", False, 0), ("reference", False, 0), ("reference", True, 1)):
        calls.clear()
        given[0].requires_grad_(of_queries)
        with clk.use_backend(name):
            grads = torch.autograd.grad(prefix_attention(*given), given[3:], weight)
        assert len(calls) == wanted
        assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(grads, exact, strict=True))


def test_where_torch_has_no_fused_kernel_the_map_is_formed(monkeypatch):
    given = inputs(dtype=F32)
    weight = output_weight(given).float()
    with clk.use_backend("reference"):
        fused = with_gradients(prefix_attention, given, weight)
        monkeypatch.setattr(tokens, "fused", lambda *_: None)
        monkeypatch.setattr(tokens, "fused_gradients", lambda *_: None)
        formed = with_gradients(prefix_attention, given, weight)
    for one, other in zip(fused, formed, strict=True):
        assert relative(one, other) < 1e-6


def test_running_out_of_memory_is_not_taken_for_a_missing_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", full)
    with clk.use_backend("reference"), pytest.raises(torch.OutOfMemoryError):
        prefix_attention(*inputs(grad=False))


def test_autocast_computes_as_torchs_attention_does(backend):
    given = inputs(2, 3, 9, 9, 4, 8, dtype=F32)
    weight = output_weight(given).bfloat16()
    exact = with_gradients(gold, wide(given), weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(*given)
        assert out.dtype == F.scaled_dot_product_attention(*given[:3]).dtype == BF16
        grads = torch.autograd.grad(out, given, weight)  # inside, where products would be shortened
    assert [g.dtype for g in grads] == [F32] * 5
    for ours, theirs in zip((out.detach(), *grads), exact, strict=True):
        assert relative(ours, theirs) < 2e-2
    big = [x.detach() * (30 if i in (0, 1, 3) else 1) for i, x in enumerate(given)]
    with torch.autocast("cpu", torch.bfloat16):
        found = prefix_attention(*big)
    rounded = [x.bfloat16().double() for x in big]
    assert relative(found, gold(*rounded)) < 1e-2  # scores of hundreds, rounded to 16 bits, would be off by 1


@pytest.mark.parametrize("prefix_dtype", [F32, BF16])
def test_a_prefix_of_another_dtype_is_converted_and_its_gradient_back(backend, prefix_dtype):
    q, k, v, prefix_k, prefix_v = inputs(dtype=F16)
    prefix = [x.detach().to(prefix_dtype).requires_grad_() for x in (prefix_k, prefix_v)]
    out = prefix_attention(q, k, v, *prefix)
    assert out.dtype == F16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), prefix)] == [prefix_dtype] * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    def loss(*tensors):
        return prefix_attention(*tensors, scale=0.3).square()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (9, 6):
        given = inputs(queries=queries)
        eager = with_gradients(loss, given, torch.ones(()).expand(given[0].shape))
        found = with_gradients(compiled, given, torch.ones(()).expand(given[0].shape))
        for one, other in zip(found, eager, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_same_inputs_give_the_same_bits_and_stay_as_they_were(backend):
    given = inputs(dtype=F32)
    kept = [x.detach().clone() for x in given]
    weight = output_weight(given).float()
    first, second = (with_gradients(prefix_attention, given, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_an_output_that_was_written_to_has_no_gradient_any_more():
    given = inputs(dtype=F32)
    with clk.use_backend("reference"):
        out = prefix_attention(*given)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# -- the choice of the form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [32, 100])
def test_small_models_concatenate_and_keep_torchs_bits(batch):
    """The embedded backbone: 16 tokens, 4 heads of 32, and what was measured with it stays true to the bit."""
    for prompts, alone in itertools.product((4, 8, 100), (False, True)):
        given = list(inputs(batch, 4, 16, 16, prompts, 32, dtype=F32))
        if alone:
            given[:3] = [x.detach() for x in given[:3]]
        assert not plan.merges(*given)
    out = prefix_attention(*given)
    assert torch.equal(out, reference.concatenated(*given, 32**-0.5))


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((8, 6, 197, 197, 100, 64), False),  # as many queries as keys: the copy is cheap beside them
        ((64, 6, 2, 198, 3, 64), True),  # the last block of a pruned model, with large copies
        ((1, 6, 2, 198, 3, 64), False),  # few queries, copies that stay in the cache
        ((64, 6, 17, 17, 200, 64), True),  # a shared prefix much longer than the tokens
    ],
)
def test_the_faster_form_is_taken(sizes, wanted):
    given = [torch.empty(1).expand(sizes[0], sizes[1], rows, sizes[5]).requires_grad_() for rows in sizes[2:4]]
    prefix = torch.empty(1).expand(1, sizes[1], sizes[4], sizes[5]).requires_grad_()
    assert plan.merges(*given, given[1], prefix, prefix) == wanted


def test_explain_names_the_form():
    given = inputs(8, 8, 128, 128, 4, 8, dtype=F32)
    assert "by concatenation" in clk.explain("prefix_attention", *given)
    assert "merged by log-sum-exp" in clk.explain(prefix_attention, *(x.detach() for x in given[:3]), *given[3:])
    assert "runs" in clk.explain("prefix_attention")


def test_a_shared_prefix_is_not_copied_for_every_image(monkeypatch):
    """64 images, 2000 keys: copies of the prefix would take 2 x 66 MB, and as much again for their gradients."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import memory

    given = inputs(64, 2, 2, 16, 2000, 64, dtype=F32)
    weight = output_weight(given).float()

    def peak(shared):
        prefix = given[3:] if shared else [x.detach().expand(64, -1, -1, -1).requires_grad_() for x in given[3:]]
        with clk.use_backend("reference"):
            return memory.peak_extra(lambda: with_gradients(prefix_attention, (*given[:3], *prefix), weight))

    found = peak(True)
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    copy = 64 * 2 * 2000 * 64 * 4
    assert found < copy / 2
    assert peak(False) > 2 * copy  # the measure sees what it is meant to see


# -- wrong calls ----------------------------------------------------------------------------------------------------


def changed(**replaced):
    given = dict(zip(NAMES, inputs(2, 3, 5, 6, 4, 8, dtype=F32, grad=False), strict=True))
    return given | replaced


WRONG = {
    "q is no tensor": ({"q": 1.0}, TypeError, "q: expected a torch.Tensor"),
    "q of integers": ({"q": torch.ones(2, 3, 5, 8, dtype=torch.int64)}, ValueError, "q: expected a real floating"),
    "q without heads": ({"q": torch.ones(2, 5, 8)}, ValueError, r"q: expected shape \[B, H, rows, d\]"),
    "k of other images": ({"k": torch.ones(1, 3, 6, 8)}, ValueError, r"k: expected shape \[2, 3, N, 8\]"),
    "k of other heads": ({"k": torch.ones(2, 2, 6, 8)}, ValueError, "k: expected shape"),
    "k of another width": ({"k": torch.ones(2, 3, 6, 7)}, ValueError, "k: expected shape"),
    "v with fewer rows": ({"v": torch.ones(2, 3, 5, 8)}, ValueError, "v: expected the shape of k"),
    "k of another dtype": ({"k": torch.ones(2, 3, 6, 8).double()}, ValueError, "k: expected the dtype of q"),
    "prefix_k of other images": (
        {"prefix_k": torch.ones(3, 3, 4, 8)},
        ValueError,
        r"prefix_k: expected shape \[1 or 2",
    ),
    "prefix_v not as prefix_k": ({"prefix_v": torch.ones(1, 3, 5, 8)}, ValueError, "prefix_v: expected the shape of p"),
    "prefix_v elsewhere": ({"prefix_v": torch.ones(1, 3, 4, 8, device="meta")}, RuntimeError, "prefix_v is on meta"),
    "prefix_k sparse": ({"prefix_k": torch.ones(1, 3, 4, 8).to_sparse()}, RuntimeError, "prefix_k: expected a dense"),
    "scale of text": ({"scale": "half"}, TypeError, "scale: expected a number"),
    "scale not finite": ({"scale": INF}, ValueError, "Invalid scale"),
    "scale not a number": ({"scale": float("nan")}, ValueError, "Invalid scale"),
}


@pytest.mark.parametrize(("replaced", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_name_the_argument(replaced, kind, message):
    with pytest.raises(kind, match=message):
        prefix_attention(**changed(**replaced))
