"""The CUDA kernels of prefix attention in Triton's interpreter: the bodies of test_prefix_attention.py, and their own.

    TRITON_INTERPRET=1 pytest -m interpret tests/test_prefix_attention_triton.py

The tokens' part is torch's attention, here that for CPUs. float32 and float16: the interpreter multiplies bfloat16
wrongly, and float64 has no kernel; both are proved on a GPU (test_prefix_attention_gpu.py).
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative

pytestmark = pytest.mark.interpret
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is imported, so this is a process of its own
    pytest.skip("needs TRITON_INTERPRET=1 and its own process", allow_module_level=True)
pytest.importorskip("triton")

# One body for all backends: these run here with the fixture below.
from test_prefix_attention import (  # noqa: E402, F401
    LAYOUTS,
    gold,
    inputs,
    layouts,
    output_weight,
    test_autocast_computes_as_torchs_attention_does,
    test_keys_that_count_for_nothing,
    test_nan_reaches_what_depends_on_it_and_nothing_else,
    test_nothing_of_something,
    test_pa2_neither_the_order_of_the_prefix_nor_its_place_matters,
    test_pa3_equals_attention_over_the_joined_keys_with_all_gradients,
    test_scores_of_ten_thousand,
    test_the_same_inputs_give_the_same_bits_and_stay_as_they_were,
    wide,
    with_gradients,
)

import cl_kernels as clk  # noqa: E402
from cl_kernels.errors import BackendUnavailableError  # noqa: E402
from cl_kernels.ops import prefix_attention  # noqa: E402
from cl_kernels.ops.prefix_attention import cuda  # noqa: E402

F32, F16 = torch.float32, torch.float16


@pytest.fixture
def backend(request):
    drawn = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if {torch.bfloat16, torch.float64} & set(drawn.values()):
        pytest.skip("no kernel, or none that the interpreter runs rightly")
    if request.function is test_autocast_computes_as_torchs_attention_does:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    with clk.use_backend("triton"):
        yield "triton"


@settings(max_examples=12)
@given(
    sizes=st.tuples(*(st.sampled_from(some) for some in ((1, 2), (1, 2), (1, 31, 65), (1, 17), (1, 16, 33)))),
    width=st.sampled_from((8, 16, 64, 72, 128)),
    shared=st.booleans(),
    dtype=st.sampled_from((F32, F16)),
    kinds=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
)
def test_tiles_of_every_size_and_layout(sizes, width, shared, dtype, kinds):
    plain = inputs(*sizes, width, shared, dtype, grad=False)
    tensors = [layouts(x, kind).requires_grad_() for x, kind in zip(plain, kinds, strict=True)]
    weight = output_weight(tensors).to(dtype)
    with clk.use_backend("triton"):
        found = with_gradients(prefix_attention, tensors, weight)
    wanted = with_gradients(gold, wide(tensors), weight)
    bound = 2e-5 if dtype == F32 else 6e-3
    for ours, exact in zip(found, wanted, strict=True):
        assert float((ours.double() - exact).abs().max()) <= bound * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("programs", [1, 8, 528])
@pytest.mark.parametrize("shared", [True, False])
def test_chunks_are_summed_to_what_one_chunk_gives(monkeypatch, shared, programs):
    tensors = inputs(3, 1, 70, 9, 20, 16, shared, F32)
    weight = output_weight(tensors).float()
    wanted = with_gradients(gold, wide(tensors), weight)
    monkeypatch.setattr(cuda, "_PROGRAMS", programs)
    with clk.use_backend("triton"):
        found = with_gradients(prefix_attention, tensors, weight)
    for ours, exact in zip(found, wanted, strict=True):
        assert relative(ours, exact) < 2e-6


def test_flash_attentions_word_for_an_empty_softmax():
    """+inf with an output of 0 stands for no key at all; with NaN it stands for NaN."""
    from cl_kernels.ops.prefix_attention import kernels

    q, _, _, prefix_k, prefix_v = inputs(1, 1, 4, 4, 3, 8, dtype=F32, grad=False)
    lse = torch.tensor([[[torch.inf, -torch.inf, torch.inf, 0.5]]])
    before = torch.zeros(1, 1, 4, 8)
    before[0, 0, 2], before[0, 0, 3] = torch.nan, 0.25
    out, merged = torch.empty_like(before), torch.empty_like(lse)
    config = cuda._config(kernels.MERGE, q)
    numbers = (0.3, *cuda._strides(q, prefix_k, prefix_v), *cuda._sizes(q, prefix_k))
    cuda._launch(kernels.MERGE, config, 1, q, prefix_k, prefix_v, before, lse, out, merged, *numbers)
    scores = (q @ prefix_k.mT * 0.3)[0, 0]
    alone = scores.softmax(-1) @ prefix_v[0, 0]
    assert torch.allclose(out[0, 0, :2], alone[:2], atol=1e-6)
    assert torch.allclose(merged[0, 0, :2], scores[:2].logsumexp(-1), atol=1e-6)
    assert bool(out[0, 0, 2].isnan().all())
    share = (scores[3].logsumexp(-1) - 0.5).sigmoid()
    assert torch.allclose(out[0, 0, 3], (1 - share) * 0.25 + share * alone[3], atol=1e-6)


@pytest.mark.parametrize(("width", "dtype"), [(20, F32), (136, F32), (8, torch.float64), (8, torch.bfloat16)], ids=str)
def test_what_the_kernels_do_not_take_is_said(width, dtype):
    tensors = inputs(width=width, dtype=dtype, grad=False)
    with clk.use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match="prefix_attention"):
            prefix_attention(*tensors)
        assert "triton: not used" in clk.explain("prefix_attention", *tensors)
    with clk.use_backend("auto"):
        prefix_attention(*tensors)
