"""The compiled FTP steps: every instruction set, type, layout and thread count, against the reference and float64."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_projection_cases import LONG, OPTIONS, problem, step, to_double, written

import cl_kernels as clk
from cl_kernels.ops import _native, use_backend
from cl_kernels.ops import weight_projection as wp
from cl_kernels.ops.weight_projection.lists import KINDS

BASES = ("adam", "amsgrad", "momentum", "plain")
SHAPES: list[tuple[int, ...]] = [
    (37, 64), (5, 3, 7, 7), (1000,), (7,), (1, 9, 48), (3, 1024), (3, 1025), (0, 16), (1, 1), (70, 1), (), (6, 147),
    (2, 16385), (33_000,),
]  # fmt: skip


def build(base: str, weight: torch.dtype = torch.float32, moment: torch.dtype = torch.float32, **options: Any) -> Any:
    """A problem on one of four base steps."""
    p = problem("adam" if base in ("adam", "amsgrad") else "sgd", weight, moment, SHAPES)
    if weight == torch.float64:
        p["anchors"] = [a if a is None else a.double() for a in p["anchors"]]
        p["radii"] = [r.double() for r in p["radii"]]
    if base == "amsgrad":
        p["max_exp_avg_sqs"] = [v * 1.01 for v in p["exp_avg_sqs"]]
    if base == "plain":
        p |= {"momentum_buffers": None, "momentum": 0.0, "nesterov": False}
    if base != "adam" and base != "amsgrad":
        options.pop("decoupled_weight_decay", None)
    return p | options


def errors(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """The error against float64 is at most twice that of torch operations in the same dtype, plus a rounding.

    Radii have 16: h is made of differences d = W - W_0, and how W rounds is luck where a row has few elements.
    """
    for i, (a, b, gold) in enumerate(zip(ours, theirs, exact, strict=True)):
        unit = 16.0 if a.shape == (8,) else 2.0
        for norm in (lambda t: t.norm(), lambda t: t.abs().max() if t.numel() else t.sum()):
            scale = float(norm(gold)) + 1e-6
            allowed = 2 * float(norm(b.double() - gold)) + scale * unit * torch.finfo(a.dtype).eps
            assert float(norm(a.double() - gold)) <= allowed, (i, tuple(a.shape), allowed)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "defaults")
def test_every_instruction_set_against_the_reference(isa, base, options):
    """Two steps: from the anchor or from a ball, through the exchange of the anchor's buffer, to an open radius."""
    ours = build(base, **copy.deepcopy(options))
    torchs, exact = copy.deepcopy(ours), to_double(ours)
    for p, backend in ((ours, "native"), (torchs, "reference"), (exact, "reference")):
        with use_backend(backend):
            step(p, 2)
    if "radius_floor" not in options:
        errors(written(ours), written(torchs), written(exact))
        return
    # A floor of 1e-3 lets d be 1e-6 an element of a long row, and W has 4e-9: a row's part of h is known to 4e-3.
    for a, gold in zip(written(ours), written(exact), strict=True):
        rtol, atol = (0.05, 2e-3) if a.shape == (8,) else (1e-4, 1e-6)
        assert torch.allclose(a.double(), gold.double(), rtol=rtol, atol=atol), a.shape


@pytest.mark.parametrize("base", ["adam", "momentum"])
def test_float64_is_computed_in_float64(isa, base):
    ours = build(base, torch.float64, torch.float64, masked=True)
    theirs = copy.deepcopy(ours)
    for p, backend in ((ours, "native"), (theirs, "reference")):
        with use_backend(backend):
            step(p, 3)
    for a, b in zip(written(ours), written(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("weight", "moment"), sorted(KINDS, key=str))
@pytest.mark.parametrize("base", ["amsgrad", "momentum"])
def test_every_float_type_of_weights_and_moments(isa, weight, moment, base):
    """16-bit weights are computed in float32 and rounded once, at the end, projected or not."""
    ours = build(base, weight, moment)
    theirs = copy.deepcopy(ours)
    for p, backend in ((ours, "native"), (theirs, "reference")):
        with use_backend(backend):
            step(p, 2)
    for a, b in zip(written(ours), written(theirs), strict=True):
        assert a.dtype == b.dtype
        unit = max(2 * torch.finfo(a.dtype).eps, 1e-5 if a.dtype == torch.float32 else 1e-12)  # one rounding apart
        if a.shape == (8,):
            unit = max(unit, 2 * torch.finfo(weight).eps)  # weights that are a rounding apart turn the next h
        assert torch.allclose(a.double(), b.double(), rtol=unit, atol=unit * 0.1), a.shape


def test_types_that_no_kernel_takes_are_worked_on_in_copies():
    """float32 weights with bfloat16 moments, float64 weights with 16-bit anchors, steps and radii of other types."""
    ours = build("adam", torch.float32, torch.bfloat16)
    ours["steps"] = [s.double() for s in ours["steps"]]
    ours["radii"] = [torch.stack([r, r], 1)[:, 0] for r in ours["radii"]]
    double = build("momentum", torch.float64, torch.float64)
    double["anchors"] = [a if a is None else a.bfloat16() for a in double["anchors"]]
    for p in (ours, double):
        theirs = copy.deepcopy(p)
        with use_backend("native"):
            step(p, 2)
        with use_backend("reference"):
            step(theirs, 2)
        for a, b in zip(written(p), written(theirs), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=0.02 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def as_channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["channels last", "mixed", "transposed", "sliced"])
def test_layouts_make_no_difference(isa, layout):
    """Channels-last weights are taken as they lie; others in copies. The numbers are those of contiguous tensors."""
    shape = (6, 5, 3, 3) if layout in ("channels last", "mixed") else (24, 40)
    plain = problem("adam", shapes=[shape, shape])
    other = copy.deepcopy(plain)
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors"):
        for i, t in enumerate(other[key]):
            if t is None:
                continue
            if layout in ("channels last", "mixed"):
                other[key][i] = t if layout == "mixed" and key == "grads" else as_channels_last(t)
            elif layout == "transposed":
                other[key][i] = t.mT.contiguous().mT
            else:
                wide = torch.zeros(24, 80, dtype=t.dtype)
                wide[:, ::2] = t
                other[key][i] = wide[:, ::2]
    strides = [t.stride() for t in other["params"]]
    step(plain, 3)
    step(other, 3)
    assert [t.stride() for t in other["params"]] == strides
    for a, b in zip(written(plain), written(other), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_threads_do_not_change_a_bit():
    shapes = [*SHAPES, (500, 700), *LONG]
    one = problem("adam", shapes=shapes)
    two = copy.deepcopy(one)
    before = torch.get_num_threads()
    try:
        for threads, p in ((1, one), (2, two)):
            torch.set_num_threads(threads)
            step(p, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(written(one), written(two), strict=True))


def test_two_threads_work_side_by_side():
    """No global buffers: steps of two threads at once give what they give one after the other."""
    problems = [build("amsgrad") for _ in range(2)]
    apart = copy.deepcopy(problems)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda p: step(p, 10), problems))
    for p, q in zip(problems, apart, strict=True):
        step(q, 10)
        assert all(torch.equal(a, b) for a, b in zip(written(p), written(q), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_beside_the_tensors_is_left_alone(isa, dtype):
    """Parameters between guard bands of NaN: a tail that reads or writes past the end shows."""
    p = build("adam", dtype, torch.float32)
    bands = []
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors", "radii"):
        for i, t in enumerate(p[key]):
            if t is not None:
                wide = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
                wide[32:-32] = t.flatten()
                bands.append(wide)
                p[key][i] = wide[32:-32].view(t.shape)
    step(p, 3)
    assert all(t.isfinite().all() for t in written(p))
    assert all(wide[:32].isnan().all() and wide[-32:].isnan().all() for wide in bands)


def test_a_row_in_many_parts_is_one_row():
    """Position embeddings, and whole tensors under the l2 norm: rows longer than what a thread takes at a time."""
    for norm, shapes in (("row_l1", LONG), ("l2", [(70, 700), (3, 2, 9000)])):
        ours = problem("adam", shapes=shapes) | {"norm": norm}
        torchs, exact = copy.deepcopy(ours), to_double(ours)
        for p, backend in ((ours, "native"), (torchs, "reference"), (exact, "reference")):
            with use_backend(backend):
                step(p, 2)
        errors(written(ours), written(torchs), written(exact))
        assert any(float(r[wp.PROJECTED]) > 0 for r in ours["radii"])


def test_wrong_lists_are_refused_by_the_module():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    rest = (0, 0.1, 0.0, 0.9, 0.9, 1e-8, True, 1.0, 1.0, 1e-8, False, 0, 1)
    with pytest.raises(ValueError, match="different lengths"):
        module.ftp_step_cpu([0] * 8, [], [], *rest)
    for types in ([0, 2, 0, 0], [0, 0, 1, 0], [2, 2, 3, 0], [1, 1, 0, 0]):  # moments, anchors of other kinds
        with pytest.raises(ValueError, match="no kernel for these types"):
            module.ftp_step_cpu([1] * 8, [1, 1, *types], [0.01, 0.1, 0.0], *rest)


def test_explain_says_which_kernel_runs():
    p = build("adam")
    for op in (wp.ftp_adam_step_, wp.ftp_sgd_step_):
        text = clk.explain(op, p["params"])
        assert "native: runs" in text or _native.load() is None
    with use_backend("reference"):
        assert "reference (plain torch): runs" in clk.explain("ftp_adam_step_", p["params"])


# -- the primitives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row_l1", "row_l2", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_primitives_on_every_instruction_set(isa, norm, dtype):
    """Rows of all sizes, parts of rows, narrow anchors, zero anchors: as the reference, to a rounding."""
    unit = max(torch.finfo(dtype).eps, 2.0**-23 if dtype != torch.float64 else 0.0)
    for i, shape in enumerate(shape for shape in SHAPES if 0 not in shape):
        anchor = (torch.randn(shape) * 0.05).bfloat16().to(dtype)
        weight = anchor + (torch.randn(shape) * 0.01).to(dtype)
        base = [anchor, None, anchor.bfloat16() if dtype == torch.float32 else anchor][i % 3]
        rows = wp.reference.as_rows(weight, wp.NORMS[norm])
        radius = (rows.double() * 0.1).abs().sum(1) * torch.rand(len(rows), dtype=torch.float64)
        found = []
        for backend in ("native", "reference"):
            with use_backend(backend):
                copied = weight.clone()
                wp.rescale_([copied], [base], [radius.clamp(max=1.0)], norm=norm)
                products = wp.displacement_products([weight], [weight], [base])[0]
                found.append((wp.project_to_anchor(weight, base, radius, norm=norm), copied, products))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=4 * unit if a.dtype == dtype else 1e-5, atol=unit * 0.1)


def test_primitives_do_not_depend_on_threads():
    shapes = [(500, 300), (2, 70_000), (200_000,), (9, 27)]
    pairs = [(torch.randn(s), torch.randn(s)) for s in shapes]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = [wp.project_to_anchor(w, a, 2.0, norm=norm) for w, a in pairs for norm in wp.NORMS]
            out.append(wp.displacement_products([a for _, a in pairs], [w for w, _ in pairs], [a for _, a in pairs]))
            scaled = [w.clone() for w, _ in pairs]
            wp.rescale_(scaled, [a for _, a in pairs], [0.5] * len(pairs))
            found.append([*out, *scaled])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wrong_types_of_rows_are_refused_by_the_module():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    with pytest.raises(ValueError, match="no kernel for these types"):
        module.anchored_rows_cpu([(0, 1, 1, 1, 0, 1, 1, 1, 0)], 2, 0, 1)
