"""Scaling curves: what a call costs against width, rows, layers, tasks, prompts, classes and parameters.

`cl-kernels bench --sweep [ROOM ...] --out DIR` measures each curve's points as cases (outputs checked first), writes
DIR/sweeps.json and DIR/figures/*.png, and prints how the cost of ours grows between the last two points.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from cl_kernels.benchmarks import (
    bench_covariance,
    bench_distillation,
    bench_lora_stack,
    bench_null_space,
    bench_orthogonal_qr,
    bench_prefix_attention,
    bench_projection,
    bench_weight_projection,
    figures,
    harness,
    records,
    suite,
)
from cl_kernels.benchmarks.options import Options

__all__ = ["SWEEPS", "Sweep", "command", "growth"]

F32: Final = torch.float32
POINT_S: Final = 0.8  # seconds of timing for a point


@dataclass(frozen=True)
class Sweep:
    """A curve: what grows, over which values, and the case at each."""

    room: str
    axis: str
    values: tuple[int, ...]
    at: Callable[[int, str], harness.Plan]

    @property
    def name(self) -> str:
        return f"{self.room} against {self.axis}"


def _rows(n: int, device: str) -> harness.Plan:
    builder = bench_covariance.on_gpu if device == "cuda" else bench_covariance.one_layer
    return builder(n, 384, F32)


def _width(d: int, device: str) -> harness.Plan:
    builder = bench_covariance.on_gpu if device == "cuda" else bench_covariance.one_layer
    return builder(3152, d, F32)


def _prefix(prompts: int, device: str) -> harness.Plan:
    sizes = bench_prefix_attention.Sizes(8, 6, 197, 197, prompts)
    return bench_prefix_attention.attention(sizes, bench_prefix_attention.PREFIX, device)


def _blocks(blocks: int, device: str) -> harness.Plan:
    return bench_weight_projection.step_case(f"{blocks} blocks of width 256", 0.3, device)


SWEEPS: Final = (
    Sweep("covariance", "rows", (197, 788, 3152, 12608), _rows),
    Sweep("covariance", "width", (96, 192, 384, 768, 1536), _width),
    Sweep(
        "null_space",
        "width",
        (48, 96, 192, 384),
        lambda d, device: bench_null_space.projectors(4, d, device=device, brief=True),
    ),
    Sweep(
        "projection",
        "layers",
        (1, 3, 6, 12, 24),
        lambda layers, device: bench_projection.prompt_case(layers, 4, 768, 64, device),
    ),
    Sweep(
        "projection",
        "rank",
        (16, 64, 256, 512),
        lambda rank, device: bench_projection.prompt_case(12, 4, 768, rank, device),
    ),
    Sweep("weight_projection", "blocks", (1, 2, 4, 8, 16), _blocks),
    Sweep("lora_stack", "tasks", (1, 2, 5, 10, 20), lambda tasks, device: bench_lora_stack.layers(tasks, 1, device)),
    Sweep(
        "orthogonal_qr", "earlier tasks", (1, 3, 9, 19), lambda n, device: bench_orthogonal_qr.penalty(n, 16, device)
    ),
    Sweep("prefix_attention", "prompts", (4, 16, 64, 256), _prefix),
    Sweep(
        "distillation",
        "classes",
        (20, 100, 1000, 10000),
        lambda n, device: bench_distillation.two_heads(256, n, F32, device, False),
    ),
)


def growth(x: Sequence[float], seconds: Sequence[float | None]) -> float | None:
    """The exponent p of cost ~ x^p between the last two points; None where one of them is missing."""
    if len(x) < 2 or not seconds[-1] or not seconds[-2]:
        return None
    return math.log(seconds[-1] / seconds[-2]) / math.log(x[-1] / x[-2])


def measured(sweep: Sweep, rates: harness.Rates, device: str, *, quick: bool) -> dict[str, Any]:
    """All points of a curve; with `quick` the two smallest."""
    values = sweep.values[:2] if quick else sweep.values
    found = []
    for value in values:
        budget = 0.05 if quick else POINT_S
        result = harness.measure(sweep.at(value, device), rates, device=device, budget_s=budget, peaks=False)
        found.append({"room": sweep.room, **result})
    names = list(dict.fromkeys(row["variant"] for one in found for row in one["rows"] if not row.get("yardstick")))
    lines = {name: [_median(one, name) for one in found] for name in names}
    lines = {name: seconds for name, seconds in lines.items() if any(seconds)}
    exponents = {name: growth(values, seconds) for name, seconds in lines.items()}
    return {
        "name": sweep.name, "room": sweep.room, "axis": sweep.axis, "values": list(values), "seconds": lines,
        "floor_s": [one["floor_s"] for one in found], "growth": exponents, "results": found,
    }  # fmt: skip


def _median(result: dict[str, Any], variant: str) -> float | None:
    return next((row.get("median_s") for row in result["rows"] if row["variant"] == variant), None)


def command(given: Options, device: str) -> int:
    """Measure the curves of the rooms named, or all. Raises `ValueError` for a room that has none."""
    there = sorted({sweep.room for sweep in SWEEPS})
    for room in given.rooms:
        if room not in there:
            raise ValueError(f"--sweep: {room} has no curve; known are {', '.join(there)}")
    out = given.out or Path("bench-out")
    report = suite.empty_report(given, device) | {"sweeps": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wrong = False
    try:
        rates = harness.measure_rates(device)
        report["rates"]["sweeps"] = asdict(rates)
        for sweep in SWEEPS:
            if given.rooms and sweep.room not in given.rooms:
                continue
            try:
                curve = measured(sweep, rates, device, quick=given.quick)
            except (ImportError, harness.NotHereError) as problem:
                report["not_run"][sweep.name] = f"not run: {problem}".partition("\n")[0]
                continue
            report["results"] += curve.pop("results")
            report["sweeps"].append(curve)
            wrong = wrong or "ours" not in curve["seconds"]
            records.write(out / "sweeps.json", report)
            sys.stdout.write(shown(curve))
            sys.stdout.flush()
            if figures.available():
                path = out / "figures" / f"{sweep.name.replace(' ', '-')}.png"
                figures.curves(path, curve["name"], curve["axis"], curve["values"], curve["seconds"], curve["floor_s"])
    finally:
        torch.set_num_threads(threads)
    drawn = f"figures in {out / 'figures'}" if figures.available() else "no figures: matplotlib is not installed"
    sys.stdout.write(f"numbers in {out / 'sweeps.json'}; {drawn}\n")
    return 1 if wrong else 0


def shown(curve: dict[str, Any]) -> str:
    """A line a variant: the times at each value, and how they grow at the end."""
    lines = [f"\n{curve['name']}: {', '.join(map(str, curve['values']))}"]
    for name, seconds in curve["seconds"].items():
        times = "  ".join(f"{records.unit(one):>8}" if one else "       -" for one in seconds)
        power = curve["growth"][name]
        lines.append(f"  {name:<34} {times}" + (f"  grows as {curve['axis']}^{power:.1f}" if power is not None else ""))
    return "\n".join(lines) + "\n"
