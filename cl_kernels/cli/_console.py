"""Tables for people, wide enough to stay whole when the output goes into a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 160  # of a table that no terminal limits


def console() -> Console:
    """A console on today's stdout (tests and pipes replace it), without colours on numbers."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH
    return Console(file=sys.stdout, highlight=False, soft_wrap=False, width=width)


def table(*columns: str) -> Table:
    """A table with a rule under its head; numbers, that is all columns but the first, are set to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def listing() -> Table:
    """Two columns, name and value, without lines."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column()
    made.add_column(overflow="fold")
    return made
