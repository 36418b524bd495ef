"""The registry: which implementation runs, and what a user is told when it is not the one they hoped for."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels.ops import _registry
from cl_kernels.ops._registry import OPS, Unsupported, define


def _double(x: Tensor) -> Tensor:
    return x * 2


def _native_double(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise Unsupported("only float32 is compiled")
    return x + x + 0 * x.sum() + 1e3  # off by 1000, so that a test can see which one ran


@pytest.fixture(scope="module")
def double() -> Iterator[object]:
    overload = define(
        "test_double",
        "(Tensor x) -> Tensor",
        reference=_double,
        fake=torch.empty_like,
        native_cpu=_native_double,
    )
    yield overload
    del OPS["test_double"]


@pytest.fixture
def native_present(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_kernels.ops import _native

    monkeypatch.setattr(_native, "why_missing", lambda: None)


@pytest.fixture
def native_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_kernels.ops import _native

    monkeypatch.setattr(_native, "why_missing", lambda: "no compiler was found")
    monkeypatch.setattr(_registry, "_warned", set())


def test_auto_prefers_the_device_kernel(double, native_present):
    assert torch.equal(double(torch.zeros(2)), torch.full((2,), 1e3))


def test_reference_can_be_forced_and_the_choice_is_undone(double, native_present):
    with clk.use_backend("reference"):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert double(torch.zeros(2))[0] == 1e3


def test_a_missing_kernel_falls_back_loudly_once(double, native_absent):
    with pytest.warns(UserWarning, match=r"test_double on cpu .* no compiler was found"):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(2))


def test_declined_arguments_fall_back_with_the_reason(double, native_present, monkeypatch):
    monkeypatch.setattr(_registry, "_warned", set())
    with pytest.warns(UserWarning, match="only float32 is compiled"):
        assert torch.equal(double(torch.ones(2, dtype=torch.float64)), torch.full((2,), 2.0, dtype=torch.float64))


def test_strict_mode_turns_a_fallback_into_an_error(double, native_absent, monkeypatch):
    monkeypatch.setenv("CL_KERNELS_STRICT", "1")
    with pytest.raises(clk.BackendUnavailableError, match="no compiler was found"):
        double(torch.ones(2))


def test_an_explicit_backend_that_cannot_run_raises(double, native_absent):
    with clk.use_backend("native"), pytest.raises(clk.BackendUnavailableError, match="cl-kernels doctor"):
        double(torch.ones(2))


def test_an_explicit_backend_an_operation_does_not_have_runs_the_reference(double, native_absent):
    with clk.use_backend("triton"):
        assert double(torch.ones(1)).item() == 2.0


def test_environment_variable_chooses_and_is_checked(double, native_present, monkeypatch):
    monkeypatch.setenv("CL_KERNELS_BACKEND", "reference")
    assert double(torch.ones(1)).item() == 2.0
    monkeypatch.setenv("CL_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="expected one of auto, native, triton, reference, got 'cuda'"):
        double(torch.ones(1))


def test_unknown_backend_changes_nothing():
    with pytest.raises(ValueError, match="backend"):
        clk.use_backend("fast")
    assert clk.ops.backend() == "auto"


def test_explain_names_what_runs_and_why(double, native_absent):
    text = clk.explain("test_double", [torch.ones(1)])
    assert "native: not used: no compiler was found" in text
    assert "reference (plain torch): runs" in text
    with pytest.raises(ValueError, match="unknown operation 'tripple'"):
        clk.explain("tripple")


def test_explain_sees_the_kernel_when_it_can_run(double, native_present):
    text = clk.explain("test_double", torch.ones(1))
    assert "native: runs" in text
    assert "the fallback" in text


def test_fake_kernel_traces_without_running(double, native_present):
    compiled = torch.compile(lambda x: double(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 1e3))
