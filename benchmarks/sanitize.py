"""Run the GPU tests under compute-sanitizer: memcheck, racecheck, initcheck, one process for each tool and test file.

    python benchmarks/sanitize.py [TOOL [FILE ...]] [--limit SECONDS]

torch's caching allocator is switched off, or a write past the end would land in its slack and pass; launches are
synchronous, so that an error names its kernel; only our kernels (their names begin with `cl_`) are looked at. Tests
with "graph" in their name are left out: a graph takes its memory from the caching allocator.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
FAULT = 99  # exit code that compute-sanitizer uses for a finding; pytest never does


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [None, *(os.path.join(home, "bin") for home in homes if home)]
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)


def gpu_test_files() -> list[str]:
    """The files that hold a test marked gpu; by their text, so that no other file's imports can stand in the way."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]


def command(sanitizer: str, tool: str, file: str) -> list[str]:
    """One tool on the quick GPU tests of one file."""
    watch = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULT)]
    watch += ["--target-processes", "application-only", "--kernel-name", "kernel_substring=cl_"]
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-o", "addopts=", "-x"]
    return [*watch, *pytest, "-m", "gpu and not slow", "-k", "not graph", file]


def sanitize(tools: Sequence[str], files: Sequence[str], limit_s: float) -> dict[str, str]:
    """A status for each tool and file: clean, findings, failed, or not run and why."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return {"all": "not run: compute-sanitizer not found"}
    if not files:
        return {"all": "not run: no test is marked gpu"}
    quiet = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    results = {}
    end = time.monotonic() + limit_s
    for tool in tools:
        for file in files:
            name, left = f"{tool} {file}", end - time.monotonic()
            if left < 10:
                results[name] = "not run: the time was up"
                continue
            watched = command(sanitizer, tool, file)
            try:
                code = subprocess.run(watched, cwd=ROOT, env=os.environ | quiet, timeout=left, check=False).returncode
                words = {0: "clean", 5: "clean: no quick test in it", FAULT: "FINDINGS"}
                results[name] = words.get(code, f"failed with exit code {code}")
            except subprocess.TimeoutExpired:
                results[name] = f"stopped after {left:.0f} s"
            print(f"sanitize: {name}: {results[name]}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", nargs="?", choices=TOOLS, help="[all three]")
    parser.add_argument("file", nargs="*", help="[every file with a test marked gpu]")
    parser.add_argument("--limit", type=float, default=600.0)
    given = parser.parse_args()
    results = sanitize([given.tool] if given.tool else TOOLS, given.file or gpu_test_files(), given.limit)
    for name, status in results.items():
        print(f"sanitize: {name}: {status}")
    return 0 if all(status.startswith("clean") for status in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
