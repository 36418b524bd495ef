"""SIGTERM: finish the step, save, leave with exit code 0. That is what schedulers of shared machines send first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["RunStopped", "on_sigterm"]

logger = logging.getLogger("cl_kernels")


class RunStopped(SystemExit):
    """SIGTERM came; the step was finished and a checkpoint saved. Uncaught it ends the process with exit code 0."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def on_sigterm(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM; only the main thread may install handlers, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        logger.warning("SIGTERM: finishing the step, then saving")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
