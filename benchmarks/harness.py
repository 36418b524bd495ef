"""Measures variants of one computation against each other in one process.

What makes the numbers comparable on a shared machine: one thread, variants interleaved round by round in a rotating
order, process CPU time (wall time beside it), minimum and median over the rounds, a floor computed from rates measured
in the same process, and every output checked against its expected value before anything is timed. Quote ratios.
On a GPU the same columns come from cuda_timing.py, and an implementation that falls back counts as failed.

A benchmark file provides `cases(quick: bool) -> Iterable[Case]`, where it has GPU cases the same for those, ordered by
risk, and ends with `harness.main(__doc__, cases, cuda_cases)`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__:
    from . import cpu_timing, cuda_timing
else:
    import cpu_timing
    import cuda_timing

__all__ = ["Case", "Rates", "can_compile", "environment", "main", "measure"]

Outputs = Tensor | Sequence[Tensor]


@dataclass
class Case:
    """One computation: named variants that must all produce `expected`, and the work it cannot avoid.

    `variants` maps a name to a call without arguments that returns its output(s); "ours" is the one that ratios are
    quoted for. Each variant is called once and compared with `expected` by the relative Frobenius error, which must
    stay below `tolerance` (one number, or one for each name; infinity where a baseline is known to be inexact: its
    error is printed all the same). Where variants answer slightly different questions, `expected` maps their names to
    outputs; `read` turns what a call returns into tensors. `measures` are further columns, functions of the outputs
    such as the leak of a projector; the variants named in `limited` must keep their `limits`. `kept_bytes` of the peak
    memory are what a result must hold, such as the state of a collector; what is beyond them is shown apart.
    `flops` and `bytes_moved` give the floor at the rate named by `rate`. `slow` cases run only with --slow.
    """

    name: str
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
    slow: bool = False
    kept_bytes: dict[str, int] = field(default_factory=dict)

    def check(self, name: str) -> tuple[dict[str, float], float]:
        """Call a variant once: its error and measures, and CPU seconds. Raises `ValueError` where one is too large."""
        start = time.process_time()
        output = self.variants[name]()
        seconds = time.process_time() - start
        output = self.read(output)
        expected = self.expected[name] if isinstance(self.expected, dict) else self.expected
        allowed = {"error": self.tolerance[name] if isinstance(self.tolerance, dict) else self.tolerance}
        found = {"error": error(output, expected)} | {key: call(output) for key, call in self.measures.items()}
        if name in self.limited:
            allowed |= self.limits
        for key, most in allowed.items():
            if not found[key] <= most:
                raise ValueError(f"{self.name}: {name} is wrong, {key} {found[key]:.1e} > {most:.1e}; nothing timed")
        return found, seconds


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


def can_compile() -> bool:
    """Whether `torch.compile` can generate code here."""
    try:
        return bool(torch.compile(lambda x: x + 1)(torch.ones(2))[0] == 2)
    except Exception:  # any failure of a compiler toolchain means the same: leave that baseline out
        return False


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    clock = "process CPU seconds; wall seconds beside them"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "clock": clock if device == "cpu" else "CUDA events, L2 flushed",
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


def measure(case: Case, rates: Rates, *, device: str = "cpu", rounds: int = 7) -> dict[str, Any]:
    """Check the outputs, then time all variants in turns. Raises `ValueError` if an output is wrong.

    On a GPU a variant that is wrong or cannot run is reported as such and the others are timed: time there is scarce.
    """
    failed: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    first: dict[str, float] = {}
    for name in case.variants:
        try:
            found[name], first[name] = case.check(name)
        except Exception as problem:
            if device == "cpu":
                raise
            failed[name] = f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]
    variants = {name: case.variants[name] for name in found}
    columns = cuda_timing.times(variants) if device == "cuda" else cpu_timing.times(variants, first, rounds)
    floor = rates.floor(case)
    clock = "median_s" if device == "cuda" else "min_s"
    ours = columns["ours"][clock] if "ours" in columns else None
    rows = [
        {
            "variant": name,
            **columns[name],
            "kept_bytes": case.kept_bytes.get(name),
            "floor_percent": 100 * floor / columns[name][clock] if floor else None,
            "times_ours": columns[name][clock] / ours if ours else None,
            **found[name],
        }
        for name in variants
    ]
    rows += [{"variant": name, "failed": why} for name, why in failed.items()]
    work = {"flops": case.flops, "bytes": case.bytes_moved, "rate": case.rate}
    return {"case": case.name, "floor_s": floor or None, **work, "notes": case.notes, "rows": rows}


def _show(result: dict[str, Any]) -> None:
    floor = f", floor {_time(result['floor_s']).strip()}" if result["floor_s"] else ""
    lines = [f"\n{result['case']}{floor}"]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"  {row['variant']:<34} failed: {row['failed']}")
            continue
        percent = f"{row['floor_percent']:5.0f} %" if row["floor_percent"] is not None else "      -"
        ratio = f"{row['times_ours']:8.2f}x" if row["times_ours"] is not None else "       - "
        peak = f"  peak {row['peak_bytes'] / 2**20:6.1f} MB" if row["peak_bytes"] is not None else ""
        if row["kept_bytes"] and peak:
            peak += f", {(row['peak_bytes'] - row['kept_bytes']) / 2**20:5.1f} beyond its state"
        graph = f"  graph {_time(row['graph_s'])}" if row.get("graph_s") else ""
        more = "".join(f"  {key} {row[key]:.1e}" for key in row if key not in _COLUMNS and isinstance(row[key], float))
        lines.append(
            f"  {row['variant']:<34} min {_time(row['min_s'])}  median {_time(row['median_s'])}{graph}  of floor "
            f"{percent}  {ratio} ours{peak}  error {row['error']:.1e}{more}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


_COLUMNS = {"min_s", "median_s", "wall_min_s", "p20_s", "p80_s", "graph_s", "host_s"}
_COLUMNS |= {"floor_percent", "times_ours", "error"}


def _time(seconds: float) -> str:
    for unit, scale in (("s ", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:7.2f} {unit}"
    raise AssertionError("unreachable")


def main(
    description: str | None,
    cases: Callable[[bool], Iterable[Case]],
    cuda_cases: Callable[[bool], Iterable[Case]] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a benchmark file. With a GPU its GPU cases run, elsewhere those of the CPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: does it run, are outputs right")
    parser.add_argument("--slow", action="store_true", help="the cases that take minutes too")
    parser.add_argument("--json", type=Path, help="write all numbers and the environment to this file")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    device = _device(options.device, cuda_cases is not None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates = Rates(**(cuda_timing if device == "cuda" else cpu_timing).rates())
    kind = environment(device)
    shown = ", ".join(f"{key} {value:.1f}" for key, value in asdict(rates).items() if value)
    sys.stdout.write(f"{kind['device'] if device == 'cuda' else kind['cpu']}; {shown} G/s\n")
    results: list[dict[str, Any]] = []
    for case in (cuda_cases if device == "cuda" and cuda_cases else cases)(options.quick):
        if options.only not in case.name or (case.slow and not options.slow):
            continue
        results.append(measure(case, rates, device=device, rounds=3 if options.quick else 7))
        _show(results[-1])
        if options.json:  # after each case: a GPU session may end at any moment
            options.json.parent.mkdir(parents=True, exist_ok=True)
            report = {"environment": kind, "rates": asdict(rates), "results": results}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _device(wanted: str, has_cuda_cases: bool) -> str:
    device = wanted
    if wanted == "auto":
        device = "cuda" if has_cuda_cases and torch.cuda.is_available() else "cpu"
    if device == "cuda":
        os.environ["CL_KERNELS_STRICT"] = "1"  # a fallback timed as if it were the kernel would be a lie
    return device
