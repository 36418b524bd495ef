"""What a comparison tells while it runs: a line with stage, arm, size and time left; a live one on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

from cl_kernels.compare.config import describe_seconds

__all__ = ["Progress", "Silent"]


class Silent:
    """Says nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def line(self, text: str) -> None:
        """A line that stays."""

    def now(self, stage: str, done: int = 0, total: int = 0, detail: str = "", left: float | None = None) -> None:
        """What is being done: `done` of `total` of a stage, and seconds of the budget that are left."""


class Progress(Silent):
    """On a terminal with rich a bar on stderr that is redrawn; elsewhere one plain line a stage and a tenth of it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._console: Any = None
        self._task: Any = None
        self._said: tuple[str, int] = ("", -1)
        if self._stream.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            self._console = Console(file=self._stream, highlight=False)
            columns = (
                TextColumn("{task.fields[stage]}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"), TextColumn("{task.fields[left]}"),
            )  # fmt: skip
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("compare", total=None, stage="", detail="", left="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._console.print(text)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def now(self, stage: str, done: int = 0, total: int = 0, detail: str = "", left: float | None = None) -> None:
        time = "" if left is None else f"{describe_seconds(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, stage=stage, completed=done, total=total or None, detail=detail, left=time)
            return
        tenth = 10 * done // total if total else 0
        if (stage, tenth) != self._said:
            self._said = (stage, tenth)
            count = f" {done}/{total}" if total else ""
            self.line("  ".join(part for part in (f"{stage}{count}", detail, time) if part))
