"""The CUDA kernels of the FTP steps, played on the host: tables, index arithmetic, order of sums, radius policy."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weight_projection_cases import LONG, OPTIONS, SHAPES, problem, step, to_double, written

from cl_kernels.ops import _native, use_backend
from cl_kernels.ops import weight_projection as wp
from cl_kernels.ops.weight_projection import cuda, steps

ROOT = Path(__file__).resolve().parents[1]


class Player:
    """Stands in for the module's CUDA entry point: the same lists, tables and phases, played on the host."""

    def __init__(self, library: Path) -> None:
        self._play = ctypes.CDLL(str(library)).play
        self.reverse, self.calls = False, 0

    def ftp_step_cuda(self, pointers: Any, sizes: Any, numbers: Any, kind: int, *rest: Any) -> None:
        lr, decay, one, two, eps, flag, factor, kappa, floor, masked, norm, *tensors, workspace, _ = rest
        self.calls += 1
        integers = [(ctypes.c_int64 * len(values))(*values) for values in (pointers, sizes, tensors)]
        floats = [(ctypes.c_double * len(values))(*values) for values in (numbers, (lr, decay, one, two, eps, factor))]
        self._play(
            *integers[:2], floats[0], ctypes.c_int64(len(pointers) // 8), ctypes.c_bool(kind == 0), floats[1],
            ctypes.c_bool(flag), ctypes.c_double(kappa), ctypes.c_double(floor), ctypes.c_bool(masked), norm,
            integers[2], ctypes.c_void_p(workspace), ctypes.c_bool(self.reverse),
        )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import native_build

    try:
        compiler = native_build.find_cxx()[0]
    except native_build.NativeBuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    path = tmp_path_factory.mktemp("rows") / "rows.so"
    source = ROOT / "tests" / "native" / "weight_projection_rows_host.cpp"
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Werror"]
    subprocess.run([*compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(path)], check=True)
    return path


@pytest.fixture
def player(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Player]:
    """All of the CUDA path but the launch itself."""
    made = Player(library)
    monkeypatch.setattr(_native, "load", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "_is_there", lambda number: True)
    monkeypatch.setattr(steps, "_adam", cuda.ftp_adam_cuda)
    monkeypatch.setattr(steps, "_sgd", cuda.ftp_sgd_cuda)
    yield made
    assert made.calls > 0


def check(ours: dict[str, Any], p: dict[str, Any], times: int, seed: int = 1) -> None:
    """The error against float64 is at most twice that of plain torch in the same type."""
    torchs, exact = copy.deepcopy(p), to_double(p)
    with use_backend("reference"):
        run_reference(torchs, times, seed)
        run_reference(exact, times, seed)
    for a, b, gold in zip(written(ours), written(torchs), written(exact), strict=True):
        is_radius = any(a is radius for radius in ours["radii"])  # h is a difference of large sums
        unit = 1e-5 if is_radius else 2 * torch.finfo(a.dtype).eps
        for norm in (lambda t: float(t.norm()), lambda t: float(t.abs().max()) if t.numel() else 0.0):
            allowed = 2 * norm(b.double() - gold.double()) + (norm(gold.double()) + 1e-3) * unit
            assert norm(a.double() - gold.double()) <= allowed, (a.shape, a.dtype, a, b, gold)
        if is_radius:
            assert a[wp.FLOORED] == b[wp.FLOORED]


def run_reference(p: dict[str, Any], times: int, seed: int) -> None:
    adam, sgd = steps._adam, steps._sgd
    steps._adam, steps._sgd = wp.reference.ftp_adam_step_, wp.reference.ftp_sgd_step_
    try:
        step(p, times, seed)
    finally:
        steps._adam, steps._sgd = adam, sgd


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_the_steps_against_the_reference(player, base, reverse, options):
    p = problem(base) | options
    if base == "sgd":
        p.pop("decoupled_weight_decay", None)
        if reverse:
            p |= {"momentum": 0.0, "nesterov": False, "momentum_buffers": None}
    elif reverse:
        p["max_exp_avg_sqs"] = [torch.rand(shape) * 0.2 for shape in SHAPES]
    player.reverse = reverse
    ours = copy.deepcopy(p)
    step(ours, 3)
    check(ours, p, 3)


def test_long_rows_in_parts(player):
    for norm, shapes in (("row_l1", LONG), ("l2", LONG[:2])):
        p = problem("adam", shapes=shapes) | {"norm": norm}
        ours = copy.deepcopy(p)
        step(ours)
        check(ours, p, 1)


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", [torch.float32, "narrow"])
def test_16_bit_parameters(player, base, narrow, moment):
    """One step: rows that are projected are rounded twice, once on their way."""
    p = problem(base, narrow, narrow if moment == "narrow" else moment)
    ours, torchs = copy.deepcopy(p), copy.deepcopy(p)
    step(ours)
    run_reference(torchs, 1, 1)
    for a, b in zip(written(ours), written(torchs), strict=True):
        unit = 4e-5 if any(a is radius for radius in ours["radii"]) else torch.finfo(narrow).eps
        assert torch.allclose(a.double(), b.double(), rtol=2 * unit, atol=unit / 4), (a.shape, a, b)


def test_what_lives_on_the_device_is_read_there(player):
    p = problem("adam")
    ours = copy.deepcopy(p)
    ours["grads"] = [grad * 8 for grad in ours["grads"]]
    before = [t.clone() for t in written(ours)]
    there = {"lr": torch.tensor(1e-3, dtype=torch.float64), "grad_scale": torch.tensor(8.0)}
    wp.ftp_adam_step_(**(ours | there), found_inf=torch.ones(1))
    for old, t, shape in zip(before, written(ours), [*SHAPES * 3, *SHAPES * 3], strict=False):
        assert torch.equal(old, t), shape
    wp.ftp_adam_step_(**(ours | there), found_inf=torch.zeros(1))
    check(ours, p, 1)


def test_counts_on_the_host(player, monkeypatch):
    p = problem("adam")
    ours = copy.deepcopy(p)
    monkeypatch.setattr(cuda, "_is_there", lambda number: False)
    step(ours, 2)
    check(ours, p, 2)


@pytest.mark.parametrize("floored", [False, True])
def test_a_dummy_step_leaves_weight_anchor_and_radius_alone(player, floored):
    """Gradients all 0 and lr 0: what a checkpoint library does to make an optimizer's state."""
    p = problem("adam")
    if floored:
        step(p, 1)
        assert sum(bool(radius[wp.FLOORED]) for radius in p["radii"]) >= 2
    before = copy.deepcopy(p)
    wp.ftp_adam_step_(**(p | {"lr": 0.0, "grads": [torch.zeros_like(grad) for grad in p["grads"]]}))
    for key in ("params", "anchors", "radii"):
        assert all(a is None or torch.equal(a, b) for a, b in zip(p[key], before[key], strict=True)), key
    assert all(torch.equal(a, b + 1) for a, b in zip(p["steps"], before["steps"], strict=True))


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_a_step_without_a_rate_still_moves_the_radius(player, speed):
    """lr 0 with gradients: floored tensors put their anchors back, or keep an empty displacement."""
    p = problem("adam")
    step(p, 1)
    floored = [i for i, radius in enumerate(p["radii"]) if radius[wp.FLOORED]]  # others lie on the edge of their balls
    p = {key: [value[i] for i in floored] if isinstance(value, list) else value for key, value in p.items()}
    p |= {"lr": 0.0, "radius_lr": speed}
    ours = copy.deepcopy(p)
    step(ours, 2)
    check(ours, p, 2)
    before, after = (sum(bool(radius[wp.FLOORED]) for radius in q["radii"]) for q in (p, ours))
    assert after == before > 0 if speed == 0.0 else 0 < after < before


def test_a_poisoned_gradient_costs_its_own_rows(player):
    p = problem("adam")
    for grad in p["grads"]:
        if grad.numel():
            grad.view(-1)[0] = float("nan")
    ours, torchs = copy.deepcopy(p), copy.deepcopy(p)
    step(ours, 2)
    run_reference(torchs, 2, 1)
    for a, b in zip(written(ours), written(torchs), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True), (a.shape, a, b)
    assert all(radius.isfinite().all() for radius in ours["radii"])


def test_a_norm_that_overflows_costs_its_own_rows(player):
    p = problem("adam")
    for param in p["params"]:
        if param.ndim > 1 and param.numel() > 1:
            param[0] = 3e38
    ours, torchs = copy.deepcopy(p), copy.deepcopy(p)
    step(ours, 2)
    run_reference(torchs, 2, 1)
    for a, b in zip(written(ours), written(torchs), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5), (a.shape, a, b)
    assert all(radius.isfinite().all() for radius in ours["radii"])


def test_channels_last_weights_are_taken_as_they_lie(player):
    p = problem("adam", shapes=[(6, 3, 5, 5), (64, 8, 3, 3)])
    ours = copy.deepcopy(p)
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors"):
        ours[key] = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in ours[key]]
    step(ours, 2)
    check(ours, p, 2)


@pytest.mark.parametrize("shifted", [None, "params", "grads", "exp_avgs", "exp_avg_sqs", "anchors"])
def test_memory_beside_the_tensors_is_left_alone(player, shifted):
    """Everything between guard bands of NaN, one field off the 16-byte grid: a tail that is read or written shows."""
    p = problem("adam", shapes=[*SHAPES, (4, 1028)])
    expected = copy.deepcopy(p)
    bands = []
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors"):
        for i, t in enumerate(p[key]):
            if t is None:
                continue
            wide = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
            start = 32 + (key == shifted)
            wide[start : start + t.numel()] = t.flatten()
            bands.append((wide, start, t.numel()))
            p[key][i] = wide[start : start + t.numel()].view(t.shape)
    step(p, 2)
    check(p, expected, 2)
    assert all(wide[:start].isnan().all() and wide[start + n :].isnan().all() for wide, start, n in bands)


def test_types_without_a_kernel_are_declined(player):
    p = problem("adam")
    p["params"][0] = p["params"][0].double()
    p["anchors"][0] = p["anchors"][0].double()
    with pytest.raises(cuda.Unsupported, match="float64"):
        step(p)
    step(problem("adam"))
