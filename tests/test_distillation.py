"""The distillation losses: what their formulas promise, against torch and timm, in every form that runs here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative
from torch import Tensor

import cl_kernels as clk
from cl_kernels.errors import NonFiniteError
from cl_kernels.ops import _native, distillation_loss, dkd_loss, jsd_loss, kl_loss, linear_kl_loss

F64 = torch.float64
WHOLE = slice(None)
DTYPES = (F64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "rows of a wider matrix", "every other column", "one row for all")


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    with clk.use_backend(request.param):
        yield request.param


def heads(rows: int, columns: int, dtype: torch.dtype = F64, scale: float = 2.0) -> tuple[Tensor, ...]:
    """Logits of two students that learn and of a teacher, and classes."""
    z, s, t = ((scale * torch.randn(rows, columns, dtype=F64)).to(dtype) for _ in range(3))
    return z.requires_grad_(), s.requires_grad_(), t, torch.randint(0, columns, (rows,))


def gold(*logits: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in logits]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def torch_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_s, log_t = (F.log_softmax(x / temperature, -1) for x in (s, t))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def torch_distillation(
    z: Tensor, s: Tensor, t: Tensor, y: Tensor, classes: slice = WHOLE, alpha: float = 0.5, temperature: float = 2.0
) -> Tensor:
    hard = F.cross_entropy(z[:, classes], y - (classes.start or 0))
    return (1 - alpha) * hard + alpha * torch_kl(s[:, classes], t[:, classes], temperature)


def torch_dkd(s: Tensor, t: Tensor, y: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """From probabilities, as the definition has it: for float64 logits of moderate size."""
    p, q = (torch.softmax(x / temperature, -1) for x in (s, t))
    hot = F.one_hot(y, s.shape[1]).bool()
    p_y, q_y = (x[hot][:, None] for x in (p, q))
    two_way = q_y * (q_y / p_y).log() + (1 - q_y) * ((1 - q_y) / (1 - p_y)).log()
    rest_p, rest_q = p / (1 - p_y), q / (1 - q_y)
    rest = torch.where(hot, 0.0, rest_q * (rest_q / rest_p).log()).sum(-1)
    return temperature**2 * (alpha * two_way[:, 0] + beta * rest).mean()


def torch_jsd(s: Tensor, t: Tensor, beta: float, temperature: float) -> Tensor:
    p, q = (torch.softmax(x / temperature, -1) for x in (s, t))
    if beta == 0:
        rows = (q * (q / p).log()).sum(-1)
    elif beta == 1:
        rows = (p * (p / q).log()).sum(-1)
    else:
        m = beta * q + (1 - beta) * p
        rows = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    return temperature**2 * rows.mean()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, among NaN."""
    rows, columns = x.shape
    if layout == "contiguous":
        return x.detach().clone()
    if layout == "transposed":
        return x.detach().mT.contiguous().mT
    if layout == "one row for all":
        return x.detach()[:1].expand(rows, columns)
    wide = x.new_full((rows, 2 * columns + 3), math.nan)
    part = wide[:, 1 : 1 + columns] if layout == "rows of a wider matrix" else wide[:, 2 : 2 + 2 * columns : 2]
    return part.copy_(x.detach())


# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (5, 16), (3, 17), (4, 33), (7, 100), (2, 1030)])
def test_value_and_gradient_of_torch_for_every_size_and_layout(backend, rows, columns, layout):
    for first, last in {(0, columns), (columns // 3, columns), (0, columns // 2 + 1), (columns // 2, columns // 2 + 1)}:
        z, s, t = (laid_out(x, layout) for x in heads(rows, columns)[:3])
        z, s = z.requires_grad_(), s.requires_grad_()
        y, classes = torch.randint(first, last, (rows,)), slice(first, last)
        wide = gold(z, s, t)
        ours = gradients(distillation_loss(z, s, t, y, classes=classes, alpha=0.3, temperature=3.0), z, s)
        wanted = gradients(torch_distillation(*wide, y, classes, 0.3, 3.0), *wide[:2])
        for a, b in zip(ours, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("rows", "columns", "scale"), [(64, 20, 1), (9, 101, 3), (32, 1000, 2), (4, 20000, 2)])
def test_noise_floor(backend, dtype, rows, columns, scale):
    """At most twice the error of torch in the same dtype, against float64; also where all logits are far from zero."""
    for offset in (0.0, 200.0):
        z, s, t, y = heads(rows, columns, dtype, scale)
        z, s = ((x.detach() + offset).requires_grad_() for x in (z, s))
        wide = gold(z, s, t)
        wanted = gradients(torch_distillation(*wide, y), *wide[:2])
        ours = gradients(distillation_loss(z, s, t, y), z, s)
        theirs = gradients(torch_distillation(z, s, t, y), z, s)
        for name, a, b, c in zip(("loss", "class", "kd"), ours, theirs, wanted, strict=True):
            most = 2 * relative(b, c) + torch.finfo(torch.float32 if name == "loss" else dtype).eps / 4
            assert relative(a, c) <= most, (name, offset, relative(a, c) / most)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_close_student_keeps_its_digits(backend, dtype):
    """Of a KL of 5e-7 torch has no digit in 16 bits and one in float32."""
    s = torch.randn(16, 100, dtype=F64).to(dtype)
    t = (s.double() + 1e-3 * torch.randn(16, 100, dtype=F64)).to(dtype)
    wanted, theirs = torch_kl(s.double(), t.double(), 1.0), torch_kl(s, t, 1.0)
    allowed = 2 * float((theirs - wanted).abs()) + 1e-15
    if backend != "reference" and dtype != F64:
        allowed = 2e-8
    assert (kl_loss(s, t) - wanted).abs() <= allowed


def test_pa4_gradient_row_sums_shifts_and_zero(backend):
    z, s, t, y = heads(16, 50, torch.float32)
    alpha, temperature = 0.4, 2.0
    _, g = gradients(distillation_loss(z.detach(), s, t, y, alpha=alpha, temperature=temperature), s)
    p_s, p_t = (torch.softmax(x.detach().double() / temperature, -1) for x in (s, t))
    assert (g - alpha * temperature / 16 * (p_s - p_t)).abs().max() <= 1e-8
    assert g.double().sum(-1).abs().max() <= 1e-7
    value = kl_loss(s, t, temperature=temperature).detach()
    shifted = kl_loss(s + 8 * torch.randn(16, 1), t - 3, temperature=temperature)
    assert torch.allclose(value, shifted, rtol=2e-6)
    assert value > 0.1
    for same in (t.clone(), t + 5 * torch.randn(16, 1)):
        assert -1e-7 <= kl_loss(same, t, temperature=temperature) <= 1e-7
    assert kl_loss(t.clone(), t, temperature=temperature) == 0 or backend == "reference"
    other = t.clone()
    other[3, 7] += 0.1
    assert kl_loss(other, t, temperature=temperature) > 1e-6


def test_pa5_a_hot_kl_is_half_the_square_of_centred_differences(backend):
    _, s, t, _ = heads(8, 30)
    centred = [x.detach() - x.detach().mean(-1, keepdim=True) for x in (s, t)]
    limit = (centred[0] - centred[1]).square().sum(-1) / (2 * 30)
    assert torch.allclose(kl_loss(s.detach(), t, temperature=1e3, reduction="none"), limit, rtol=1e-2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_pa6_rows_of_a_head_outside_of_the_slice_keep_their_bits(backend, optimizer):
    classes, other = slice(10, 20), [*range(10), *range(20, 35)]
    class_head, kd_head = torch.nn.Linear(8, 35), torch.nn.Linear(8, 35)
    before = [p.detach().clone() for head in (class_head, kd_head) for p in head.parameters()]
    parameters = [*class_head.parameters(), *kd_head.parameters()]
    step = optimizer(parameters, lr=0.1)
    for _ in range(3):
        x = torch.randn(12, 8)
        target = torch.randint(10, 20, (12,))
        step.zero_grad()
        loss = distillation_loss(class_head(x), kd_head(x), torch.randn(12, 35), target, classes=classes)
        loss.backward()
        step.step()
        assert all(p.grad is not None and not p.grad[other].any() for p in parameters)
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p.detach()[other], old[other])
        assert not torch.equal(p.detach()[classes], old[classes])


def test_what_lies_outside_of_the_slice_is_not_read(backend):
    z, s, t, y = heads(5, 12)
    part = slice(3, 9)
    y = y % 6 + 3
    wanted = gradients(distillation_loss(z, s, t, y, classes=part), z, s)
    outside = [*range(3), *range(9, 12)]
    with torch.no_grad():
        for x in (z, s, t):
            x[:, outside] = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(0, 3, (5, 6))].double()
    for a, b in zip(gradients(distillation_loss(z, s, t, y, classes=part), z, s), wanted, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kl_loss(s, t, classes=slice(-9, -3)), kl_loss(s, t, classes=part))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_classes_have_neither_probability_nor_gradient(backend, dtype):
    z, s, t, y = heads(6, 40, dtype)
    kept = torch.tensor([1, 2, 5, 17, 30, 33, 39])
    y = kept[y % 7]
    gone = torch.ones(40, dtype=torch.bool)
    gone[kept] = False
    with torch.no_grad():
        for x in (z, s, t):
            x[:, gone] = -math.inf
    ours = gradients(distillation_loss(z, s, t, y), z, s)
    small = [x.detach()[:, kept].requires_grad_(x.requires_grad) for x in (z, s, t)]
    wanted = gradients(distillation_loss(*small, torch.searchsorted(kept, y)), *small[:2])
    assert torch.allclose(ours[0], wanted[0], rtol=1e-6)
    for a, b in zip(ours[1:], wanted[1:], strict=True):
        assert not a[:, gone].any()
        assert torch.allclose(a[:, kept].double(), b.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-8)
    for loss in (dkd_loss(s, t, y), jsd_loss(s, t)):
        (g,) = torch.autograd.grad(loss, s)
        assert loss.isfinite()
        assert g.isfinite().all()
        assert not g[:, gone].any()


def test_a_student_that_masks_what_the_teacher_holds_possible_loses_everything_but_keeps_a_gradient(backend):
    s, t = torch.randn(2, 5, dtype=F64, requires_grad=True), torch.randn(2, 5, dtype=F64)
    with torch.no_grad():
        s[1, 2] = -math.inf
    loss = kl_loss(s, t, reduction="none")
    assert loss[0].isfinite()
    assert loss[1] == math.inf
    (g,) = torch.autograd.grad(loss.sum(), s)
    assert torch.allclose(g, torch.softmax(s.detach(), -1) - torch.softmax(t, -1))
    assert jsd_loss(s, t).isfinite()


@pytest.mark.parametrize("loss", ["distillation", "dkd"])
def test_ignored_rows_count_nowhere_whatever_they_hold(backend, loss):
    z, s, t, y = heads(7, 9)
    ignored = torch.tensor([1, 4, 6])
    kept = torch.tensor([0, 2, 3, 5])
    y[ignored] = -100
    with torch.no_grad():
        z[1], s[4], t[6] = math.nan, math.inf, math.nan

    def value(z: Tensor, s: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
        return distillation_loss(z, s, t, y, **options) if loss == "distillation" else dkd_loss(s, t, y, **options)

    for reduction in ("batchmean", "sum", "none"):
        ours = value(z, s, t, y, ignore_index=-100, reduction=reduction)
        few = value(z[kept], s[kept], t[kept], y[kept], reduction=reduction)
        if reduction == "none":
            assert not ours[ignored].any()
            assert torch.allclose(ours[kept], few, rtol=1e-13)
        else:
            assert torch.allclose(ours, few, rtol=1e-13)
        (a,), (b,) = (torch.autograd.grad(x.sum(), s, retain_graph=True) for x in (ours, few))
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-16)
        assert not a[ignored].any()
    all_ignored = value(z, s, t, torch.full_like(y, -100), ignore_index=-100)
    assert all_ignored == 0
    assert not torch.autograd.grad(all_ignored, s)[0].any()


def test_reductions_add_up_and_an_empty_batch_loses_nothing(backend):
    z, s, t, y = heads(7, 9)
    for call in (
        lambda **o: distillation_loss(z, s, t, y, **o), lambda **o: kl_loss(s, t, **o),
        lambda **o: dkd_loss(s, t, y, **o), lambda **o: jsd_loss(s, t, **o),
    ):  # fmt: skip
        rows = call(reduction="none")
        assert rows.shape == (7,)
        assert torch.allclose(call(reduction="sum"), rows.sum())
        assert torch.allclose(call(reduction="batchmean"), rows.mean())
        above = torch.randn(7, dtype=F64)
        (g,) = torch.autograd.grad(rows, s, above, retain_graph=True)
        for i in range(7):
            (one,) = torch.autograd.grad(rows[i], s, retain_graph=True)
            assert torch.allclose(g[i], above[i] * one[i], atol=1e-15)
    for rows in (distillation_loss(z[:0], s[:0], t[:0], y[:0]), kl_loss(s[:0], t[:0]), dkd_loss(s[:0], t[:0], y[:0])):
        assert rows == 0
        assert not torch.autograd.grad(rows, s)[0].any()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_without_weight_is_not_computed(backend, alpha):
    z, s, t, y = heads(4, 6)
    with torch.no_grad():
        (z if alpha else s).fill_(math.nan)
    loss, for_class, for_kd = gradients(distillation_loss(z, s, t, y, alpha=alpha), z, s)
    wanted = torch_kl(s, t, 2.0) if alpha else F.cross_entropy(z, y)
    assert torch.allclose(loss, wanted)
    assert not (for_class if alpha else for_kd).any()


def test_logits_may_have_different_dtypes(backend):
    z, s, t, y = heads(6, 21)
    for dtypes in ((torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, F64, torch.float32)):
        mixed = [x.detach().to(d).requires_grad_(x.requires_grad) for x, d in zip((z, s, t), dtypes, strict=True)]
        wide = gold(*mixed)
        ours = gradients(distillation_loss(*mixed, y), *mixed[:2])
        assert ours[0].dtype == (F64 if F64 in dtypes else torch.float32)
        for a, b in zip(ours, gradients(torch_distillation(*wide, y), *wide[:2]), strict=True):
            assert relative(a, b) <= 4 * torch.finfo(a.dtype).eps
        assert [g.dtype for g in ours[1:]] == list(dtypes[:2])


def test_memory_that_was_not_written_would_show(backend, poison):
    for dtype in DTYPES:
        z, s, t, y = heads(5, 37, dtype)
        for loss in (distillation_loss(z, s, t, y % 9 + 3, classes=slice(3, 12)), dkd_loss(s, t, y), kl_loss(s, t)):
            assert loss.isfinite()
            assert all(
                g.isfinite().all() for g in torch.autograd.grad(loss, (z, s), allow_unused=True) if g is not None
            )


def test_row_offsets_beyond_two_to_the_31(backend):
    try:
        far = torch.empty(2**31 + 64, dtype=torch.float16)  # 4 GiB of address space, of which two pages are touched
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    s = far.as_strided((2, 40), (2**31, 1))
    s.copy_(torch.randn(2, 40))
    t = torch.randn(2, 40)
    assert torch.allclose(kl_loss(s, t), torch_kl(s.float(), t, 1.0), rtol=1e-5)


# -- the other losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 4.0, 4.0), (1.0, 8.0, 1.0), (0.3, 0.0, 2.0)])
def test_decoupled_distillation_is_its_definition(backend, alpha, beta, temperature):
    _, s, t, y = heads(9, 12)
    ours = gradients(dkd_loss(s, t, y, alpha=alpha, beta=beta, temperature=temperature), s)
    for a, b in zip(ours, gradients(torch_dkd(s, t, y, alpha, beta, temperature), s), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)
    part = slice(2, 9)
    inside = y % 7 + 2
    ours = gradients(dkd_loss(s, t, inside, classes=part, alpha=alpha, beta=beta, temperature=temperature), s)
    wanted = gradients(torch_dkd(s[:, part], t[:, part], inside - 2, alpha, beta, temperature), s)
    for a, b in zip(ours, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)


def test_a_kl_is_its_two_parts(backend):
    """KL = TCKD + (1 - p_T,y) NCKD, row by row."""
    _, s, t, y = heads(9, 12)
    s = s.detach()
    left = 1 - torch.softmax(t, -1).gather(1, y[:, None])[:, 0]
    parts = [dkd_loss(s, t, y, alpha=a, beta=1 - a, temperature=1.0, reduction="none") for a in (1.0, 0.0)]
    assert torch.allclose(parts[0] + left * parts[1], kl_loss(s, t, reduction="none"), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_decoupled_distillation_survives_a_target_that_holds_everything(backend, dtype):
    """A gap of 60 leaves nothing of the other probabilities; their logarithms are as good as any."""
    s = torch.randn(4, 10).to(dtype)
    t = torch.randn(4, 10).to(dtype)
    y = torch.tensor([0, 3, 5, 9])
    for x, gap in ((s, 60.0), (t, 500.0)):
        x[torch.arange(4), y] += gap
    s.requires_grad_()
    loss, g = gradients(dkd_loss(s, t, y, temperature=1.0), s)
    wide = s.detach().double().requires_grad_()
    with clk.use_backend("reference"):
        wanted, wanted_g = gradients(dkd_loss(wide, t.double(), y, temperature=1.0), wide)
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    assert relative(g, wanted_g) <= 8 * torch.finfo(dtype).eps
    assert loss > 0.1  # the rest still teaches


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon(backend, beta):
    _, s, t, _ = heads(9, 12)
    part = slice(1, 11)
    ours = gradients(jsd_loss(s, t, beta=beta, temperature=2.0, classes=part), s)
    for a, b in zip(ours, gradients(torch_jsd(s[:, part], t[:, part], beta, 2.0), s), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)
    s = s.detach()
    assert torch.allclose(jsd_loss(s, t, beta=beta), jsd_loss(t, s, beta=1 - beta))
    if 0 < beta < 1:
        assert jsd_loss(1000 * s, 1000 * t, beta=beta, reduction="none").max() <= math.log(2) + 1e-12
    if beta == 0:
        assert torch.equal(jsd_loss(s, t, beta=0.0, temperature=3.0), kl_loss(s, t, temperature=3.0)) or (
            backend == "native" and torch.allclose(jsd_loss(s, t, beta=0.0), kl_loss(s, t), rtol=1e-13)
        )


# -- others' losses ---------------------------------------------------------------------------------------------------


def test_timms_logit_distillation_for_the_same_arguments(backend):
    """task_loss_weight = 1 - alpha, which makes distill_loss_weight alpha; the student's one head is both heads."""
    timm_task = pytest.importorskip("timm.task", reason="compares with timm")
    student, teacher = _Fixed(6), _Fixed(6)
    for alpha, temperature in ((0.3, 1.0), (0.7, 4.0)):
        task = timm_task.LogitDistillationTask(
            student, teacher, criterion=torch.nn.CrossEntropyLoss(), task_loss_weight=1 - alpha,
            temperature=temperature, verbose=False,
        )  # fmt: skip
        y = torch.randint(0, 6, (4,))
        theirs = task(torch.randn(4, 3, 8, 8), y)["loss"]
        logits = student.logits
        ours = distillation_loss(logits, logits, teacher.logits.detach(), y, alpha=alpha, temperature=temperature)
        assert torch.allclose(ours, theirs, rtol=1e-6)
        (a,), (b,) = (torch.autograd.grad(x, logits) for x in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-7)


def test_timms_token_distillation_for_the_same_arguments(backend):
    """Two heads, as here: the class token's logits and the distillation token's."""
    timm_task = pytest.importorskip("timm.task", reason="compares with timm")
    student, teacher = _Fixed(6, heads=2), _Fixed(6)
    task = timm_task.TokenDistillationTask(
        student, teacher, criterion=torch.nn.CrossEntropyLoss(), distill_type="soft", task_loss_weight=0.4,
        temperature=3.0, verbose=False,
    )  # fmt: skip
    y = torch.randint(0, 6, (4,))
    theirs = task(torch.randn(4, 3, 8, 8), y)["loss"]
    logits = (student.logits, student.more)
    ours = distillation_loss(*logits, teacher.logits.detach(), y, alpha=0.6, temperature=3.0)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


class _Fixed(torch.nn.Module):
    """A model whose logits do not depend on the images: only the loss is compared."""

    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012 - timm reads it from the model
    num_classes, in_chans = 6, 3

    def __init__(self, classes: int, heads: int = 1) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(4, classes))
        self.more = torch.nn.Parameter(torch.randn(4, classes))
        self.heads = heads

    def set_distilled_training(self, enable: bool) -> None:
        pass

    def forward(self, images: Tensor) -> Any:
        return (self.logits, self.more) if self.heads == 2 else self.logits


# -- differentiation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradients_and_their_gradients(backend, reduction):
    z, s, t, y = heads(3, 5)
    y, options = y % 4 + 1, {"classes": slice(1, 5), "reduction": reduction}
    for call in (
        lambda z, s: distillation_loss(z, s, t, y, alpha=0.3, ignore_index=2, **options),
        lambda z, s: kl_loss(s, t, temperature=2.0, **options),
        lambda z, s: dkd_loss(s, t, y, **options),
        lambda z, s: jsd_loss(s, t, beta=0.2, temperature=2.0, **options),
    ):
        inputs = (z, s) if call(z, s.detach()).requires_grad else (z.detach(), s)
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_only_what_needs_a_gradient_gets_one(backend):
    z, s, t, y = heads(3, 5)
    wanted = gradients(distillation_loss(z, s, t, y), z, s)
    assert torch.equal(torch.autograd.grad(distillation_loss(z.detach(), s, t, y), s)[0], wanted[2])
    assert torch.equal(torch.autograd.grad(distillation_loss(z, s.detach(), t, y), z)[0], wanted[1])
    assert torch.equal(torch.autograd.grad(distillation_loss(z, s, t, y), z)[0], wanted[1])
    with torch.no_grad():
        assert not distillation_loss(z, s, t, y).requires_grad
    loss = distillation_loss(z, z, t, y)  # one head for both
    assert torch.allclose(torch.autograd.grad(loss, z)[0], gradients(torch_distillation(z, z, t, y), z)[1])


def test_a_kept_graph_gives_the_same_gradient_again_whatever_was_done_to_the_first(backend):
    z, s, t, y = heads(5, 33, torch.float32)
    loss = distillation_loss(z, s, t, y)
    first = torch.autograd.grad(loss, (z, s), retain_graph=True)
    before = [g.clone() for g in first]
    for g in first:
        g.mul_(-7)
    for scale in (1.0, 0.5):
        again = torch.autograd.grad(loss * scale, (z, s), retain_graph=True)
        assert all(torch.equal(a, scale * b) for a, b in zip(again, before, strict=True))
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(z.grad, 2 * before[0])
    assert torch.equal(s.grad, 2 * before[1])


def test_logits_that_change_after_the_loss_are_noticed(backend):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    head = torch.ones(3, 5, requires_grad=True)
    logits = head * s
    loss = kl_loss(logits, t)
    logits[0, 0] = -math.inf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, head, create_graph=True)


def test_compiles_in_one_graph(backend):
    z, s, t, y = heads(6, 9, torch.float32)

    def losses(z: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        part = {"classes": slice(2, 7)}
        loss = distillation_loss(z, s, t, y, ignore_index=3, **part) + kl_loss(s, t, temperature=2.0)
        return loss + dkd_loss(s, t, y, **part) + jsd_loss(s, t, **part)

    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 4):
        given = (z[:rows], s[:rows], t[:rows], y[:rows] % 5 + 2)
        for a, b in zip(gradients(compiled(*given), z, s), gradients(losses(*given), z, s), strict=True):
            assert torch.allclose(a, b)


def test_functional_transforms(backend):
    z, s, t, y = heads(4, 6)
    for_class, for_kd = torch.func.grad(lambda z, s: distillation_loss(z, s, t, y), argnums=(0, 1))(
        z.detach(), s.detach()
    )
    _, a, b = gradients(distillation_loss(z, s, t, y), z, s)
    assert torch.allclose(for_class, a)
    assert torch.allclose(for_kd, b)


def test_autocast_changes_nothing(backend):
    z, s, t, y = heads(4, 6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distillation_loss(z, s, t, y)
    assert torch.equal(inside, distillation_loss(z, s, t, y))


# -- a linear head whose logits are never whole -----------------------------------------------------------------------


def linear_heads(rows: int, columns: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Features, weights and biases of a student that learns and of a teacher."""
    shapes = ((rows, 6), (columns, 6), (columns,), (rows, 9), (columns, 9), (columns,))
    made = [torch.randn(shape, dtype=F64).to(dtype) for shape in shapes]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def of_heads(x: Tensor, w: Tensor, b: Tensor, t: Tensor, v: Tensor, c: Tensor, **options: Any) -> Tensor:
    return linear_kl_loss(x, w, t, v, student_bias=b, teacher_bias=c, **options)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("rows_at_once", [None, 1, 3, 7, 50])
def test_a_linear_kl_is_the_kl_of_its_logits(backend, rows_at_once, reduction):
    given = linear_heads(7, 20)
    x, w, b, t, v, c = given
    options = {"classes": slice(4, 18), "temperature": 2.0, "reduction": reduction}
    wanted = gradients(kl_loss(F.linear(x, w, b), F.linear(t, v, c), **options), x, w, b)
    ours = gradients(of_heads(*given, rows_at_once=rows_at_once, **options), x, w, b)
    for a, b_ in zip(ours, wanted, strict=True):
        assert torch.allclose(a, b_, rtol=1e-11, atol=1e-14)
    assert not ours[2][:4].any()
    assert not ours[3][18:].any()
    without = linear_kl_loss(x.detach(), w, t, v, rows_at_once=rows_at_once)
    assert torch.allclose(torch.autograd.grad(without, w)[0], torch.autograd.grad(kl_loss(x @ w.mT, t @ v.mT), w)[0])
    empty = linear_kl_loss(x[:0], w, t[:0], v)
    assert empty == 0
    assert not torch.autograd.grad(empty, w)[0].any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_linear_kl_is_as_right_as_torch(backend, dtype):
    given = linear_heads(33, 120, dtype)
    wide = gold(*given)
    x, w, b, t, v, c = given
    wanted = gradients(of_heads(*wide), *wide[:3])
    theirs = gradients(torch_kl(F.linear(x, w, b), F.linear(t, v, c), 1.0), x, w, b)
    for a, e, exact in zip(gradients(of_heads(*given, rows_at_once=8), x, w, b), theirs, wanted, strict=True):
        assert relative(a, exact) <= 2 * relative(e, exact) + torch.finfo(a.dtype).eps


def test_a_linear_kl_never_holds_more_than_a_chunk_of_logits(backend, monkeypatch):
    given = linear_heads(64, 500, torch.float32)
    seen: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: (seen.append(a[0].shape[0] * a[1].shape[0]), linear(*a))[1])
    loss = of_heads(*given, rows_at_once=5)
    assert max(seen) == 5 * 500
    assert sum(seen) == 2 * 64 * 500
    kept = [t.numel() for t in loss.grad_fn.saved_tensors]
    assert kept == [64 * 6, 500 * 6, 500]


def test_a_linear_kl_is_differentiated_once_and_compiles(backend):
    given = linear_heads(5, 6)
    assert torch.autograd.gradcheck(lambda *a: of_heads(*a, *given[3:], temperature=2.0, rows_at_once=2), given[:3])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(of_heads(*given), given[0], create_graph=True)
    compiled = torch.compile(of_heads, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(*given), *given[:3]), gradients(of_heads(*given), *given[:3]), strict=True):
        assert torch.allclose(a, b)


# -- wrong calls ------------------------------------------------------------------------------------------------------

Z, T = torch.zeros(3, 5), torch.zeros(3, 5)
Y = torch.tensor([0, 1, 2])
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "fewer teacher classes": (lambda: kl_loss(Z, T[:, 1:]), ValueError, r"teacher: .* classes as student \(3, 5\)"),
    "fewer rows": (lambda: kl_loss(Z, T[1:]), ValueError, "teacher: expected as many rows"),
    "other class head": (lambda: distillation_loss(Z[:, :4], Z, T, Y), ValueError, "class_logits: .* classes"),
    "teacher logits by name": (lambda: distillation_loss(Z, Z, T[:, :4], Y), ValueError, "teacher_logits: .* classes"),
    "empty slice": (lambda: kl_loss(Z, T, classes=slice(2, 2)), ValueError, "classes: expected at least one class"),
    "slice past the end": (lambda: kl_loss(Z, T, classes=slice(2, 6)), ValueError, r"classes: .* within 0\.\.5"),
    "slice backwards": (lambda: kl_loss(Z, T, classes=slice(4, 2)), ValueError, "classes"),
    "slice with steps": (lambda: kl_loss(Z, T, classes=slice(0, 4, 2)), ValueError, "classes: .*step 1"),
    "classes as a list": (lambda: kl_loss(Z, T, classes=[0, 1]), TypeError, "classes: expected a slice"),
    "fractional slice": (lambda: kl_loss(Z, T, classes=slice(0, 2.5)), TypeError, "classes: expected whole"),
    "no classes": (lambda: kl_loss(Z[:, :0], T[:, :0]), ValueError, "classes: expected at least one"),
    "one class, decoupled": (lambda: dkd_loss(Z, T, Y, classes=slice(0, 1)), ValueError, "at least 2 classes"),
    "temperature 0": (lambda: kl_loss(Z, T, temperature=0), ValueError, "temperature value: 0"),
    "temperature below 0": (lambda: distillation_loss(Z, Z, T, Y, temperature=-1.0), ValueError, "temperature"),
    "temperature nan": (lambda: dkd_loss(Z, T, Y, temperature=math.nan), ValueError, "temperature value: nan"),
    "temperature inf": (lambda: jsd_loss(Z, T, temperature=math.inf), ValueError, "temperature value: inf"),
    "temperature a tensor": (lambda: kl_loss(Z, T, temperature=torch.ones(())), TypeError, "temperature"),
    "alpha above 1": (lambda: distillation_loss(Z, Z, T, Y, alpha=1.5), ValueError, "alpha"),
    "alpha nan": (lambda: distillation_loss(Z, Z, T, Y, alpha=math.nan), ValueError, "alpha"),
    "beta below 0": (lambda: jsd_loss(Z, T, beta=-0.1), ValueError, "beta"),
    "infinite weight": (lambda: dkd_loss(Z, T, Y, beta=math.inf), ValueError, "beta"),
    "trained teacher": (lambda: kl_loss(Z, T.clone().requires_grad_()), ValueError, "teacher: .* not being trained"),
    "mean": (lambda: kl_loss(Z, T, reduction="mean"), ValueError, '"batchmean" is what is meant'),
    "target of floats": (lambda: distillation_loss(Z, Z, T, Y.float()), ValueError, "target: expected class indices"),
    "target too short": (lambda: dkd_loss(Z, T, Y[:2]), ValueError, "target: expected shape"),
    "target outside": (
        lambda: distillation_loss(Z, Z, T, Y, classes=slice(1, 5)),
        ValueError,
        "target: .* got 0 in row 0",
    ),
    "target too large": (lambda: dkd_loss(Z, T, Y + 3), ValueError, "target: expected classes 0 to 4, got 5 in row 2"),
    "negative target": (lambda: distillation_loss(Z, Z, T, Y - 100), ValueError, "target: .* got -100"),
    "integer logits": (lambda: kl_loss(Z.long(), T), ValueError, "student: expected torch.float32 or"),
    "three dimensions": (lambda: kl_loss(Z[None], T[None]), ValueError, r"student: expected shape \[B, C\]"),
    "other head": (lambda: linear_kl_loss(Z, T[:, :4], Z, T), ValueError, r"student_weight: expected shape \[C, 5\]"),
    "fewer features": (lambda: linear_kl_loss(Z, T, Z[:2], T), ValueError, "teacher: expected 3 rows"),
    "fewer classes of a head": (lambda: linear_kl_loss(Z, T, Z, T[:2]), ValueError, "teacher_weight: .* classes"),
    "bias of another size": (lambda: linear_kl_loss(Z, T, Z, T, student_bias=Z[0]), ValueError, "student_bias"),
    "head of another dtype": (lambda: linear_kl_loss(Z, T.double(), Z, T), ValueError, "student_weight: .*float32"),
    "teacher head that learns": (
        lambda: linear_kl_loss(Z, T, Z, T.clone().requires_grad_()),
        ValueError,
        "teacher_weight: .* not being trained",
    ),
    "no rows at once": (lambda: linear_kl_loss(Z, T, Z, T, rows_at_once=0), ValueError, "rows_at_once"),
    "rows of a linear head": (lambda: linear_kl_loss(Z, T, Z, T, reduction="none"), ValueError, "reduction"),
    "a list": (lambda: kl_loss([1.0], T), TypeError, "student: expected a torch.Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_names_the_argument(backend, name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["class_logits", "kd_logits", "teacher_logits"])
@pytest.mark.parametrize("columns", [5, 16, 40])
def test_bad_logits_are_an_error_that_names_them_and_changes_nothing(backend, which, value, columns):
    z, s, t, y = heads(4, columns, torch.float32)
    given = {"class_logits": z, "kd_logits": s, "teacher_logits": t}
    for column in (0, columns - 1):
        with torch.no_grad():
            kept = float(given[which][2, column])
            given[which][2, column] = value
        before = [x.detach().clone() for x in (z, s, t)]
        with pytest.raises(NonFiniteError, match=f"{which}: 1 of {4 * columns} logits are NaN or .inf, first in row 2"):
            distillation_loss(**given, target=y)
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip((z, s, t), before, strict=True))
        assert z.grad is None
        if which != "class_logits":
            name = "student" if which == "kd_logits" else "teacher"
            for loss in (lambda: kl_loss(s, t), lambda: dkd_loss(s, t, y), lambda: jsd_loss(s, t, reduction="none")):
                with pytest.raises(NonFiniteError, match=f"{name}: 1 of"):
                    loss()
        with torch.no_grad():
            given[which][2, column] = kept


def test_a_row_without_a_finite_class_is_an_error(backend):
    z, s, t, y = heads(4, 6)
    with torch.no_grad():
        s[3, 1:4] = -math.inf
    with pytest.raises(NonFiniteError, match="kd_logits: row 3 is -inf in every class"):
        distillation_loss(z, s, t, y % 3 + 1, classes=slice(1, 4))
    others = torch.arange(6) != y[1]
    with torch.no_grad():
        s[3, 1:4], s[1, others] = 0.0, -math.inf
    with pytest.raises(NonFiniteError, match="student: row 1 is -inf in every class but its target"):
        dkd_loss(s, t, y)


# -- the compiled form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for rows, columns in ((3, 1), (4, 17), (2, 1027), (3, 64)):
        z, s, t, y = heads(rows, columns, dtype)
        wide = gold(z, s, t)
        ours = gradients(distillation_loss(z, s, t, y, alpha=0.3, temperature=3.0), z, s)
        wanted = gradients(torch_distillation(*wide, y, WHOLE, 0.3, 3.0), *wide[:2])
        for a, b in zip(ours, wanted, strict=True):
            assert (a.double() - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * b.abs().max() + 1e-16
        if columns > 1:
            ours = gradients(dkd_loss(s, t, y), s)
            for a, b in zip(ours, gradients(torch_dkd(wide[1], wide[2], y, 1.0, 4.0, 4.0), wide[1]), strict=True):
                assert relative(a, b) <= 16 * torch.finfo(a.dtype).eps


def test_exponentials_over_their_whole_range(isa):
    """Softmax of evenly spread logits: every power of two from 1 down to where float32 ends."""
    z = torch.linspace(-90, 0, 5000)[None].requires_grad_()
    (g,) = torch.autograd.grad(distillation_loss(z, z.detach(), z.detach(), torch.tensor([0]), alpha=0.0), z)
    wanted = torch.softmax(z.detach().double(), -1)
    error = ((g.double() - wanted) / wanted)[0, 1:]
    normal = z.detach()[0, 1:] > -70
    assert error[normal].abs().max() <= 4 * 2.0**-23
    assert (error[~normal].abs() <= 1).all()  # below e^-87 they count as 0


def test_threads_change_no_bit():
    if _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    z, s, t, y = heads(300, 257, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(gradients(distillation_loss(z, s, t, y), z, s) + gradients(dkd_loss(s, t, y), s))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
