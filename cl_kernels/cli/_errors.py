"""What an error means for the person at the terminal: one line, and an exit code."""

from __future__ import annotations

import sys
from typing import TextIO

from cl_kernels.data.pictures import BrokenImageError
from cl_kernels.errors import BackendUnavailableError, SubspaceError, SubspaceMismatchError

FINE, FAILED, BAD_USAGE, NO_BACKEND = 0, 1, 2, 3
CONTROL_C = 130  # 128 + SIGINT, as shells have it


class UsageError(ValueError):
    """The command line or its configuration file asks for something that does not exist or does not fit."""


def code(error: BaseException) -> int:
    """The exit code of api.md for an error that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return CONTROL_C
    if isinstance(error, BackendUnavailableError):
        return NO_BACKEND
    if isinstance(error, (SubspaceError, SubspaceMismatchError, BrokenImageError, UnicodeError)):
        return FAILED
    if isinstance(error, (FileExistsError, FileNotFoundError)) and error.errno is None:
        return BAD_USAGE  # the package's own: --out holds a run already, --data names nothing
    # ValueError and TypeError are what the package raises for arguments; click's usage errors carry their own code 2
    if isinstance(error, (ValueError, TypeError)) or getattr(error, "exit_code", None) == BAD_USAGE:
        return BAD_USAGE
    return FAILED


def sentence(error: BaseException) -> str:
    """The error as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command (train and compare: with --resume) goes on from the last checkpoint"
    if hasattr(error, "format_message"):  # click's, whichever copy of click typer brings
        return _one_line(str(error.format_message()))
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _one_line(f"{where}{error.strerror}")
    if isinstance(error, KeyError) and error.args:
        return _one_line(f"missing key {error.args[0]!r}")
    return _one_line(str(error)) or type(error).__name__


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write one line to stderr."""
    out = sys.stderr if stream is None else stream
    out.write(f"cl-kernels: {text}\n")
    out.flush()


def tell_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """In place of `warnings.showwarning`: a warning as one line, without the source line nobody at a terminal needs."""
    tell(f"warning: {_one_line(str(message))}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
