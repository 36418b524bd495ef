"""What every test file shares: skips with reasons, seeds, poisoned memory, instruction sets, data folders."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_kernels._timm import import_timm
from cl_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))  # native_build, for the markers below and for test_build.py

import native_build  # noqa: E402 - found through the line above

if importlib.util.find_spec("timm"):
    with contextlib.suppress(ImportError):  # tests that need timm will skip, through the same function
        import_timm()  # after this a test may say `import timm` beside a CPU torch as well

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("suite", derandomize=True, max_examples=25, deadline=None)
    settings.register_profile("nightly", max_examples=500, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@functools.cache
def why_no_nvcc() -> str | None:
    """Why CUDA sources cannot be compiled here."""
    try:
        native_build.find_nvcc()
        native_build.find_cxx()
        native_build.find_ninja()
    except native_build.NativeBuildError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn the markers that name a need into skips where the need is not met."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "interpret": None
        if os.environ.get("TRITON_INTERPRET") == "1"
        else "needs TRITON_INTERPRET=1 and its own process",
    }
    if any(item.get_closest_marker("cuda_build") for item in items):
        reasons["cuda_build"] = why_no_nvcc()
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which of other people's loops were only replayed: their packages are not in this environment."""
    reports = (report for group in terminalreporter.stats.values() for report in group)
    if not any("test_integrations.py" in getattr(report, "nodeid", "") for report in reports):
        return
    packages = {"Accelerate": "accelerate", "Lightning": "lightning", "Avalanche": "avalanche"}
    replayed = [name for name, package in packages.items() if importlib.util.find_spec(package) is None]
    terminalreporter.line(
        f"drop-in: replayed by call sequence only: {', '.join([*replayed, 'Mammoth', 'PILOT'])}"
        + ("; `make integrations` runs those that are packages" if replayed else "")
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder with larger data sets; a test that asks for it skips where there is none."""
    place = Path(os.environ.get("CL_KERNELS_DATA") or ROOT.parent / "shared" / "data")
    if not place.is_dir():
        pytest.skip(f"no data folder: set CL_KERNELS_DATA ({place} is not there)")
    return place


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set that this processor has; skips where the native module is missing."""
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.why_missing()))
    levels = ["base", "avx2", "avx512"]
    if levels.index(module.build_info()["cpu_detected"]) < levels.index(request.param):
        pytest.skip(f"this processor has no {request.param}")
    module.limit_isa(levels.index(request.param))
    yield request.param
    module.limit_isa(len(levels) - 1)


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point() or t.is_complex():
        return t.fill_(float("nan"))
    return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


class _PoisonedTorch:
    """The torch module, but memory that torch leaves uninitialised holds NaN."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in ("empty", "empty_like", "empty_strided"):
            return lambda *args, **kwargs: _poisoned(value(*args, **kwargs))
        return value


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``torch.empty*`` and ``new_empty`` of the package returns NaN, so that an unwritten element shows."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "cl_kernels" and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", _PoisonedTorch())
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _poisoned(new_empty(self, *a, **k)))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run one command line in this process; exit code, stdout, stderr."""
    pytest.importorskip("typer", reason="the command line is built with typer")
    from cl_kernels import cli

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return run
