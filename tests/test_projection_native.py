"""The compiled projected steps: every instruction set, thread count and block phase, against the reference."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_kernels.ops import Projector, _native, projected_adam_step_, projection, use_backend
from cl_kernels.ops.projection import cuda
from cl_kernels.ops.projection.reference import BASIS, DENSE, NONE

ROOT = Path(__file__).resolve().parents[1]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "project_decay": False},
]
# (shape, left form and rank, right form and rank, column-major?): prompts, full weights, odd sizes, all tails.
CASES = [
    ((4, 768), (BASIS, 1), (BASIS, 64), True),
    ((1, 4, 96), (BASIS, 2), (BASIS, 33), False),
    ((3, 10, 40), (BASIS, 3), (BASIS, 7), True),
    ((130, 97), (NONE, 0), (BASIS, 50), True),
    ((130, 97), (NONE, 0), (BASIS, 50), False),
    ((33, 65), (DENSE, 0), (DENSE, 0), False),
    ((33, 65), (NONE, 0), (DENSE, 0), True),
    ((100, 17), (BASIS, 31), (NONE, 0), True),
    ((1, 1), (BASIS, 1), (BASIS, 1), True),
    ((7, 3), (NONE, 0), (BASIS, 1), False),
    ((2, 300), (NONE, 0), (BASIS, 0), True),
    ((5, 16), (DENSE, 0), (BASIS, 15), True),
    ((3, 700), (NONE, 0), (BASIS, 120), True),  # a basis in two strips
    ((30, 300), (NONE, 0), (DENSE, 0), False),  # a dense matrix in panels, the last of 44 columns and 44 rows
]


def projector(size: int, kind: tuple[int, int], columns: bool, dtype: torch.dtype) -> Projector | None:
    form, rank = kind
    if form == NONE:
        return None
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].to(dtype)
    if form == DENSE:
        dense = q + q.mT
        return Projector.from_dense(dense.mT if columns else dense.contiguous())
    v = q[:, :rank].contiguous()
    return Projector(v.mT.contiguous().mT if columns else v, 0.9, 0.7)


def problem(dtype: torch.dtype, amsgrad: bool) -> dict[str, Any]:
    shapes = [shape for shape, *_ in CASES]
    p: dict[str, Any] = {"params": [torch.randn(s, dtype=dtype) for s in shapes]}
    p["grads"] = [torch.randn(s, dtype=dtype) for s in shapes]
    p["exp_avgs"] = [torch.randn(s, dtype=dtype) * 0.1 for s in shapes]
    p["exp_avg_sqs"] = [torch.rand(s, dtype=dtype) * 0.1 for s in shapes]
    p["steps"] = [torch.tensor(float(i)) for i in range(len(shapes))]
    p["max_exp_avg_sqs"] = [torch.rand(s, dtype=dtype) * 0.2 for s in shapes] if amsgrad else None
    p["left"] = [projector(s[-2], kind, columns, dtype) for s, kind, _, columns in CASES]
    p["right"] = [projector(s[-1], kind, columns, dtype) for s, _, kind, columns in CASES]
    return p | {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
    }


def written(p: dict[str, Any]) -> list[Tensor]:
    keys = ("params", "exp_avgs", "exp_avg_sqs", "steps", "max_exp_avg_sqs")
    return [t for key in keys for t in p[key] or []]


def to_double(p: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if isinstance(value, Projector):
            return value.to(torch.float64)
        return value.double() if isinstance(value, Tensor) and value.ndim else copy.deepcopy(value)

    return {key: convert(value) for key, value in p.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_instruction_set_against_the_reference(isa, dtype, amsgrad, options):
    """The error against float64 is at most twice that of torch operations in the same dtype."""
    ours = problem(dtype, amsgrad) | options
    exact, torchs = to_double(ours), copy.deepcopy(ours)
    with use_backend("native"):
        projected_adam_step_(**ours)
    with use_backend("reference"):
        projected_adam_step_(**torchs)
        projected_adam_step_(**exact)
    for a, b, gold in zip(written(ours), written(torchs), written(exact), strict=True):
        for norm in (lambda t: t.norm(), lambda t: t.abs().max()):
            scale = 1 + float(norm(gold))
            allowed = 2 * float(norm(b.double() - gold)) + scale * 2 * torch.finfo(dtype).eps
            assert float(norm(a.double() - gold)) <= allowed, (a.shape, allowed)


def test_threads_do_not_change_a_bit():
    one = problem(torch.float32, True)
    two = copy.deepcopy(one)
    before = torch.get_num_threads()
    try:
        for threads, p in ((1, one), (2, two)):
            torch.set_num_threads(threads)
            projected_adam_step_(**p)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(written(one), written(two), strict=True))


@given(
    m=st.sampled_from([0, 1, 2, 3, 7, 16, 17, 31, 33, 64, 129]),
    d=st.sampled_from([0, 1, 2, 3, 7, 16, 17, 31, 33, 64, 129, 192]),
    batch=st.sampled_from([None, 1, 3]),
    shares=st.tuples(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]), st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])),
    columns=st.booleans(),
    scale=st.sampled_from([1.0, 1e4, 1e-6, 0.0, 1e-42]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_against_the_reference(m, d, batch, shares, columns, scale, seed):
    torch.manual_seed(seed)
    shape = (m, d) if batch is None else (batch, m, d)
    sides = [
        None if share is None else projector(size, (BASIS, int(share * size)), columns, torch.float32)
        for size, share in zip((m, d), shares, strict=True)
    ]
    p = problem(torch.float32, False) | {"left": sides[:1], "right": sides[1:], "steps": [torch.tensor(3.0)]}
    p |= {"params": [torch.randn(shape)], "grads": [torch.randn(shape) * scale]}
    p |= {"exp_avgs": [torch.randn(shape) * scale], "exp_avg_sqs": [torch.rand(shape) * scale**2]}
    expected = to_double(p)
    projected_adam_step_(**p)
    with use_backend("reference"):
        projected_adam_step_(**expected)
    for a, b in zip(written(p), written(expected), strict=True):
        atol = 2e-6 if a is p["params"][0] else 1e-6 * scale**2 + 1e-42  # the last: subnormals
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=atol)


def test_two_threads_work_side_by_side():
    """No global buffers: steps of two threads at once give what they give one after the other."""
    problems = [problem(torch.float32, True) for _ in range(2)]
    apart = copy.deepcopy(problems)

    def run(p: dict[str, Any]) -> None:
        for _ in range(20):
            projected_adam_step_(**p)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, problems))
    for p, q in zip(problems, apart, strict=True):
        run(q)
        assert all(torch.equal(a, b) for a, b in zip(written(p), written(q), strict=True))


def test_memory_beside_the_tensors_is_left_alone():
    """Parameters between guard bands of NaN: a tail that reads or writes past the end shows."""
    p = problem(torch.float32, False)
    bands = []
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        for i, t in enumerate(p[key]):
            wide = torch.full((t.numel() + 64,), float("nan"))
            wide[32:-32] = t.flatten()
            bands.append(wide)
            p[key][i] = wide[32:-32].view(t.shape)
    projected_adam_step_(**p)
    assert all(t.isfinite().all() for t in written(p))
    assert all(wide[:32].isnan().all() and wide[-32:].isnan().all() for wide in bands)


def test_wrong_lists_are_refused_by_the_module():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    with pytest.raises(ValueError, match="different lengths"):
        module.projected_adam_cpu([0] * 8, [], [], 0.1, 0.9, 0.9, 1e-8, 0.0, False, True, 1.0, 1)
    float32_weights_with_half_moments = [1, 1, 1, 0, 2] + [0] * 10
    with pytest.raises(ValueError, match="no kernel for these types"):
        module.projected_adam_cpu(
            [0] * 8, float32_weights_with_half_moments, [0.0] * 5, 0.1, 0.9, 0.9, 1e-8, 0.0, False, True, 1.0, 1
        )


class Player:
    """Stands in for the module's CUDA entry point: the same lists, entries and phases, played on the host."""

    def __init__(self, library: Path) -> None:
        self._play = ctypes.CDLL(str(library)).play
        self.reverse = False
        self.parts: list[int] = []

    def projected_adam_cuda(self, part: int, pointers: Any, sizes: Any, numbers: Any, *rest: Any) -> None:
        settings, (lr_tensor, _, grad_scale, found_inf, scales, whole, workspace, _) = rest[:8], rest[8:]
        assert (lr_tensor, grad_scale, found_inf) == (0, 0, 0)
        self.parts.append(part)
        integers = [(ctypes.c_int64 * len(values))(*values) for values in (pointers, sizes, (scales, whole, workspace))]
        floats = [(ctypes.c_double * len(values))(*values) for values in (numbers, settings)]
        count = ctypes.c_int64(len(pointers) // 8)
        self._play(part, *integers[:2], floats[0], count, floats[1], integers[2], ctypes.c_bool(self.reverse))


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Player:
    import native_build

    try:
        compiler = native_build.find_cxx()[0]
    except native_build.NativeBuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    library = tmp_path_factory.mktemp("block") / "block.so"
    source = ROOT / "tests" / "native" / "projection_block_host.cpp"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run([*compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return Player(library)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("limit", "tensor_scales"), [(128, False), (20, True)])
def test_the_cuda_step_played_on_the_host(monkeypatch, player, reverse, amsgrad, options, limit, tensor_scales):
    """All of the CUDA path but the launch itself: lists, workspace, block phases, and the parts for large weights."""
    p = problem(torch.float32, amsgrad) | options
    expected = copy.deepcopy(p)
    with use_backend("reference"):
        projected_adam_step_(**expected)
    if tensor_scales:
        for name in ("left", "right"):
            p[name] = [s if s is None or s.dense is not None else s._replace(span=torch.tensor(0.7)) for s in p[name]]
    monkeypatch.setattr(player, "reverse", reverse)
    monkeypatch.setattr(player, "parts", [])
    monkeypatch.setattr(cuda, "_SMALL_ROWS", limit)
    monkeypatch.setattr(_native, "load", lambda: player)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(projection, "_step", cuda.step_cuda)
    projected_adam_step_(**p)
    assert sorted(player.parts) == [0, 1, 2]
    for a, b in zip(written(p), written(expected), strict=True):
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-6), a.shape
