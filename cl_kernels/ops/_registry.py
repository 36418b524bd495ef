"""Registration of operations, and the choice of the implementation that runs.

`define` registers a schema, its fake kernel, and the float64-correct reference as the default kernel of the dispatcher,
so the reference *is* the fallback and user code holds no `if`. Faster implementations are tried in order, per device.

`Library.define` and `impl` are used instead of the `custom_op` decorator because they cost 9 us a call instead of 59.
What they drop is the version bump of mutable arguments: public functions call `torch.autograd.graph.increment_version`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import torch

from cl_kernels.errors import BackendUnavailableError
from cl_kernels.ops import _native

__all__ = ["OPS", "Implementation", "OpRecord", "Unsupported", "backend", "define", "explain", "use_backend"]

Kernel = Callable[..., Any]
BACKENDS: Final = ("auto", "native", "triton", "reference")
_LIBRARY: Final = torch.library.Library("cl_kernels", "DEF")  # lives as long as the process


class Unsupported(Exception):
    """Raised by an implementation, before its first write, to decline these arguments; the next one is tried."""


@dataclass(frozen=True)
class Implementation:
    """One kernel for one device type, and a way to ask why it cannot be used."""

    backend: str
    device: str
    kernel: Kernel
    missing: Callable[[], str | None]
    details: Callable[..., str | None] | None = None


@dataclass(frozen=True)
class OpRecord:
    """All that is registered for one operation."""

    name: str
    overload: Any
    reference: Kernel
    implementations: tuple[Implementation, ...]
    details: Callable[..., str | None] | None = None

    def on(self, device: str) -> tuple[Implementation, ...]:
        return tuple(implementation for implementation in self.implementations if implementation.device == device)


OPS: Final[dict[str, OpRecord]] = {}
_warned: set[tuple[str, str, str]] = set()
_backend: str | None = None


def backend() -> str:
    """The backend in force: the last `use_backend`, else `CL_KERNELS_BACKEND`, else "auto"."""
    return _checked(os.environ.get("CL_KERNELS_BACKEND", "auto")) if _backend is None else _backend


class use_backend:
    """Choose the implementations of all operations: "auto", "native", "triton" or "reference".

    Takes effect at once, process-wide; used in a `with` statement it is undone at the end. An explicit "native" or
    "triton" raises `BackendUnavailableError` where that implementation exists but cannot run; where an operation has
    none, its reference runs. Raises `ValueError` for any other name.
    """

    def __init__(self, name: str) -> None:
        global _backend
        self._previous = _backend
        _backend = _checked(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


def define(
    name: str,
    signature: str,
    *,
    reference: Kernel,
    fake: Kernel,
    native_cpu: Kernel | None = None,
    native_cuda: Kernel | None = None,
    triton: Kernel | None = None,
    triton_details: Callable[..., str | None] | None = None,
    reference_details: Callable[..., str | None] | None = None,
) -> Any:
    """Register `cl_kernels::name` and return its overload.

    `signature` is the schema without the name, such as "(Tensor x) -> Tensor". `reference` takes any device and dtype;
    `triton` serves CUDA tensors, and CPU tensors when a test asks for it under `TRITON_INTERPRET=1`.
    `triton_details` is given the arguments that `explain` was given; it says what is special about them, or raises
    `Unsupported` as the kernel would. `reference_details` says which form plain torch takes where it has several.
    """
    choices = [
        Implementation("native", "cpu", native_cpu, _no_native) if native_cpu else None,
        Implementation("native", "cuda", native_cuda, _no_native_cuda) if native_cuda else None,
        Implementation("triton", "cuda", triton, _no_triton, triton_details) if triton else None,
        Implementation("triton", "cpu", triton, _no_interpreter, triton_details) if triton else None,
    ]
    implementations = tuple(choice for choice in choices if choice is not None)
    _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.cl_kernels, name).default
    record = OPS[name] = OpRecord(name, overload, reference, implementations, reference_details)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    for device in sorted({implementation.device for implementation in implementations}):
        _LIBRARY.impl(name, functools.partial(_run, record, device, record.on(device)), device.upper())
    torch.library.register_fake(f"cl_kernels::{name}", fake, lib=_LIBRARY)
    return overload


def register_autograd(name: str, backward: Kernel, setup_context: Kernel) -> None:
    """Give a functional operation its gradient."""
    torch.library.register_autograd(f"cl_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def explain(op: str | Callable[..., Any], *args: Any) -> str:
    """Say which implementation of `op` would run for these arguments, and why.

    `op` is a name such as "projected_adam_step_" or the public function. The device is that of the first tensor found
    in `args` (the CPU when there is none). Implementations may still decline arguments they do not cover.
    Raises `ValueError` for an unknown operation.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"op: unknown operation {name!r}; known are {', '.join(sorted(OPS))}")
    record, device, wanted = OPS[name], _device_of(args), backend()
    lines = [f"{name} on {device}, backend {wanted!r}:"]
    chosen = False
    for implementation in record.on(device):
        reason = _passed_over(implementation, wanted) or implementation.missing()
        state = "next in line" if chosen else "runs"
        if reason is None and implementation.details is not None:
            try:
                details = implementation.details(*args)
                state += f" ({details})" if details else ""
            except Unsupported as declined:
                reason = str(declined)
        state = f"not used: {reason}" if reason else state
        chosen = chosen or reason is None
        lines.append(f"  {implementation.backend}: {state}")
    form = record.details(*args) if record.details is not None and not chosen else None
    lines.append(f"  reference (plain torch): {'the fallback' if chosen else 'runs'}{f' ({form})' if form else ''}")
    return "\n".join(lines)


def _run(record: OpRecord, device: str, choices: tuple[Implementation, ...], *args: Any, **kwargs: Any) -> Any:
    wanted = backend()
    reasons: list[tuple[str, str]] = []
    for implementation in choices:
        if _passed_over(implementation, wanted):
            continue
        reason = implementation.missing()
        if reason is None:
            try:
                return implementation.kernel(*args, **kwargs)
            except Unsupported as declined:
                reason = str(declined)
        reasons.append((implementation.backend, reason))
    if reasons:
        _fall_back(record.name, device, wanted, reasons)
    return record.reference(*args, **kwargs)


def _fall_back(name: str, device: str, wanted: str, reasons: list[tuple[str, str]]) -> None:
    why = "; ".join(f"{tried}: {reason}" for tried, reason in reasons)
    if wanted != "auto" or os.environ.get("CL_KERNELS_STRICT") == "1":
        raise BackendUnavailableError(f"{name} on {device}: {why}. `cl-kernels doctor` shows what is built and why.")
    if (name, device, why) not in _warned:
        _warned.add((name, device, why))
        message = f"cl_kernels.{name} on {device} runs its plain torch reference ({why})"
        warnings.warn(message, UserWarning, stacklevel=3)


def _passed_over(implementation: Implementation, wanted: str) -> str | None:
    if wanted == "auto" and implementation.backend == "triton" and implementation.device == "cpu":
        return "the interpreter is for tests and runs only when asked for by name"
    return None if wanted in ("auto", implementation.backend) else f"backend {wanted!r} is in force"


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _device_of(values: Iterable[Any]) -> str:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value:
            return _device_of(value)
    return "cpu"


def _no_native() -> str | None:
    return _native.why_missing()


def _no_native_cuda() -> str | None:
    return _native.why_missing() or (None if _native.cuda_built() else "the native module was built without CUDA")


@functools.cache  # a search of the import path costs 50 us, more than a small launch
def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _no_interpreter() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    return _no_triton()
