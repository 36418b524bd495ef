"""The compiled QR: every instruction set and thread count, and the CUDA kernel played on the host."""

from __future__ import annotations

import contextlib
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
from support import relative
from torch import Tensor

from cl_kernels.ops import _native, use_backend
from cl_kernels.ops.orthogonal_qr import cuda, native, reference

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(1, 1), (5, 1), (8, 2), (64, 4), (9, 4), (7, 7), (33, 8), (65, 9), (40, 16), (257, 17), (130, 33), (90, 90)]
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def assert_factors(a: Tensor, ours: Factors, theirs: Factors, *, filled: bool = True) -> None:
    """What the contract fixes: status, orthonormality, A = Q R, and for full rank every entry."""
    (q, r, solve, status), u = ours, torch.finfo(a.dtype).eps / 2
    n = a.shape[-1]
    assert torch.equal(status, theirs[3])
    fine = status != reference.NONFINITE
    q64, r64, a64 = q[fine].double(), r[fine].double(), a[fine].double()
    assert torch.equal(r[fine], r[fine].triu())
    gram, eye = q64.mT @ q64, torch.eye(n, dtype=torch.float64)
    if not filled:
        kept = (r64.diagonal(dim1=-2, dim2=-1) != 0)[..., None]
        eye = eye * kept
    assert (gram - eye).norm(dim=(-2, -1)).max() <= 10 * u * n
    residual = (a64 - q64 @ r64).norm(dim=(-2, -1))
    assert (residual <= (2e-6 if a.dtype == torch.float32 else 1e-14) * a64.norm(dim=(-2, -1))).all()
    regular = status == reference.OK
    for mine, wanted in zip((q, r, solve), theirs[:3], strict=True):
        if regular.any():
            # The factors are as sensitive as the condition is large; float is factored in double.
            assert relative(mine[regular], wanted[regular]) <= (1e3 if a.dtype == torch.float32 else 1e5) * u
        assert mine[~fine].isnan().any() == (~fine).any()


def batch(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """A regular matrix, one of condition 1e4, a deficient one, zeros, and one with a NaN."""
    a = torch.randn(5, m, n, dtype=torch.float64)
    left, _, right = torch.linalg.svd(a[1], full_matrices=False)
    a[1] = (left * torch.logspace(0, -4, n, dtype=torch.float64)) @ right
    a[2, :, -1] = a[2, :, 0] if n > 1 else 0
    a[3], a[4, m // 2, n // 2] = 0, float("nan")
    return a.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_instruction_set_against_the_reference(isa, m, n, dtype):
    a = batch(m, n, dtype)
    assert_factors(a, native.qr(a), reference.qr(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("wanted", ["both", "q", "r"])
def test_every_instruction_set_differentiates(isa, m, n, dtype, wanted):
    q, r, solve, _ = reference.qr(torch.randn(3, m, n, dtype=dtype))
    gq = torch.randn(n, m, dtype=dtype).mT.expand(3, m, n) if wanted != "r" else None
    gr = torch.randn(3, n, n, dtype=dtype) if wanted != "q" else None
    ours, gold = native.qr_backward(gq, gr, q, r, solve), reference.qr_backward(gq, gr, q, r, solve)
    assert relative(ours, gold) <= 100 * torch.finfo(dtype).eps
    assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropped_columns(isa, dtype):
    a = torch.randn(3, 50, 12, dtype=dtype)
    a[0, :, 5], a[1, :, 7], a[2, :, :] = a[0, :, 1], 0, 0
    floor = (1e-3 * a.norm(dim=-2)).contiguous()
    ours, theirs = native.qr(a, floor), reference.qr(a, floor)
    assert torch.equal(ours[1].diagonal(dim1=-2, dim2=-1) == 0, theirs[1].diagonal(dim1=-2, dim2=-1) == 0)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, wanted, atol=100 * torch.finfo(dtype).eps)


def test_threads_do_not_change_a_bit():
    a, before = torch.randn(7, 100, 20), torch.get_num_threads()
    gq, results = torch.randn_like(a), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = native.qr(a)
            results.append([*out, native.qr_backward(gq, None, *out[:3])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_two_threads_work_side_by_side():
    a = [torch.randn(6, 80, 12) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda x: [native.qr(x) for _ in range(20)][-1], a))
    for x, found in zip(a, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(native.qr(x), found, strict=True))


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 20),
    layout=st.sampled_from(["rows", "columns"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_nothing_is_read_or_written_beside_the_matrices(m, n, layout, dtype, seed):
    torch.manual_seed(seed)
    m = max(m, n)
    wide = torch.full((m * n * 2 + 64,), float("nan"), dtype=dtype)
    a = wide[32 : 32 + 2 * m * n].view(2, m, n) if layout == "rows" else wide[32 : 32 + 2 * m * n].view(2, n, m).mT
    a.copy_(torch.randn(2, m, n))
    guarded = []

    def guard(t: Tensor) -> Tensor:
        band = torch.full((t.numel() + 64,), float("nan") if t.is_floating_point() else -7).to(t.dtype)
        guarded.append(band)
        return band[32 : 32 + t.numel()].view(t.shape)

    out = tuple(guard(t) for t in native.allocate(a))
    fields, _held = native.forward_fields(a, None, out)
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    module.qr_cpu(fields, _native.DTYPE[dtype], 1)
    assert all(t.isfinite().all() for t in out)
    ga = guard(a.contiguous())
    fields, _held = native.backward_fields(torch.randn_like(out[0]), None, *out[:3], ga)
    module.qr_backward_cpu(fields, _native.DTYPE[dtype], 1)
    assert ga.isfinite().all()
    for band in guarded:
        edges = torch.cat([band[:32], band[-32:]])
        assert (edges.isnan() if edges.is_floating_point() else edges == -7).all()


def test_other_types_are_refused_by_the_module():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    with pytest.raises(ValueError, match="float32 and float64 only"):
        module.qr_cpu([0] * 12, 3, 1)
    with pytest.raises(ValueError, match="float32 and float64 only"):
        module.qr_backward_cpu([0] * 15, 2, 1)


# -- the CUDA kernel --------------------------------------------------------------------------------------------------


class Player:
    """Stands in for the module's CUDA entry points: the same fields, passes and products, played on the host."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.reverse = False

    def qr_workspace(self, n: int) -> int:
        return 0

    def _play(self, name: str, fields: list[int], dtype: int) -> None:
        values = (ctypes.c_int64 * len(fields))(*fields)
        getattr(self._library, name)(values, ctypes.c_int(dtype), ctypes.c_bool(self.reverse))

    def qr_cuda(self, fields: list[int], dtype: int, *_: int) -> None:
        self._play("play_forward", fields, dtype)

    def qr_backward_cuda(self, fields: list[int], dtype: int, *_: int) -> None:
        self._play("play_backward", fields, dtype)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import native_build

    try:
        compiler = native_build.find_cxx()[0]
    except native_build.NativeBuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    output = tmp_path_factory.mktemp("block") / "block.so"
    source = ROOT / "tests" / "native" / "orthogonal_qr_block_host.cpp"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run([*compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(output)], check=True)
    return output


@pytest.fixture(params=[False, True], ids=["in_order", "reversed"])
def player(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> Player:
    played = Player(library)
    played.reverse = request.param
    monkeypatch.setattr(_native, "load", lambda: played)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return played


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_cuda_kernel_played_on_the_host(player, m, n, dtype):
    a = batch(m, n, dtype)
    assert_factors(a, cuda.qr(a), reference.qr(a))


@pytest.mark.parametrize(("m", "n", "kappa"), [(300, 16, 1e7), (120, 60, 1e7), (60, 16, 1e10), (200, 8, 1e13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_matrices_played_on_the_host(player, m, n, kappa, dtype):
    a = torch.randn(1, m, n, dtype=torch.float64)
    left, _, right = torch.linalg.svd(a, full_matrices=False)
    a = ((left * torch.logspace(0, -float(torch.log10(torch.tensor(kappa))), n, dtype=torch.float64)) @ right).to(dtype)
    q, r, *_ = (t.double() for t in cuda.qr(a))
    assert (q.mT @ q - torch.eye(n)).norm() <= 10 * torch.finfo(dtype).eps / 2 * n
    assert (a.double() - q @ r).norm() <= (2e-6 if dtype == torch.float32 else 1e-14) * a.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_condition_played_on_the_host(player, dtype):
    """Kahan's matrix: no pivot is small, the last singular value is."""
    sine, cosine = 0.932, 0.362
    kahan = torch.eye(60, dtype=torch.float64) - cosine * torch.ones(60, 60, dtype=torch.float64).triu(1)
    a = torch.linalg.qr(torch.randn(1, 90, 60, dtype=torch.float64)).Q @ (sine ** torch.arange(60)[:, None] * kahan)
    q, r, *_ = (t.double() for t in cuda.qr(a.to(dtype)))
    assert (q.mT @ q - torch.eye(60)).norm() <= 10 * torch.finfo(dtype).eps / 2 * 60
    assert (a.to(dtype).double() - q @ r).norm() <= (2e-6 if dtype == torch.float32 else 1e-14) * a.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_solve_played_on_the_host(player, dtype):
    """Cholesky for float, one-sided Jacobi for double: S (R^T R + delta^2 I) = R, up to what rounding R changes."""
    a = torch.randn(3, 40, 9, dtype=dtype)
    a[0, :, 4], a[1], a[2, :, 8] = a[0, :, 2], a[1, :, :1] * torch.arange(9), a[2, :, :4].sum(-1)
    _, r, solve, status = cuda.qr(a)
    assert (status == reference.DEFICIENT).all()
    for wide, s in zip(r.double(), solve.double(), strict=True):
        delta = 10 * 9 * torch.finfo(dtype).eps / 2 * wide.diagonal().max()
        damped = s @ (wide.mT @ wide + delta**2 * torch.eye(9))
        assert (damped - wide).norm() <= 5e-2 * wide.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropped_columns_and_strides_played_on_the_host(player, dtype):
    a = torch.randn(3, 12, 50, dtype=dtype).mT
    a[0, :, 5], a[1, :, 7], a[2] = a[0, :, 1], 0, 0
    floor = 1e-3 * a.norm(dim=-2)
    for mine, wanted in zip(cuda.qr(a, floor), reference.qr(a, floor), strict=True):
        assert torch.allclose(mine, wanted, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e30), (torch.float64, 1e300), (torch.float64, 1e-290)])
def test_huge_and_tiny_played_on_the_host(player, dtype, scale):
    a = torch.randn(2, 30, 5, dtype=dtype)
    plain, scaled = cuda.qr(a), cuda.qr(a * scale)
    assert relative(scaled[0], plain[0]) <= 10 * torch.finfo(dtype).eps
    assert torch.equal(scaled[3], plain[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("wanted", ["both", "q", "r"])
def test_the_cuda_backward_played_on_the_host(player, m, n, dtype, wanted):
    q, r, solve, _ = reference.qr(torch.randn(3, m, n, dtype=dtype))
    gq = torch.randn(n, m, dtype=dtype).mT.expand(3, m, n) if wanted != "r" else None
    gr = torch.randn(3, n, n, dtype=dtype) if wanted != "q" else None
    ours, gold = cuda.qr_backward(gq, gr, q, r, solve), reference.qr_backward(gq, gr, q, r, solve)
    assert relative(ours, gold) <= 10 * torch.finfo(dtype).eps


def test_more_columns_than_the_stage_holds_are_declined():
    declined: Any = None
    try:
        cuda.qr(torch.zeros(1, 500, 490))
    except Exception as error:
        declined = error
    assert "more than 480 columns" in str(declined)
    with use_backend("auto"):
        assert torch.ops.cl_kernels.qr(torch.randn(500, 490))[3] == reference.OK
