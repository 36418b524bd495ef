"""The CUDA kernel of the distillation losses, in Triton's interpreter: the bodies of test_distillation.py, and its own.

    TRITON_INTERPRET=1 pytest -m interpret tests/test_distillation_triton.py

float64, float32 and float16 logits: the interpreter rounds to bfloat16 in its own way.
"""

import math
import os

import pytest
import torch

pytestmark = pytest.mark.interpret
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is imported, so this is a process of its own
    pytest.skip("needs TRITON_INTERPRET=1 and its own process", allow_module_level=True)
triton = pytest.importorskip("triton")

# One body for all backends: these run here with the fixture below.
from test_distillation import (  # noqa: E402, F401
    WHOLE,
    gold,
    gradients,
    heads,
    test_a_student_that_masks_what_the_teacher_holds_possible_loses_everything_but_keeps_a_gradient,
    test_a_term_without_weight_is_not_computed,
    test_decoupled_distillation_survives_a_target_that_holds_everything,
    test_ignored_rows_count_nowhere_whatever_they_hold,
    test_masked_classes_have_neither_probability_nor_gradient,
    test_row_offsets_beyond_two_to_the_31,
    test_what_lies_outside_of_the_slice_is_not_read,
    torch_distillation,
    torch_kl,
)

import cl_kernels as clk  # noqa: E402
from cl_kernels.errors import NonFiniteError  # noqa: E402
from cl_kernels.ops import distillation_loss, dkd_loss, kl_loss  # noqa: E402
from cl_kernels.ops.distillation import cuda, kernels  # noqa: E402


@pytest.fixture
def backend(request):
    drawn = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if torch.bfloat16 in drawn.values():
        pytest.skip("the interpreter rounds to bfloat16 in its own way")
    with clk.use_backend("triton"):
        yield "triton"


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows in many blocks, at sizes that the interpreter gets through."""

    def small(*key):
        return kernels._tuning.Config(tuple((dict(config(*key).constants) | {"BLOCK": 16}).items()), 4, 1)

    config = kernels.ROWS.choose
    monkeypatch.setattr(kernels, "NARROW", 16)
    monkeypatch.setattr(type(kernels.ROWS), "choose", lambda self, *key: small(*key))


FORMS = {"narrow": (12, 0, 12), "wide": (200, 8, 192), "any": (203, 3, 99)}  # columns, first, last


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_kernel_in_several_blocks(backend, small_blocks, form, dtype):
    columns, first, last = FORMS[form]
    z, s, t, y = heads(3, columns, dtype)
    y, classes = y % (last - first) + first, slice(first, last)
    config, _ = cuda._chosen((z, s, t), first, last, columns, z.dtype)
    assert (config["LOOP"], config["UNIT"], config["ALIGNED"] > 1) == {
        "narrow": (False, True, False), "wide": (True, True, True), "any": (True, False, False)
    }["any" if dtype == torch.float64 else form]  # fmt: skip
    with torch.no_grad():  # a first block without a finite class, and one whose maximum is far below the next ones
        for x in (z, s, t):
            x[0, first : min(first + 16, last - 1)] = -math.inf
            x[1, first : first + 4] -= 60
    y[0], wide = last - 1, gold(z, s, t)
    ours = gradients(distillation_loss(z, s, t, y, classes=classes, alpha=0.3, temperature=3.0), z, s)
    wanted = gradients(torch_distillation(*wide, y, classes, 0.3, 3.0).nan_to_num(0), *wide[:2])
    with clk.use_backend("reference"):
        wanted = gradients(distillation_loss(*wide, y, classes=classes, alpha=0.3, temperature=3.0), *wide[:2])
        decoupled = gradients(dkd_loss(wide[1][1:], wide[2][1:], y[1:], classes=classes), wide[1])
    for a, b in zip(ours, wanted, strict=True):
        assert torch.allclose(
            a.double(), b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-7 if dtype != b.dtype else 1e-15
        )
    for a, b in zip(gradients(dkd_loss(s[1:], t[1:], y[1:], classes=classes), s), decoupled, strict=True):
        assert torch.allclose(
            a.double(), b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-6 if dtype != b.dtype else 1e-14
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_noise_floor_in_several_blocks(backend, small_blocks, dtype, offset):
    z, s, t, y = heads(3, 90, dtype)
    z, s = ((x.detach() + offset).requires_grad_() for x in (z, s))
    wide = gold(z, s, t)
    wanted = gradients(torch_distillation(*wide, y), *wide[:2])
    ours, theirs = gradients(distillation_loss(z, s, t, y), z, s), gradients(torch_distillation(z, s, t, y), z, s)
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        most = 2 * (b - c).abs().max() + torch.finfo(a.dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= most


def test_a_masked_student_class_that_the_teacher_leaves_behind_costs_nothing(backend, small_blocks):
    """In the first block the teacher holds it possible, and the loss infinite; a later maximum makes it e^-200."""
    s, t = torch.randn(1, 40), torch.randn(1, 40)
    s[0, 3], t[0, 30] = -math.inf, 200.0
    others = torch.arange(40) != 3
    assert torch.allclose(
        kl_loss(s, t).double(), torch_kl(s[:, others].double(), t[:, others].double(), 1.0), rtol=1e-6
    )


def test_the_counter_is_ready_for_the_next_launch(backend, monkeypatch):
    counter = torch.zeros((), dtype=torch.int32)
    monkeypatch.setattr(cuda, "_counter", lambda device: counter)
    _, s, t, _ = heads(5, 9)
    values = [kl_loss(s, t), kl_loss(s, t), kl_loss(s[:2], t[:2], reduction="none").mean(), kl_loss(s, t)]
    assert values[0] == values[1] == values[3]
    assert counter == 0


def test_more_rows_than_are_summed_at_a_time(backend, monkeypatch):
    monkeypatch.setattr(kernels, "SUMMED", triton.language.constexpr(4))
    _, s, t, _ = heads(11, 2)
    assert torch.allclose(kl_loss(s, t), torch_kl(s, t, 1.0), rtol=1e-13)


def test_bad_values_are_named(backend):
    z, s, t, y = heads(2, 5)
    with torch.no_grad():
        s[1, 4] = math.nan
    with pytest.raises(NonFiniteError, match="kd_logits: 1 of 10"):
        distillation_loss(z, s, t, y)
    with pytest.raises(ValueError, match="target: expected classes 0 to 4, got 5"):
        dkd_loss(z.detach(), t, torch.tensor([5, 0]))


def test_explain_says_what_runs(backend):
    assert "triton: runs" in clk.explain(kl_loss, torch.ones(2, 3), torch.ones(2, 3))
