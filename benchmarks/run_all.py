"""Every room's table, twice, each room in a process of its own: `cl-kernels bench` without its terminal extras.

python benchmarks/run_all.py --out DIR [ROOM ...] [--quick] [--all] [--budget 9m] ...
"""

from __future__ import annotations

import sys

from cl_kernels.benchmarks import suite


def main() -> int:
    try:
        return suite.command(sys.argv[1:], "run_all.py")
    except ValueError as error:
        sys.stderr.write(f"run_all.py: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
