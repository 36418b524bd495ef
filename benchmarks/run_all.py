"""Run every bench_*.py beside this file, each in a process of its own, and keep its JSON.

python benchmarks/run_all.py --out DIR [--quick] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run_all(out: Path, *, quick: bool = False, limit_s: float = 3600.0) -> dict[str, Any]:
    """Run the benchmarks until the time is up; each one's numbers, or why there are none, by name."""
    results: dict[str, Any] = {}
    end = time.monotonic() + limit_s
    for script in sorted(HERE.glob("bench_*.py")):
        left = end - time.monotonic()
        if left < 5:
            results[script.stem] = {"status": "not run: the time was up"}
            continue
        print(f"== {script.stem}", flush=True)
        target = out / f"{script.stem}.json"
        command = [sys.executable, str(script), "--json", str(target), *(["--quick"] if quick else [])]
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=left, check=False).returncode
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {left:.0f} s"
        entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if target.exists():
            entry["numbers"] = json.loads(target.read_text())
        results[script.stem] = entry
        print(f"== {script.stem}: {status}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for all of them together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = run_all(options.out, quick=options.quick, limit_s=options.limit)
    return 0 if all(entry["status"] == "done" for entry in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
