"""Everything that needs a GPU, in one offline command of at most ten minutes: build, tests, sanitizer, benchmarks.

    python benchmarks/run_gpu.py --out DIR            (make gpu OUT=DIR)

Writes DIR/report.json (commit, device, versions, each step's outcome, every benchmark's numbers) and one log for each
step. The package is built without isolation and put into build/gpu-site, so that no environment is changed. Without a
GPU it says so and ends with exit code 3; --anyway goes through the steps all the same, to try this program itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sanitize import gpu_test_files

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
BUDGET_S = 580.0
NO_GPU = 3

DEVICE = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name() if there else None,
    "capability": list(torch.cuda.get_device_capability()) if there else None, "count": torch.cuda.device_count(),
}))
"""


def say(text: str) -> None:
    print(f"gpu: {text}", flush=True)


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def step(name: str, command: list[str], out: Path, left: float, fine: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run one step into its own log; say and return how it went."""
    start, log = time.monotonic(), out / f"{name}.log"
    say(f"{name}: {' '.join(command)}")
    with log.open("w") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False)
            status = "done" if done.returncode in fine else f"failed with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {left:.0f} s"
    tail = log.read_text(errors="replace").strip().splitlines()[-15:]
    print("\n".join(f"     {line}" for line in tail), flush=True)
    say(f"{name}: {status}, {time.monotonic() - start:.0f} s")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def build_command() -> list[str]:
    """Install offline into a folder of its own."""
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    return [*pip, "--target", str(SITE), str(ROOT)]


def build_record() -> dict[str, Any]:
    path = SITE / "cl_kernels" / "_build_info.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def describe(device: dict[str, Any]) -> dict[str, Any]:
    """Commit, date, device, driver: what the numbers belong to."""
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or None,
        "changed": bool(output_of("git", "status", "--porcelain", "-uno")),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **device,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
    }


def run(out: Path, device: dict[str, Any]) -> dict[str, Any]:
    """All steps, each within what is left of the ten minutes; the report is on disk after each."""
    end = time.monotonic() + BUDGET_S
    steps: dict[str, Any] = {}
    report = describe(device) | {"steps": steps}

    def left(keep: float = 0.0) -> float:
        return max(1.0, end - time.monotonic() - keep)

    def go(name: str, command: list[str], keep: float, fine: tuple[int, ...] = (0,)) -> bool:
        steps[name] = step(name, command, out, left(keep), fine)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        return bool(steps[name]["status"] == "done")

    os.environ["PYTHONPATH"] = str(SITE)
    built = go("build", build_command(), keep=120)
    report["build"] = build_record()
    if not report["build"].get("cuda"):
        say(f"the native module has no CUDA half: {report['build'].get('cuda_reason') or report['build']}")
    if not built:
        return report
    files = gpu_test_files()
    if files:
        # -P: the package that was just built, not the folder it was built from.
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        go("tests", [*pytest, "-m", "gpu", *files], keep=120, fine=(0, 5))
    else:
        steps["tests"] = {"status": "not run: no test is marked gpu"}
    go("sanitizer", [sys.executable, "benchmarks/sanitize.py", "--limit", str(left() / 2)], keep=60)
    limit = str(left(keep=15))
    go("benchmarks", [sys.executable, "benchmarks/run_all.py", "--out", str(out / "bench"), "--limit", limit], keep=5)
    found = sorted((out / "bench").glob("*.json"))
    report["benchmarks"] = {path.stem: json.loads(path.read_text()) for path in found}
    shutil.rmtree(out / "bench", ignore_errors=True)  # one file to carry away instead of many
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--anyway", action="store_true", help="go through the steps without a GPU too")
    options = parser.parse_args()
    text = output_of(sys.executable, "-c", DEVICE)
    if not text:
        say(f"{sys.executable} has no torch that imports; name one that has: make gpu PYTHON=/path/to/python")
        return NO_GPU
    device = json.loads(text)
    if device["device"] is None and not options.anyway:
        say(f"no GPU here: torch {device['torch']} sees no CUDA device; nothing was run")
        return NO_GPU
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = run(out, device)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, found in report["steps"].items() if found["status"] != "done"]
    say(f"report in {out / 'report.json'}; " + (f"not done: {', '.join(failed)}" if failed else "every step is done"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
