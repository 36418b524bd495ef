"""Measures variants of one computation against each other in one process.

What makes the numbers comparable on a shared machine: one thread, variants interleaved round by round in a rotating
order, process CPU time (wall time beside it), minimum and median over the rounds, a floor computed from rates measured
in the same process, and every output checked against its expected value before anything is timed. Quote ratios.

A benchmark file provides `cases(quick: bool) -> Iterable[Case]` and ends with `harness.main(__doc__, cases)`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Rates", "can_compile", "environment", "main", "measure"]

Outputs = Tensor | Sequence[Tensor]


@dataclass
class Case:
    """One computation: named variants that must all produce `expected`, and the work it cannot avoid.

    `variants` maps a name to a call without arguments that returns its output(s); "ours" is the one that ratios are
    quoted for. Each variant is called once and compared with `expected` by the relative Frobenius error, which must
    stay below `tolerance` (one number, or one for each name; infinity where a baseline is known to be inexact: its
    error is printed all the same). `flops` and `bytes_moved` give the floor at the rate named by `rate`.
    """

    name: str
    variants: dict[str, Callable[[], Outputs]]
    expected: Outputs
    tolerance: float | dict[str, float]
    flops: float = 0.0
    bytes_moved: float = 0.0
    rate: str = "sgemm"
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """What this machine does at this moment with one thread: GFLOP/s of matrix products, GB/s of a copy."""

    sgemm: float
    dgemm: float
    bf16gemm: float
    copy: float

    @classmethod
    def calibrate(cls) -> Rates:
        def product(dtype: torch.dtype) -> float:
            a = torch.randn(1024, 1024, dtype=dtype)
            return 2 * 1024**3 / _best(lambda: a @ a) / 1e9

        source = torch.randn(1 << 24)  # 64 MiB, past most last-level cache slices
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9
        return cls(product(torch.float32), product(torch.float64), product(torch.bfloat16), copy)

    def floor(self, case: Case) -> float:
        """Seconds that the arithmetic or the memory traffic takes at the least."""
        return max(case.flops / getattr(self, case.rate), case.bytes_moved / self.copy) / 1e9


def _best(call: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def can_compile() -> bool:
    """Whether `torch.compile` can generate code here."""
    try:
        return bool(torch.compile(lambda x: x + 1)(torch.ones(2))[0] == 2)
    except Exception:  # any failure of a compiler toolchain means the same: leave that baseline out
        return False


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "clock": "process CPU seconds; wall seconds beside them",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in pairs}
    return f"{found.get('model name', '?')}, family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return run.stdout.strip()


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


def measure(case: Case, rates: Rates, *, rounds: int = 7, slice_s: float = 0.05) -> dict[str, Any]:
    """Check the outputs, then time all variants interleaved. Raises `ValueError` if an output is wrong."""
    errors = {name: error(call(), case.expected) for name, call in case.variants.items()}
    for name, found in errors.items():
        allowed = case.tolerance[name] if isinstance(case.tolerance, dict) else case.tolerance
        if not found <= allowed:
            raise ValueError(f"{case.name}: {name} is wrong, relative error {found:.1e} > {allowed:.1e}; nothing timed")
    calls = {name: max(1, round(slice_s / max(_best(call, 3), 1e-7))) for name, call in case.variants.items()}
    cpu: dict[str, list[float]] = {name: [] for name in case.variants}
    wall: dict[str, list[float]] = {name: [] for name in case.variants}
    names = list(case.variants)
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                call, count = case.variants[name], calls[name]
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                for _ in range(count):
                    call()
                cpu[name].append((time.process_time() - cpu_start) / count)
                wall[name].append((time.perf_counter() - wall_start) / count)
    finally:
        gc.enable()
    floor = rates.floor(case)
    ours = min(cpu["ours"]) if "ours" in cpu else None
    rows = [
        {
            "variant": name,
            "min_s": min(cpu[name]),
            "median_s": statistics.median(cpu[name]),
            "wall_min_s": min(wall[name]),
            "floor_percent": 100 * floor / min(cpu[name]) if floor else None,
            "times_ours": min(cpu[name]) / ours if ours else None,
            "error": errors[name],
        }
        for name in names
    ]
    return {"case": case.name, "floor_s": floor or None, "notes": case.notes, "rows": rows}


def _show(result: dict[str, Any]) -> None:
    floor = f", floor {_time(result['floor_s'])}" if result["floor_s"] else ""
    lines = [f"\n{result['case']}{floor}"]
    for row in result["rows"]:
        percent = f"{row['floor_percent']:5.0f} %" if row["floor_percent"] is not None else "      -"
        ratio = f"{row['times_ours']:8.2f}x" if row["times_ours"] is not None else "       - "
        lines.append(
            f"  {row['variant']:<34} min {_time(row['min_s'])}  median {_time(row['median_s'])}  of floor {percent}"
            f"  {ratio} ours  error {row['error']:.1e}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _time(seconds: float) -> str:
    for unit, scale in (("s ", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:7.2f} {unit}"
    raise AssertionError("unreachable")


def main(
    description: str | None, cases: Callable[[bool], Iterable[Case]], arguments: Sequence[str] | None = None
) -> int:
    """The command line of a benchmark file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: does it run, are outputs right")
    parser.add_argument("--json", type=Path, help="write all numbers and the environment to this file")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates = Rates.calibrate()
    sys.stdout.write(f"{environment()['cpu']}; {', '.join(f'{k} {v:.1f}' for k, v in asdict(rates).items())} G/s\n")
    results = []
    for case in cases(options.quick):
        if options.only in case.name:
            results.append(measure(case, rates, rounds=3 if options.quick else 7))
            _show(results[-1])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), "rates": asdict(rates), "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
