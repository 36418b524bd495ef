"""What a run of the benchmarks leaves behind: one JSON object, and the lines and tables made from it.

`{"schema": SCHEMA, "environment", "settings", "rates": {room: rates}, "results": [{"room", "case", "dtype", "device",
"floor_s", "flops", "bytes", "rate", "notes", "rows"}]}`. A row of `rows` is a variant: times of a call in seconds
("median_s", "p25_s", "p75_s", "min_s", its relative "spread", its "blocks" pass by pass), "error" against the expected
output, "times_ours", "floor_percent", "peak_bytes"; or "failed", why there are none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

import cl_kernels
from cl_kernels.ops import _native

__all__ = ["SCHEMA", "environment", "markdown", "read", "shown", "unit", "write"]

SCHEMA: Final = "cl_kernels.bench/2"
NEEDED: Final = {"room", "case", "device", "rows"}
MACHINE: Final = ("device", "cpu", "threads", "torch")
CPU_ONLY: Final = "no GPU here: CPU cases, which say nothing about a GPU"
_COLUMNS: Final = {"times_ours", "floor_percent", "error", "spread"}


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the numbers: machine, versions, commit, clock."""
    clock = "process CPU seconds of one thread; wall seconds beside them"
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cl_kernels": cl_kernels.__version__,
        "native": _native.load() is not None,
        "backend": os.environ.get("CL_KERNELS_BACKEND", "auto"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "clock": clock if device == "cpu" else "CUDA events, inputs not in L2",
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm"
        found["driver and SM clock"] = _output("nvidia-smi", query, "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """Of the checkout that this file is part of, a + where files differ from it; the version once installed."""
    here = Path(__file__).resolve()
    if not _output("git", "ls-files", "--error-unmatch", here.name):
        return f"version {cl_kernels.__version__}"
    return _output("git", "rev-parse", "--short", "HEAD") + (
        "+" if _output("git", "status", "--porcelain", "-uno") else ""
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in pairs}
    return f"{found.get('model name', '?')}, family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def _output(*command: str) -> str:
    """What a command prints in this folder; nothing where it fails or is not there."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the file whole: a session may end at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.part")
    waiting.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    waiting.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A report from its file. Raises `ValueError`, naming file and fault, for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: no JSON: {problem}") from problem
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise ValueError(f"{path}: expected a report of {SCHEMA}, got {found!r}; take it again with this version")
    for problem in faults(report):
        raise ValueError(f"{path}: {problem}")
    known: dict[str, Any] = report
    return known


def faults(report: dict[str, Any]) -> Iterator[str]:
    """What a report lacks."""
    for name, kind in (("environment", dict), ("settings", dict), ("rates", dict), ("results", list)):
        if not isinstance(report.get(name), kind):
            yield f"{name}: expected a {kind.__name__}, got {type(report.get(name)).__name__}"
            return
    for name in MACHINE:
        if name not in report["environment"]:
            yield f"environment: {name} is missing"
    for index, result in enumerate(report["results"]):
        if missing := NEEDED - set(result):
            yield f"results[{index}]: {', '.join(sorted(missing))} is missing"
            continue
        for row in result["rows"]:
            if "variant" not in row or not ("failed" in row or {"median_s", "spread", "error"} <= set(row)):
                yield f"results[{index}] ({result['case']}): a row has neither times nor a reason why it has none"


def unit(seconds: float) -> str:
    """Three digits and a unit."""
    for name, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {name}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {name}"
    return f"{seconds * 1e6:.3g} us"


def shown(result: dict[str, Any]) -> str:
    """A case for the terminal: a line for each variant."""
    floor = f", floor {unit(result['floor_s'])}" if result["floor_s"] else ""
    lines = [f"\n{result['case']}{floor}"]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"  {row['variant']:<34} no time: {row['failed']}")
            continue
        percent = f"{row['floor_percent']:5.0f} %" if row["floor_percent"] is not None else "      -"
        ratio = f"{row['times_ours']:8.2f}x" if row["times_ours"] is not None else "       - "
        peak = f"  peak {row['peak_bytes'] / 2**20:.1f} MB" if row.get("peak_bytes") is not None else ""
        if row.get("kept_bytes") and peak:
            peak += f", {(row['peak_bytes'] - row['kept_bytes']) / 2**20:.1f} beyond its state"
        graph = f"  graph {unit(row['graph_s'])}" if row.get("graph_s") else ""
        more = "".join(f"  {key} {row[key]:.1e}" for key in measures(row))
        more += "  (yardstick)" if row.get("yardstick") else ""
        lines.append(
            f"  {row['variant']:<34} {unit(row['median_s']):>8} ±{100 * row['spread']:3.0f} %{graph}  of floor "
            f"{percent}  {ratio} ours{peak}  error {row['error']:.1e}{more}"
        )
    return "\n".join(lines) + "\n"


def measures(row: dict[str, Any]) -> list[str]:
    """The names of a row's columns that only its case has."""
    numbers = [key for key, value in row.items() if isinstance(value, float) and not key.endswith("_s")]
    return [key for key in numbers if key not in _COLUMNS]


def markdown(report: dict[str, Any]) -> str:
    """All cases as one table a room, with what they belong to."""
    machine = report["environment"]
    what = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    lines = [
        f"{what}, {machine['threads']} thread, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}. {machine['clock']}; passes: {report['settings'].get('passes', 1)}. ± is the spread: a "
        "repetition should lie within the spreads of both.",
    ]
    if machine["device"] == "cpu":
        lines.append("\n" + CPU_ONLY[0].upper() + CPU_ONLY[1:] + ".")
    for room in dict.fromkeys(result["room"] for result in report["results"]):
        lines += ["", f"### {room}", "", "| case | variant | time | of floor | times ours | error |"]
        lines.append("|---|---|---:|---:|---:|---:|")
        lines += _table([result for result in report["results"] if result["room"] == room])
    for room, why in report.get("not_run", {}).items():
        lines += ["", f"{room}: {why}"]
    return "\n".join(lines) + "\n"


def _table(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        for index, row in enumerate(result["rows"]):
            name = result["case"] if index == 0 else ""
            if "failed" in row:
                yield f"| {name} | {row['variant']} | no time: {row['failed']} | | | |"
                continue
            floor = f"{row['floor_percent']:.0f} %" if row["floor_percent"] is not None else ""
            ratio = f"{row['times_ours']:.3g}" if row["times_ours"] is not None else ""
            ratio = f"yardstick, {ratio}" if row.get("yardstick") else ratio
            time = f"{unit(row['median_s'])} ± {100 * row['spread']:.0f} %"
            yield f"| {name} | {row['variant']} | {time} | {floor} | {ratio} | {row['error']:.0e} |"
