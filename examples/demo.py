"""The demo: every method of the table on embedded real images over several seeds, one process a core.

    python examples/demo.py --seeds 3 --out out/demo

It is `cl-kernels study examples/demo.toml` with one difference: runs whose settings have changed are run again unasked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    from cl_kernels.cli import study as command
    from cl_kernels.continual import study, workers

    given = _arguments(argv)
    try:
        plan = study.load_plan(given.settings, given.out, seeds=given.seeds, quick=given.quick, only=given.only)
        return command.run(plan, given.out, given.jobs or workers.cores(), overwrite=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=_positive, default=None, help="seeds 0 to N-1 (default: the file's, or 3)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write (default out/demo)")
    parser.add_argument("--settings", type=Path, default=HERE / "demo.toml", help="default: demo.toml beside this file")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="only this row; may be repeated")
    parser.add_argument("--jobs", type=_positive, default=None, help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: does everything run?")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"expected 1 to 1000, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
