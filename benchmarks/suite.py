"""Every room's benchmarks behind one command: which cases, in which processes, for how long, and what is made of them.

`cl-kernels bench`, `benchmarks/run_all.py` and each `benchmarks/bench_*.py` end here. A room is a file bench_<room>.py.
On the CPU every room is measured twice, in two processes minutes apart, and the blocks of both make its numbers, as
spread.py says why.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from cl_kernels.benchmarks import comparison, cpu_timing, harness, options, records, spread
from cl_kernels.benchmarks.options import Options, nearest

from cl_kernels.errors import BackendUnavailableError

__all__ = ["SHAPES", "command", "device_of", "room_of", "rooms", "run_pass", "selected"]

HERE: Final = Path(__file__).resolve().parent
PACKAGE: Final = "cl_kernels.benchmarks"
#: Name -> what the name of a case of this model holds: the model's name or a width of its layers.
SHAPES: Final = {
    "vit-b16": r"ViT-B|(?<!\d)(768|3072)(?!\d)",
    "vit-l16": r"ViT-L|(?<!\d)(1024|4096)(?!\d)",
    "vit-s16": r"ViT-S|(?<!\d)(384|1536)(?!\d)",
    "resnet50": r"ResNet-50",
    "embedded": r"embedded|(?<!\d)128(?!\d)",
}
#: Seconds of a pass over the table of a room that takes more than `CASE_S` a case; the second pass knows better.
PASS_S: Final = {
    "weight_projection": 58.0,
    "null_space": 40.0,
    "covariance": 20.0,
    "kdp_schedule": 16.0,
    "prefix_attention": 16.0,
    "lora_stack": 14.0,
}
CASE_S: Final = 2.5
PART_OF_BUDGET: Final = 0.6  # of a case's share of the time for its timing; the rest builds and checks it


def rooms() -> list[str]:
    return sorted(room_of(path.name) for path in HERE.glob("bench_*.py"))


def room_of(file: str) -> str:
    return Path(file).stem.removeprefix("bench_")


def module_of(room: str) -> ModuleType:
    if room not in rooms():
        raise ValueError(f"unknown room {room!r}{nearest(room, rooms())}")
    return importlib.import_module(f"{PACKAGE}.bench_{room}")


def device_of(wanted: str) -> str:
    """cpu or cuda. Raises `BackendUnavailableError` for a GPU that is not there."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BackendUnavailableError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    return "cuda" if there and wanted != "cpu" else "cpu"


def selected(room: str, given: Options, device: str) -> list[harness.Plan]:
    """The plans of a room that the options ask for; possibly none. Nothing is built.

    Filters look through the table's cases first, and through all where the table has none.
    """
    module = module_of(room)
    if given.sizes:
        custom: Callable[..., Iterable[harness.Plan]] | None = getattr(module, "custom", None)
        return list(custom(given.sizes, given.dtype, device)) if custom else []
    cases = getattr(module, "cuda_cases", None) if device == "cuda" else module.cases
    if cases is None:
        return []
    every = [plan for plan in cases(given.quick) if given.slow or not plan.slow]
    chosen = every if given.quick or given.all or device == "cuda" else table(module, every)
    return _matching(room, chosen, given) or _matching(room, every, given)


def table(module: ModuleType, plans: Sequence[harness.Plan]) -> list[harness.Plan]:
    """The cases that `make bench` takes: those whose names begin as the room's TABLE says."""
    return [plan for plan in plans if plan.name.startswith(tuple(module.TABLE))]


def _matching(room: str, plans: Sequence[harness.Plan], given: Options) -> list[harness.Plan]:
    default = getattr(module_of(room), "SHAPE", "")
    return [
        plan
        for plan in plans
        if given.only in plan.name
        and given.dtype in (None, plan.dtype)
        and (not given.shape or (re.search(SHAPES[given.shape], plan.name) or given.shape == default))
    ]


def run_pass(
    room: str, given: Options, device: str, *, say: Callable[[str], object], save: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """One room in this process. `say` is handed each result's lines, `save` the report after each case."""
    end = time.monotonic() + given.limit
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
            left = end - time.monotonic()
            if left < 1.0:
                report["not_run"][f"{room}: {plan.name}"] = "not run: the time was up"
                continue
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
    _refuse_nothing(wanted, given, device)
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
            found = _process(room, given, max(5.0, (end - start) * costs[room] / coming), first=index == 0)
            costs[room] = time.monotonic() - start
            report["rates"].setdefault(room, found["rates"].get(room))
            report["not_run"] |= {name: why for name, why in found["not_run"].items() if index == 0}
            passes[index] += found["results"]
            report["results"] = spread.merged([one for one in passes if one])
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


def _process(room: str, given: Options, limit: float, *, first: bool) -> dict[str, Any]:
    """One pass over a room in a process of its own: its report, or one that says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pass.json"
        asked = [room, "--passes", "1", "--json", str(path), "--budget", f"{limit:.0f}s", *given.words()]
        asked += ["--progress", *([] if first else ["--no-peaks"])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"{PACKAGE}.suite", *asked], env=environment, check=False,
        )  # fmt: skip
        found = json.loads(path.read_text()) if path.exists() else {"rates": {}, "results": [], "not_run": {}}
        if not found["results"] and not found["not_run"]:
            found["not_run"][room] = f"failed with exit code {done.returncode}"
    return dict(found)


def _refuse_nothing(wanted: dict[str, list[harness.Plan]], given: Options, device: str) -> None:
    """Raise `ValueError` where what was asked for has no case, with what there is."""
    if any(wanted.values()):
        return
    room = given.rooms[0] if len(given.rooms) == 1 else "no room"
    if given.sizes:
        able = [name for name in rooms() if hasattr(module_of(name), "custom")]
        raise ValueError(f"--shape {given.shape}: {room} takes no sizes; known are {', '.join(able)}")
    there = sorted(name for name in SHAPES if any(_shape_cases(one, name, given, device) for one in wanted))
    what = " ".join(given.words())
    raise ValueError(f"{room} has no case for {what or device}; shapes there: {', '.join(there) or 'none'}")


def _shape_cases(room: str, shape: str, given: Options, device: str) -> list[harness.Plan]:
    return selected(room, Options(rooms=(room,), shape=shape, all=True, quick=given.quick), device)


def listing(given: Options) -> str:
    """Rooms and cases; a star before those of the table."""
    device = device_of(given.device)
    lines = [records.CPU_ONLY if device == "cpu" else torch.cuda.get_device_name()]
    for room in given.rooms or rooms():
        every = selected(room, Options(rooms=(room,), all=True, slow=True), device)
        stars = {plan.name for plan in table(module_of(room), every)}
        shown = [plan for plan in selected(room, given, device) if given.shape or given.only or given.dtype] or every
        lines.append(f"{room}:")
        lines += [f"  {'*' if plan.name in stars else ' '} {plan.name}{' (slow)' * plan.slow}" for plan in shown]
    return "\n".join([*lines, f"shapes: {', '.join(SHAPES)}, or sizes such as 25216x768", ""])


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
        if row["variant"] == "ours" and "failed" in row
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
        slower = given.fail_above is not None and any(change.slower for change in found)
    return 1 if wrong or broken or slower else 0


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
