"""What the projected step promises beyond its formula: two passes, every float type, all or nothing, no new memory."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels.ops import Projector, _native, project, projected_adam_step_, projection, use_backend
from cl_kernels.ops.projection import lists, reference

HYPER: dict[str, Any] = {
    "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True,
}  # fmt: skip


def basis(d: int, r: int, dtype: torch.dtype = torch.float32, *, columns: bool = True) -> Tensor:
    v = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].to(dtype)
    return v.mT.contiguous().mT if columns else v.contiguous()


def problem(
    shapes: list[tuple[int, ...]], weight: torch.dtype = torch.float32, moment: torch.dtype = torch.float32
) -> dict[str, Any]:
    p: dict[str, Any] = {"params": [torch.randn(s).to(weight) for s in shapes]}
    p["grads"] = [torch.randn(s).to(weight) for s in shapes]
    p["exp_avgs"] = [(torch.randn(s) * 0.1).to(moment) for s in shapes]
    p["exp_avg_sqs"] = [(torch.rand(s) * 0.1 + 0.01).to(moment) for s in shapes]
    p["max_exp_avg_sqs"] = [(torch.rand(s) * 0.2).to(moment) for s in shapes]
    p["steps"] = [torch.tensor(float(i)) for i in range(len(shapes))]
    p["left"] = [None] * len(shapes)
    p["right"] = [
        Projector(basis(s[-1], min(64, max(1, s[-1] // 3)), torch.promote_types(moment, torch.float32))) for s in shapes
    ]
    return p | HYPER


def written(p: dict[str, Any]) -> list[Tensor]:
    return [t for key in ("params", "exp_avgs", "exp_avg_sqs", "steps", "max_exp_avg_sqs") for t in p[key] or []]


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with clk.use_backend(request.param):
        yield request.param


# -- two passes --------------------------------------------------------------------------------------------------------


def exact_pair(u: Tensor, v: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """(a - b) u + b w with w outside the span of V, exactly, and an orthonormal basis of that span."""
    q = torch.linalg.qr(v.double())[0]
    u = u.double()
    return (a - b) * u + b * (u - (u @ q) @ q.mT), q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 0.25), (0.03, -1.0)])
def test_a_16_bit_basis_is_applied_twice(dtype, scales):
    """Gradients aligned with the protected space are the worst case: one pass leaves 1e-3 of them, two 1e-5."""
    torch.manual_seed(0)
    v = basis(768, 300).to(dtype)
    u = torch.randn(4, 300) @ v.float().mT + 0.01 * torch.randn(4, 768)
    for side in ("right", "left"):
        y = project(u if side == "right" else u.mT.contiguous(), **{side: Projector(v, *scales)})
        y = y if side == "right" else y.mT
        exact, _ = exact_pair(u, v, *scales)
        assert (y.double() - exact).norm() <= 2e-5 * u.norm() * max(map(abs, scales))


def test_one_pass_of_a_16_bit_basis_would_leak(monkeypatch):
    """The test above can tell: the same with one pass misses by a hundred times more."""
    torch.manual_seed(0)
    v = basis(768, 300).bfloat16()
    u = torch.randn(4, 300) @ v.float().mT
    errors = []
    for count in (2, 1):
        monkeypatch.setattr(reference, "passes", lambda _, count=count: count)
        exact, _ = exact_pair(u, v, 1.0, 1.0)
        errors.append(float((project(u, right=Projector(v)).double() - exact).norm() / u.norm()))
    assert errors[0] <= 2e-5
    assert errors[1] >= 1e-3


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_with_16_bit_bases_keeps_out_of_their_span(isa, dtype, columns, rows):
    torch.manual_seed(0)
    p = problem([(rows, 96)])
    p["left"] = [Projector(basis(rows, 3, columns=columns).to(dtype))]
    p["right"] = [Projector(basis(96, 31, columns=columns).to(dtype))]
    p["grads"] = [torch.randn(rows, 31) @ p["right"][0].basis.float().mT]
    start, torchs = p["params"][0].clone(), copy.deepcopy(p)
    with use_backend("native"):
        projected_adam_step_(**p)
    with use_backend("reference"):
        projected_adam_step_(**torchs)
    assert all(torch.allclose(a, b, rtol=2e-5, atol=2e-6) for a, b in zip(written(p), written(torchs), strict=True))
    moved = (p["params"][0] - start).double()
    right, left = (torch.linalg.qr(p[side][0].basis.double())[0] for side in ("right", "left"))
    assert (moved @ right).norm() <= 1e-4 * moved.norm()
    assert (left.mT @ moved).norm() <= 1e-4 * moved.norm()


def test_two_passes_have_the_gradients_of_their_formula():
    torch.manual_seed(0)
    v = basis(16, 5).bfloat16().requires_grad_()
    u, a, b = (torch.randn(3, 16, requires_grad=True), *(torch.tensor(x, requires_grad=True) for x in (0.9, 0.7)))
    weight = torch.randn(3, 16)
    found = torch.autograd.grad((project(u, right=Projector(v, a, b)) * weight).sum(), (u, v, a, b))
    wide = v.detach().float().requires_grad_()
    rest = u - (u @ wide) @ wide.mT
    rest = rest - (rest @ wide) @ wide.mT
    expected = torch.autograd.grad((((a - b) * u + b * rest) * weight).sum(), (u, wide, a, b))
    for x, y, tolerance in zip(found, expected, (1e-5, 2e-2, 1e-5, 1e-5), strict=True):  # dV is rounded to bfloat16
        assert (x.float() - y).norm() <= tolerance * y.norm()


# -- every float type --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "moment"), sorted(lists.KINDS, key=str))
@pytest.mark.parametrize("amsgrad", [False, True])
def test_every_float_type_of_weights_and_moments(isa, weight, moment, amsgrad):
    ours = problem([(4, 33), (40, 17), (3, 2, 5)], weight, moment) | ({} if amsgrad else {"max_exp_avg_sqs": None})
    torchs = copy.deepcopy(ours)
    with use_backend("native"):
        projected_adam_step_(**ours)
    with use_backend("reference"):
        projected_adam_step_(**torchs)
    for a, b in zip(written(ours), written(torchs), strict=True):
        unit = max(2 * torch.finfo(a.dtype).eps, 2e-6 if a.dtype == torch.float32 else 1e-12)  # one rounding apart
        assert a.dtype == b.dtype
        assert torch.allclose(a.double(), b.double(), rtol=unit, atol=unit)


def test_mixed_types_in_one_list(backend):
    parts = [problem([(4, 16)], *kind) for kind in sorted(lists.KINDS, key=str)]
    parts.append(problem([(4, 16)], torch.float32, torch.bfloat16))  # no kernel's kind: worked on in copies
    together = {k: [x for part in parts for x in part[k]] for k in parts[0] if k not in HYPER} | HYPER
    apart = copy.deepcopy(parts)
    projected_adam_step_(**together)
    for i, part in enumerate(apart):
        projected_adam_step_(**part)
        assert torch.equal(together["params"][i], part["params"][0])
        assert torch.equal(together["exp_avg_sqs"][i], part["exp_avg_sqs"][0])


# -- all or nothing ----------------------------------------------------------------------------------------------------


def spoil(p: dict[str, Any], kind: str) -> tuple[type[Exception], str]:
    """Make the entry in the middle of the list fail; what is raised, and its words."""
    middle = p["params"][1]
    if kind == "gradient shape":
        p["grads"][1] = middle.new_zeros(middle.shape[1], middle.shape[0])
        return ValueError, r"params\[1\]"
    if kind == "projector size":
        p["right"][1] = Projector(basis(middle.shape[-1] + 1, 2))
        return ValueError, r"params\[1\].*do not fit"
    if kind == "batch of projectors":
        p["params"][1] = middle.expand(2, *middle.shape).contiguous()
        for key in ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            p[key][1] = p["params"][1].clone()
        p["right"][1] = Projector(torch.stack([basis(middle.shape[-1], 2)] * 3))
        return ValueError, r"params\[1\].*do not fit"
    if kind == "expanded moment":
        p["exp_avgs"][1] = middle[:1].expand(middle.shape)
        return ValueError, r"params\[1\].*expanded"
    if kind == "steps":
        p["steps"][1] = torch.zeros(3)
        return ValueError, r"steps\[1\]"
    if kind == "same memory":
        p["params"][1] = p["params"][0].clone()
        for key in ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "right"):
            p[key][1] = copy.deepcopy(p[key][0])
        p["exp_avg_sqs"][1] = p["exp_avg_sqs"][0]
        return ValueError, "twice"
    p[kind] = torch.zeros(3) + 1.0
    return ValueError, f"{kind}: expected one number"


@pytest.mark.parametrize(
    "kind",
    ["gradient shape", "projector size", "batch of projectors", "expanded moment", "steps", "same memory", "grad_scale",
     "found_inf", "lr"],
)  # fmt: skip
def test_a_failing_entry_in_the_middle_leaves_all_as_it_was(backend, kind):
    p = problem([(4, 16), (6, 16), (5, 3)])
    error, words = spoil(p, kind)
    before = copy.deepcopy(written(p))
    with pytest.raises(error, match=words):
        projected_adam_step_(**p)
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))


@pytest.mark.parametrize("fails", [1, 3, 5])
def test_running_out_of_memory_leaves_all_as_it_was(monkeypatch, fails):
    """Copies are made of what the kernels cannot take; the one that fails is neither the first nor the last."""
    p = problem([(4, 16), (6, 16), (5, 3)], torch.float32, torch.bfloat16)
    before, calls, real = copy.deepcopy(written(p)), [], lists.Lists.written

    def short(self: lists.Lists, value: Tensor, dtype: torch.dtype) -> Tensor:
        calls.append(1)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("no memory")
        return real(self, value, dtype)

    monkeypatch.setattr(lists.Lists, "written", short)
    with use_backend("native"), pytest.raises(torch.OutOfMemoryError):
        projected_adam_step_(**p)
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))


@pytest.mark.parametrize("fails", [1, 4])
def test_the_reference_makes_everything_before_it_writes(monkeypatch, fails):
    p = problem([(4, 16), (6, 16), (5, 3), (2, 7)])
    before, calls, real = copy.deepcopy(written(p)), [], reference._projected

    def short(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(reference, "_projected", short)
    with use_backend("reference"), pytest.raises(torch.OutOfMemoryError):
        projected_adam_step_(**p)
    assert len(calls) == fails
    assert all(torch.equal(a, b) for a, b in zip(written(p), before, strict=True))


# -- no new memory -----------------------------------------------------------------------------------------------------


class Heap(ctypes.Structure):
    """glibc's mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]

    def held(self) -> int:
        """Bytes that the heap has taken from the system."""
        return int(self.arena + self.hblkhd)


def heap() -> int:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("the C library has no mallinfo2")
    library.mallinfo2.restype = Heap
    found: Heap = library.mallinfo2()
    return found.held()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_is_taken_after_the_first_step(dtype):
    """Neither torch's allocator nor the heap: prompts, a full weight, and 16-bit bases that are widened on the way."""
    if _native.load() is None:
        pytest.skip(str(_native.why_missing()))
    p = problem([(4, 768)] * 12 + [(768, 768)])
    p["right"] = [Projector(basis(768, 64).to(dtype)) for _ in p["params"]]
    for _ in range(3):
        projected_adam_step_(**p)
    before = heap()
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        projected_adam_step_(**p)
    taken = sum(event.cpu_memory_usage for event in recorded.function_events if event.cpu_memory_usage > 0)
    assert taken == 0
    for _ in range(20):
        projected_adam_step_(**p)
    assert heap() - before <= 1 << 18  # the profiler's own records; the step's workspace is 1.5 MB


def test_thin_projectors_are_never_multiplied_out():
    """A weight with 20000 columns: a dense projector would take 1.6 GB, the step takes the size of its basis."""
    p = problem([(2, 20_000)]) | {"max_exp_avg_sqs": None}
    p["right"] = [Projector(basis(20_000, 4))]
    for name in ("auto", "reference"):
        with use_backend(name), torch.autograd.profiler.profile(profile_memory=True) as recorded:
            projected_adam_step_(**p)
        assert max(event.cpu_memory_usage for event in recorded.function_events) <= 8 * 20_000 * 4


# -- large weights on CUDA, multiplied in groups -----------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "form", ["one scale", "a scale each", "on the device", "16 bit", "16 bit, a scale each", "dense"]
)
def test_grouped_products_project_each_update(form, left):
    """The products of the large path are plain torch, so that the CPU can hold them against the reference."""
    from cl_kernels.ops.projection.arguments import Step
    from cl_kernels.ops.projection.large import buckets

    shapes = [(6, 10), (10, 6), (6, 10), (3, 6, 10)]
    order = [0, 2, 1, 3]  # equal ones beside each other
    sides = []
    for i, shape in enumerate(shapes):
        size = shape[-2] if left else shape[-1]
        one = 0.9 - 0.1 * i * ("each" in form)
        v = basis(size, 3).to(torch.bfloat16 if "16" in form else torch.float32)
        side = Projector(v, one, 0.7)
        sides.append(Projector.from_dense(side.matrix()) if form == "dense" else side)
    made = [projection.side_of("side", side) for side in sides]
    blank: list[Any] = [None] * 4
    scales = [x for _, _, a, b in made for x in ((a, b, 1.0, 0.0) if left else (1.0, 0.0, a, b))]
    forms = [x for _, f, *_ in made for x in ((f, 0) if left else (0, f))]
    mine = [matrix for matrix, *_ in made]
    device = torch.tensor(scales, dtype=torch.float64).view(4, 4) if form == "on the device" else None
    s = Step(
        blank, blank, blank, blank, [], blank, mine if left else blank, blank if left else mine, forms,
        [] if device is not None else scales, device, 0.1, None, 0.9, 0.9, 0.0, 0.0, False, True, False, None, None,
    )  # fmt: skip
    matrices = [torch.Size(shapes[i]) if len(shapes[i]) == 3 else torch.Size((1, *shapes[i])) for i in order]
    workspace = torch.randn(sum(m.numel() for m in matrices))
    before = [
        part.view(m) for part, m in zip(workspace.clone().split([m.numel() for m in matrices]), matrices, strict=True)
    ]
    found = buckets(s, order, [tuple(m) for m in matrices], workspace)
    assert [bucket.updates.shape[0] for bucket in found] == [2, 1, 3]
    for bucket in found:
        bucket.project(None if device is None else device[order])
    after = [part.view(m) for part, m in zip(workspace.split([m.numel() for m in matrices]), matrices, strict=True)]
    for i, x, y in zip(order, before, after, strict=True):
        assert torch.allclose(y, project(x, **{"left" if left else "right": sides[i]}), rtol=1e-5, atol=1e-5)


def test_tf32_products_take_two_passes():
    """Decided by what torch is told, not by a device: a stand-in claims to be on CUDA."""

    class OnCuda:
        dtype, is_cuda = torch.float32, True

    before = torch.get_float32_matmul_precision()
    try:
        counts = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            counts.append(reference.passes(OnCuda()))  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision(before)
    assert counts == [1, 2]
    assert reference.passes(torch.zeros(2, 1)) == 1
