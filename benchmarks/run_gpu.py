"""Everything that needs a GPU, offline, at most ten minutes a call: build, tests, sanitizer, resources, benchmarks.

    python benchmarks/run_gpu.py --out DIR [--part 2/3]            (make gpu OUT=DIR PART=2/3)

The work is cut into units: a test file, a sanitizer's tool on one file, a room's benchmark. DIR/report.json holds what
came of each, after each; a unit that is done at this commit on this device is not done again, so the same command goes
on where time ran out, and DIR may be carried from machine to machine. --part 2/3 does the second third, --part
resources (or build, tests, sanitizer, benchmarks) the units of that kind. DIR/table.md is the same for people, with the
rows for benchmarks/results/README.md. The package is built without isolation and put into build/gpu-site, so that no
environment is changed. Without a GPU only resources can be had: all else says so and ends with exit code 3; --anyway
goes through the units all the same, to try this program itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_report
import sanitize

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
STAMP = "built-from.txt"
BUDGET_S = 580.0
NO_GPU, BAD_USAGE = 3, 2
KINDS = ("build", "tests", "sanitizer", "resources", "benchmarks")

DEVICE = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name() if there else None,
    "capability": list(torch.cuda.get_device_capability()) if there else None, "count": torch.cuda.device_count(),
}))
"""


@dataclass(frozen=True)
class Unit:
    """One thing to do: its command, which exit codes are fine, and how long it takes on an H200, guessed."""

    kind: str
    name: str
    command: tuple[str, ...]
    seconds: float
    fine: tuple[int, ...] = (0,)

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}" if self.name else self.kind

    @property
    def log(self) -> str:
        return re.sub(r"\W+", "-", self.key) + ".log"


def say(text: str) -> None:
    print(f"gpu: {text}", flush=True)


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def units(out: Path) -> list[Unit]:
    """All of them, ordered by risk: what would make everything after it worthless comes first."""
    python = (sys.executable, "-P")  # the package that was just built, not the folder it was built from
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index")
    found = [Unit("build", "", (*pip, "--target", str(SITE), str(ROOT)), 60)]
    pytest = (*python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu")
    files = sanitize.gpu_test_files()
    found += [Unit("tests", Path(file).name, (*pytest, file), 20, (0, 5)) for file in files]
    checks = [(tool, file) for tool in sanitize.TOOLS for file in files]
    watched = [
        Unit(
            "sanitizer",
            f"{tool} {Path(file).name}",
            (*python, str(ROOT / "benchmarks" / "sanitize.py"), tool, file),
            15,
        )
        for tool, file in checks
    ]
    found += watched[: len(files)]  # memcheck
    for room in rooms():
        words = (room, "--passes", "1", "--json", str(out / "bench" / f"{room}.json"))
        found.append(Unit("benchmarks", room, (*python, "-m", "cl_kernels.benchmarks.suite", *words), 35))
    found += watched[len(files) :]
    resources = str(ROOT / "benchmarks" / "resources.py")
    return [*found, Unit("resources", "", (sys.executable, resources, "--json", str(out / "resources.json")), 60)]


def rooms() -> list[str]:
    """Those with cases for a GPU."""
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    return [path.stem.removeprefix("bench_") for path in files if "def cuda_cases" in path.read_text()]


def chosen(every: Sequence[Unit], part: str) -> list[Unit]:
    """The units of a part: a kind, or k/n of all by their time. Raises `ValueError` for anything else."""
    if part in KINDS:
        return [unit for unit in every if unit.kind == part]
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part: expected k/n such as 2/3, or one of {', '.join(KINDS)}; got {part!r}")
    k, n = int(found[1]), int(found[2])
    rest = [unit for unit in every if unit.kind != "build"]
    whole, passed, wanted = sum(unit.seconds for unit in rest), 0.0, []
    for unit in rest:
        if min(n, 1 + int(n * passed / whole)) == k:
            wanted.append(unit)
        passed += unit.seconds
    return wanted


def do(unit: Unit, out: Path, left: float) -> dict[str, Any]:
    """Run a unit into its own log; say and return how it went."""
    start, log = time.monotonic(), out / "logs" / unit.log
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{unit.key}: {' '.join(unit.command)}")
    if unit.kind == "build":
        shutil.rmtree(SITE, ignore_errors=True)
    with log.open("w") as file:
        try:
            done = subprocess.run(
                unit.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False
            )
            status = "done" if done.returncode in unit.fine else f"failed with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {left:.0f} s"
    tail = log.read_text(errors="replace").strip().splitlines()[-12:]
    print("\n".join(f"     {line}" for line in tail), flush=True)
    say(f"{unit.key}: {status}, {time.monotonic() - start:.0f} s")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def built_from() -> str | None:
    """The commit that build/gpu-site was built from: DIR may come from another machine."""
    stamp = SITE / STAMP
    return stamp.read_text() if stamp.exists() else None


def describe(device: dict[str, Any]) -> dict[str, Any]:
    """Commit, date, device, driver: what the numbers belong to."""
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or None,
        "changed": bool(output_of("git", "status", "--porcelain", "-uno")),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **device,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
    }


def resumed(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with: the one that is there if it is of this commit and device, else a new one."""
    if path.exists():
        old: dict[str, Any] = json.loads(path.read_text())
        same = all(old.get(name) == now[name] for name in ("commit", "device", "torch"))
        if same and not now["changed"] and not old.get("changed"):
            return {**now, "units": old["units"]}
        say(f"{path} is of commit {old.get('commit')} on {old.get('device')}, or of changed files: starting anew")
        path.replace(path.with_name("report-before.json"))
    return now | {"units": {}}


def run(wanted: Sequence[Unit], out: Path, device: dict[str, Any]) -> dict[str, Any]:
    """What is not done yet, each within what is left of the ten minutes; report and table are on disk after each."""
    end = time.monotonic() + BUDGET_S
    report = resumed(out / "report.json", describe(device))
    os.environ["PYTHONPATH"] = str(SITE)
    build = next(unit for unit in units(out) if unit.kind == "build")
    needs_build = any(unit.kind not in ("build", "resources") for unit in wanted)
    for unit in [build, *wanted] if needs_build and build not in wanted else wanted:
        before = report["units"].get(unit.key, {}).get("status")
        if before == "done" and not (unit.kind == "build" and built_from() != report["commit"]):
            say(f"{unit.key}: done before")
            continue
        left = end - time.monotonic()
        if left < 10:
            report["units"].setdefault(unit.key, {"status": "not run: the time was up"})
            continue
        report["units"][unit.key] = do(unit, out, left)
        gpu_report.write(out, report)
        if unit.kind == "build":
            if report["units"][unit.key]["status"] != "done":
                break
            (SITE / STAMP).write_text(str(report["commit"]))
    gpu_report.write(out, report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--part", default="1/1", help="k/n, or a kind of units")
    parser.add_argument("--anyway", action="store_true", help="go through the units without a GPU too")
    options = parser.parse_args()
    out = options.out.resolve()
    try:
        wanted = chosen(units(out), options.part)
    except ValueError as error:
        say(str(error))
        return BAD_USAGE
    text = output_of(sys.executable, "-c", DEVICE)
    if not text:
        say(f"{sys.executable} has no torch that imports; name one that has: make gpu PYTHON=/path/to/python")
        return NO_GPU
    device = json.loads(text)
    if device["device"] is None and not options.anyway and options.part != "resources":
        say(f"no GPU here: torch {device['torch']} sees no CUDA device; nothing was run (PART=resources needs none)")
        return NO_GPU
    out.mkdir(parents=True, exist_ok=True)
    report = run(wanted, out, device)
    missing = [unit.key for unit in wanted if report["units"].get(unit.key, {}).get("status") != "done"]
    say(f"report in {out / 'report.json'}; " + (f"not done: {', '.join(missing)}" if missing else "all of it is done"))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
