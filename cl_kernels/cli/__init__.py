"""The command line, `cl-kernels`. Typer is imported when a command runs: importing this package needs no extra."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from cl_kernels.cli import _errors

__all__ = ["main", "run"]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `cl-kernels` script: runs one command and exits with 0 fine, 1 failed, 2 bad usage, 3 no
    backend, 130 Ctrl-C."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every error becomes one line on stderr.

    `argv` is what follows the program's name, by default `sys.argv[1:]`. With CL_KERNELS_DEBUG=1 in the environment the
    traceback is shown too.
    """
    if any(importlib.util.find_spec(package) is None for package in ("typer", "rich")):
        _errors.tell('the command line needs typer and rich: pip install "cl-kernels[cli]"')
        return _errors.BAD_USAGE
    with warnings.catch_warnings():
        warnings.showwarning = _errors.tell_warning
        try:
            from cl_kernels.cli import _app

            return _app.invoke(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            if not isinstance(stop.code, int):
                raise
            if str(stop) != str(stop.code):  # a run that SIGTERM ended says so; a closed pipe (`| head`) says nothing
                _errors.tell(str(stop))
            return stop.code
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("CL_KERNELS_DEBUG") == "1":
                traceback.print_exc()
            _errors.tell(_errors.sentence(error))
            return _errors.code(error)
