"""Every room's benchmarks behind one command: which cases, in which processes, for how long, and what is made of them.

`cl-kernels bench`, `benchmarks/run_all.py` and each `benchmarks/bench_*.py` end here. A room is a file bench_<room>.py.
On the CPU every room is measured twice, in two processes minutes apart, and the blocks of both make its numbers, as
spread.py says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from cl_kernels.benchmarks import comparison, cpu_timing, harness, options, records, spread
from cl_kernels.benchmarks.options import Options, nearest
from cl_kernels.benchmarks.selection import (
    PACKAGE,
    SHAPES,
    device_of,
    listing,
    module_of,
    refuse_nothing,
    room_of,
    rooms,
    selected,
    table,
)

__all__ = ["SHAPES", "command", "device_of", "module_of", "room_of", "rooms", "run_pass", "selected", "table"]

#: Seconds of a pass over the table of a room, measured on one core of an EPYC with AVX-512, its process's start (3 s)
#: included; only their ratios count, and the second pass knows better.
PASS_S: Final = {
    "weight_projection": 56.0,
    "null_space": 38.0,
    "covariance": 32.0,
    "distillation": 28.0,
    "projection": 28.0,
    "prefix_attention": 22.0,
    "lora_stack": 21.0,
    "statistics": 20.0,
    "kdp_schedule": 19.0,
    "orthogonal_qr": 15.0,
    "optim": 12.0,
    "import": 11.0,
}
CASE_S: Final = 2.5  # of a room that is not there
GRACE_S: Final = 120.0  # a case that is under way when a process's time is up may last so long
PART_OF_BUDGET: Final = 0.45  # of a case's share of the time for its timing; the rest builds and checks it
PLANNED: Final = 0.88  # of the time; a room that overruns its share must not take the last one's cases


def run_pass(
    room: str, given: Options, device: str, *, say: Callable[[str], object], save: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """One room in this process. `say` is handed each result's lines, `save` the report after each case."""
    start = time.monotonic()
    threads, strict = torch.get_num_threads(), os.environ.get("CL_KERNELS_STRICT")
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ["CL_KERNELS_STRICT"] = "1"  # a fallback timed as if it were the kernel would be a lie
    report = empty_report(given, device)
    try:
        rates = harness.measure_rates(device)
        report["rates"][room] = asdict(rates)
        plans = selected(room, given, device)
        for index, plan in enumerate(plans):
            spent = time.monotonic() - start
            if given.limit - spent < 1.0:
                report["not_run"][f"{room}: {plan.name}"] = "not run: the time was up"
                continue
            left = min(given.share, given.limit) - spent
            budget = min(given.case_budget, max(0.2, PART_OF_BUDGET * left / (len(plans) - index)))
            try:
                found = harness.measure(plan, rates, device=device, budget_s=budget, peaks=given.peaks)
            except (ImportError, harness.NotHereError) as problem:
                report["not_run"][f"{room}: {plan.name}"] = f"not run: {problem}".partition("\n")[0]
                continue
            report["results"].append({"room": room, **found})
            done = f"  {room}: {plan.name}: {found['seconds']:.1f} s\n"
            say(done if given.progress else records.shown(found))
            save(report)
    finally:
        torch.set_num_threads(threads)
        if strict is None:
            os.environ.pop("CL_KERNELS_STRICT", None)
        else:
            os.environ["CL_KERNELS_STRICT"] = strict
    save(report)
    return report


def empty_report(given: Options, device: str) -> dict[str, Any]:
    environment = records.environment(device) | {"threads": 1}
    settings = {"quick": given.quick, "all": given.all, "passes": given.passes, "block_minima_of": cpu_timing.SLICES}
    return {
        "schema": records.SCHEMA,
        "environment": environment,
        "settings": settings,
        "rates": {},
        "results": [],
        "not_run": {},
    }


def run(given: Options) -> dict[str, Any]:
    """All rooms asked for, in one pass or several; the report, saved after each step."""
    device = device_of(given.device)
    wanted = {room: selected(room, given, device) for room in given.rooms or rooms()}
    refuse_nothing(wanted, given, device)
    wanted = {room: plans for room, plans in wanted.items() if plans}
    if not given.progress:
        _say((torch.cuda.get_device_name() if device == "cuda" else records.CPU_ONLY) + "\n")
    report = empty_report(given, device)

    def save(found: dict[str, Any]) -> None:
        if given.json:
            records.write(given.json, found)

    if given.passes == 1 and (given.quick or len(wanted) == 1):
        for room in wanted:
            before = report
            now = run_pass(room, given, device, say=_say, save=lambda part, before=before: save(_joined(before, part)))
            report = _joined(before, now)
        return report
    end = time.monotonic() + given.limit
    costs = {room: PASS_S.get(room, CASE_S * (len(plans) + 1)) for room, plans in wanted.items()}
    passes: list[list[dict[str, Any]]] = [[] for _ in range(given.passes)]
    for index in range(given.passes):
        for place, room in enumerate(wanted):
            start = time.monotonic()
            coming = sum(list(costs.values())[place:]) + (given.passes - index - 1) * sum(costs.values())
            share = PLANNED * (end - start) * costs[room] / coming
            limit = max(5.0, min(2.0 * share + 10.0, end - start))
            names = [plan.name for plan in wanted[room]]
            found = _process(room, names, given, share, limit, first=index == 0)
            costs[room] = time.monotonic() - start
            report["rates"][room] = report["rates"].get(room) or found["rates"].get(room)
            lost = found["not_run"].items()
            report["not_run"] |= {name: why for name, why in lost if index == 0 or why.startswith("failed")}
            passes[index] += found["results"]
            made = [one for one in passes if one]
            report["results"] = spread.merged(made) if made else []
            for name in comparison.cases(report):  # one that only a later pass came to has its time
                if not report["not_run"].get(name, "failed").startswith("failed"):
                    del report["not_run"][name]
            save(report)
    for result in report["results"]:
        _say(records.shown(result))
    return report


def _joined(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return {
        **whole,
        "rates": whole["rates"] | part["rates"],
        "results": whole["results"] + part["results"],
        "not_run": whole["not_run"] | part["not_run"],
    }


def _process(
    room: str, names: Sequence[str], given: Options, share: float, limit: float, *, first: bool
) -> dict[str, Any]:
    """One pass over a room in a process of its own: its report, in which every case of `names` has results or a reason.

    `share`: seconds it should take, `limit`: after which it starts no further case.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pass.json"
        asked = [room, "--passes", "1", "--json", str(path), "--budget", f"{limit:.0f}s", *given.words()]
        asked += ["--share", f"{share:.1f}"]
        asked += ["--progress", *([] if first else ["--no-peaks"])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, "-P", "-m", f"{PACKAGE}.suite", *asked]
        try:
            code = subprocess.run(words, env=environment, check=False, timeout=limit + GRACE_S).returncode
            ended = f"failed: its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"failed: its process was ended after {limit + GRACE_S:.0f} s"
        found = json.loads(path.read_text()) if path.exists() else {"rates": {}, "results": [], "not_run": {}}
        there = comparison.cases(found) | set(found["not_run"])
        found["not_run"] |= {case: ended for case in (f"{room}: {name}" for name in names) if case not in there}
    return dict(found)


def command(words: Sequence[str], program: str = "bench") -> int:
    """Run one command line: 0 fine, 1 wrong or slower than allowed. Raises `ValueError` for one that asks nonsense."""
    given = options.parse(words, program)
    for room in given.rooms:
        module_of(room)
    if given.shape and not given.sizes and given.shape not in SHAPES:
        raise ValueError(f"--shape: unknown {given.shape!r}{nearest(given.shape, SHAPES)}, or sizes such as 25216x768")
    if given.list:
        _say(listing(given))
        return 0
    if given.sweep or given.end_to_end:
        from cl_kernels.benchmarks import end_to_end, sweeps

        return (sweeps if given.sweep else end_to_end).command(given, device_of(given.device))
    old = _read_old(given)
    report = run(given)
    if given.json:
        records.write(given.json, report)
    if given.out:
        _write_rooms(given.out, report)
    return _verdict(report, old, given)


def _read_old(given: Options) -> dict[str, Any] | None:
    """The report to compare with, refused before anything is measured where its machine is another one."""
    if given.compare is None:
        return None
    comparison.threshold(given.fail_above or "5%")  # a wrong one is told now, not after ten minutes
    old = records.read(given.compare)
    now = records.environment(device_of(given.device)) | {"threads": 1}
    if other := comparison.differences(old["environment"], now):
        raise ValueError(f"--compare {given.compare}: taken on another machine: {'; '.join(other)}")
    return old


def _write_rooms(folder: Path, report: dict[str, Any]) -> None:
    """A file for each room, and all of them as a table."""
    for room in dict.fromkeys(result["room"] for result in report["results"]):
        results = [result for result in report["results"] if result["room"] == room]
        part = {**report, "rates": {room: report["rates"].get(room)}, "results": results}
        records.write(folder / f"{room}.json", part)
    (folder / "table.md").write_text(records.markdown(report), encoding="utf-8")


def _verdict(report: dict[str, Any], old: dict[str, Any] | None, given: Options) -> int:
    wrong = [
        f"{result['room']}: {result['case']}: {row['failed']}"
        for result in report["results"]
        for row in result["rows"]
        if row["variant"].startswith("ours") and "failed" in row
    ]
    broken = [f"{name}: {why}" for name, why in report["not_run"].items() if why.startswith("failed")]
    for line in [*wrong, *broken]:
        _say(f"WRONG: {line}\n")
    for name, why in report["not_run"].items():
        _say(f"{name}: {why}\n")
    slower = False
    if old is not None:
        found = comparison.changes(old, report, comparison.threshold(given.fail_above or "5%"))
        _say(comparison.shown(found, old, report))
        missing = [name for name in report["not_run"] if name in comparison.cases(old)]
        if given.fail_above is not None and missing:
            _say(f"{len(missing)} cases of the old report gave no time, so may be slower, such as {missing[0]}\n")
        slower = given.fail_above is not None and (bool(missing) or any(change.slower for change in found))
    return 1 if wrong or broken or slower else 0


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
