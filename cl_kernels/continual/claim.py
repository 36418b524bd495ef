"""The directory that a run writes to: probed, held against a second run, and never written over unasked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cl_kernels.continual import checkpoint

__all__ = ["CHECKPOINT", "claimed", "locked"]

logger = logging.getLogger("cl_kernels")

CHECKPOINT = Path("checkpoints") / "last.safetensors"
_WRITTEN = ("results.json", "metrics.jsonl", "report.html", "subspace.safetensors", "student.safetensors")


@contextmanager
def claimed(out: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold `out` for one run; with `overwrite` and without `resume`, remove the run that it held.

    Raises `FileExistsError` when it holds a run that nobody asked to go on with or to replace, or when another process
    is writing to it; `OSError` when it cannot be written to."""
    last = out / CHECKPOINT
    if last.exists() and not (resume or overwrite):
        raise FileExistsError(f"out: {out} holds a run already; resume it, overwrite it, or choose another directory")
    checkpoint.probe(out)
    with locked(out):
        checkpoint.probe(last.parent)
        if overwrite and not resume:
            for path in (last, *(out / name for name in _WRITTEN)):
                path.unlink(missing_ok=True)
        yield


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """An flock on the directory itself: no file to leave behind, and gone with the process, killed or not.

    Without flock (Windows, some network file systems) there is no lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"out: another process is writing to {directory}; wait, or choose another") from error
        except OSError as error:
            logger.debug("out: %s cannot be locked (%s)", directory, error.strerror)
        yield
    finally:
        os.close(handle)
