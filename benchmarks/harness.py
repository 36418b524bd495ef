"""Measures variants of one computation against each other in one process, after checking that their outputs agree.

What makes the numbers comparable on a shared machine: one thread, variants interleaved block by block in a rotating
order, process CPU time (wall time beside it), the median of block minima with its quartiles and a spread, a floor
computed from rates measured in the same process. Quote ratios. On a GPU the same columns come from cuda_timing.py, and
an implementation that falls back counts as failed.

A benchmark file provides `cases(quick) -> Iterable[Plan]`, where it has GPU cases `cuda_cases` for those, ordered by
risk, and `TABLE`, the beginnings of the names that `make bench` takes; it ends with `harness.main(__name__)`. A plan is
made by calling a builder under `@planned(name)` and costs nothing until it is built: so cases can be listed, filtered,
and built several times, each time with fresh inputs.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec

import torch
from cl_kernels.benchmarks import cpu_timing, cuda_timing, spread
from torch import Tensor

__all__ = [
    "Case",
    "NotHereError",
    "Plan",
    "Rates",
    "can_compile",
    "error",
    "main",
    "measure",
    "measure_rates",
    "planned",
    "short",
]

Outputs = Tensor | Sequence[Tensor]
P = ParamSpec("P")


class NotHereError(Exception):
    """A case that this machine cannot have, such as one that does not fit its memory."""


@dataclass
class Case:
    """One computation: named variants that must all produce `expected`, and the work it cannot avoid.

    `variants` maps a name to a call without arguments that returns its output(s); "ours" is the one that ratios are
    quoted for. Each variant is called once and compared with `expected` by the relative Frobenius error, which must
    stay below `tolerance` (one number, or one for each name; infinity where a baseline is known to be inexact: its
    error is printed all the same, and an infinite one means no time). Where variants answer slightly different
    questions, `expected` maps their names to outputs; `read` turns what a call returns into tensors. `measures` are
    further columns, functions of the outputs such as the leak of a projector; the variants named in `limited` must
    keep their `limits`. `yardsticks` compute something else, such as a step without the projection: nothing is claimed
    against them. `kept_bytes` of the peak memory are what a result must hold, such as the state of a collector; what is
    beyond them is shown apart.
    `flops` and `bytes_moved` give the floor at the rate named by `rate`.
    """

    variants: dict[str, Callable[[], Any]]
    expected: Outputs | dict[str, Outputs]
    tolerance: float | dict[str, float]
    flops: float = 0.0
    bytes_moved: float = 0.0
    rate: str = "sgemm"
    notes: dict[str, Any] = field(default_factory=dict)
    read: Callable[[Any], Outputs] = lambda output: output
    measures: dict[str, Callable[[Outputs], float]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    limited: tuple[str, ...] = ("ours",)
    yardsticks: tuple[str, ...] = ()
    kept_bytes: dict[str, int] = field(default_factory=dict)

    def check(self, name: str) -> tuple[dict[str, float], float]:
        """Call a variant once: its error and measures, and CPU seconds. Raises `ValueError` where one is too large."""
        start = cpu_timing.clock()
        output = self.variants[name]()
        seconds = cpu_timing.clock() - start
        output = self.read(output)
        expected = self.expected[name] if isinstance(self.expected, dict) else self.expected
        allowed = {"error": self.tolerance[name] if isinstance(self.tolerance, dict) else self.tolerance}
        found = {"error": error(output, expected)} | {key: call(output) for key, call in self.measures.items()}
        if name in self.limited:
            allowed |= self.limits
        for key, most in allowed.items():
            if not found[key] <= most:
                raise ValueError(f"{name} is wrong, {key} {found[key]:.1e} > {most:.1e}")
        if "compile" in name:  # its first call compiled: seconds, which must neither count as a block nor plan them
            start = cpu_timing.clock()
            self.variants[name]()
            seconds = cpu_timing.clock() - start
        return found, seconds


@dataclass(frozen=True)
class Plan:
    """A case that is not built yet: its name, how to build it, and the arguments that say what it is about."""

    name: str
    build: Callable[[], Case]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slow(self) -> bool:
        """Takes minutes; runs only when asked for."""
        return bool(self.arguments.get("slow", False))

    @property
    def dtype(self) -> torch.dtype:
        """Of the data; float32 where the case has no choice."""
        return next((v for v in self.arguments.values() if isinstance(v, torch.dtype)), torch.float32)

    def made(self) -> Case:
        """The case, from the same random numbers every time."""
        torch.manual_seed(0)
        return self.build()


def planned(name: str | Callable[..., str]) -> Callable[[Callable[P, Case]], Callable[P, Plan]]:
    """Make a builder of cases a builder of plans. `name` is a format string or a function of the arguments."""

    def decorate(builder: Callable[P, Case]) -> Callable[P, Plan]:
        signature = inspect.signature(builder)

        @functools.wraps(builder)
        def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            shown = {key: short(value) if isinstance(value, torch.dtype) else value for key, value in given.items()}
            text = name(**given) if callable(name) else name.format(**shown)
            return Plan(text, functools.partial(builder, *args, **kwargs), given)

        return plan

    return decorate


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Rates:
    """What this machine does at this moment: GFLOP/s of products, GB/s of a copy; on a CPU with one thread."""

    sgemm: float
    dgemm: float
    bf16gemm: float
    copy: float
    tf32gemm: float = 0.0
    split3gemm: float = 0.0
    tallgemm: float = 0.0
    empty_launch_us: float = 0.0

    def floor(self, case: Case) -> float:
        """Seconds that the arithmetic or the memory traffic takes at the least."""
        return max(case.flops / getattr(self, case.rate), case.bytes_moved / self.copy) / 1e9

    def shown(self) -> str:
        """One line: products in GFLOP/s, the copy in GB/s, an empty launch in microseconds."""
        return ", ".join(f"{key} {value:.1f}" for key, value in asdict(self).items() if value)


def measure_rates(device: str) -> Rates:
    return Rates(**(cuda_timing if device == "cuda" else cpu_timing).rates())


@functools.cache
def can_compile() -> bool:
    """Whether `torch.compile` can generate code here."""
    try:
        return bool(torch.compile(lambda x: x + 1)(torch.ones(2))[0] == 2)
    except Exception:  # any failure of a compiler toolchain means the same: leave that baseline out
        return False


def error(actual: Outputs, expected: Outputs) -> float:
    """The largest relative Frobenius error over the outputs; NaN and wrong shapes give infinity."""
    actual = [actual] if isinstance(actual, Tensor) else list(actual)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    if len(actual) != len(expected) or any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
        return math.inf
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        e64 = e.double()
        relative = float((a.double() - e64).norm() / e64.norm().clamp_min(torch.finfo(torch.float64).tiny))
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def measure(
    plan: Plan, rates: Rates, *, device: str = "cpu", budget_s: float = cpu_timing.BUDGET_S, peaks: bool = True
) -> dict[str, Any]:
    """Build the case, check the outputs, then time all variants in turns for about `budget_s`.

    A variant that is wrong or cannot run has a row that says so and no time; where "ours" is the one, nothing is timed.
    `peaks`: also one call of each variant for the memory it takes.
    """
    start = time.perf_counter()
    case = plan.made()
    failed: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    first: dict[str, float] = {}
    for name in case.variants:
        try:
            found[name], first[name] = case.check(name)
            if name not in case.yardsticks and not math.isfinite(found[name]["error"]):
                raise ValueError(f"{name} disagrees, error {found.pop(name)['error']}")
        except Exception as problem:
            kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
            failed[name] = f"{kind}{problem}".partition("\n")[0][:300]
    variants = {} if "ours" in failed else {name: case.variants[name] for name in found}
    built = time.perf_counter() - start
    if device == "cuda":
        columns = cuda_timing.times(variants, rebuild=lambda: plan.made().variants, moved=case.bytes_moved)
    else:
        columns = cpu_timing.times(variants, first, budget_s, peaks=peaks)
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            **columns[name],
            "kept_bytes": case.kept_bytes.get(name),
            "yardstick": name in case.yardsticks,
            **found[name],
        }
        for name in variants
    ]
    rows += [{"variant": name, "failed": why} for name, why in failed.items()]
    if "ours" in failed:
        rows += [{"variant": name, "failed": "not timed: ours is wrong"} for name in found]
    floor = rates.floor(case)
    result = {
        "case": plan.name,
        "dtype": short(plan.dtype),
        "device": device,
        "floor_s": floor or None,
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "rate": case.rate,
        "notes": case.notes,
        "built_s": round(built, 2),
        "seconds": round(time.perf_counter() - start, 2),
        "rows": rows,
    }
    return spread.summarised(result)


def main(module: str) -> int:
    """The command line of a benchmark file: that of `cl-kernels bench` for its room alone."""
    from cl_kernels.benchmarks import suite

    name = str(getattr(sys.modules[module], "__file__", module))
    return suite.command([suite.room_of(name), *sys.argv[1:]])
