"""What `import cl_kernels` costs beside `import torch`: fresh processes, interleaved, the best of several.

The promise is a ratio of at most 1.3; with --check a larger one is an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 1.3
STATEMENTS = {"torch": "import torch", "ours": "import cl_kernels"}


def once(statement: str) -> float:
    """Wall seconds of a new interpreter that runs one statement, its own start taken off by the caller."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--check", action="store_true", help=f"fail when the ratio is above {LIMIT}")
    options = parser.parse_args()
    statements = {"python": "pass", **STATEMENTS}
    times: dict[str, list[float]] = {name: [] for name in statements}
    for name in statements:
        once(statements[name])  # files into the page cache, bytecode onto the disk
    for _ in range(3 if options.quick else 11):
        for name, statement in statements.items():
            times[name].append(once(statement))
    best = {name: min(found) for name, found in times.items()}
    ratio = (best["ours"] - best["python"]) / (best["torch"] - best["python"])
    for name, found in times.items():
        print(f"  {statements[name]:<18} min {min(found):6.3f} s  median {statistics.median(found):6.3f} s")
    print(f"import cl_kernels takes {ratio:.2f}x import torch (promised: at most {LIMIT}x)")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"seconds": times, "ratio": ratio, "limit": LIMIT}, indent=1) + "\n")
    return 1 if options.check and ratio > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
