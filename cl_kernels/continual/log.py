"""What a run tells while it runs: metrics.jsonl, TensorBoard, a progress bar. Silent where nobody looks."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Log", "Progress"]

logger = logging.getLogger("cl_kernels")


class Log:
    """Appends one JSON object per line to `path`, flushed; mirrors numbers to TensorBoard when asked and importable."""

    def __init__(self, path: Path | None, tensorboard: Path | None) -> None:
        self._path = path
        self._writer: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("tensorboard is not importable; no event files are written")
            else:
                self._writer = SummaryWriter(str(tensorboard))

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Write one line with the time and `values`."""
        if self._path is not None:
            line = json.dumps({"event": kind, "time": round(time.time(), 3), "step": step, **values})
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk shows at the flush, which does not know the file
                raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()

    def size(self) -> int:
        """Bytes written so far; a checkpoint remembers it."""
        return self._path.stat().st_size if self._path is not None and self._path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what came after a checkpoint: the resumed run writes it again."""
        if self._path is not None and self._path.exists():
            with self._path.open("r+b") as file:
                file.truncate(min(size, self.size()))

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A bar over all steps of a run on stderr, when that is a terminal and rich is importable; else nothing."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._bar: Any = None
        if not sys.stderr.isatty():
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, title: str) -> None:
        """One more step; rich redraws ten times a second at most."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=title)
