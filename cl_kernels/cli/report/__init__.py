"""`report.html`: one self-contained page for one run or many, without scripts or network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cl_kernels import pages
from cl_kernels._version import __version__
from cl_kernels.continual.checkpoint import write_atomically
from cl_kernels.errors import BackendUnavailableError

from . import charts, view
from .summary import Result, sections

__all__ = ["render", "write_report"]


def write_report(
    results: Sequence[Result],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    plot: bool | None = None,
    against: str | None = None,
) -> Path:
    """Write the page atomically and return its path.

    `results` are objects as in results.json: `method`, `seed`, `accuracy_matrix`, `average_accuracy`, `forgetting`, and
    what else a run recorded. `against` is the label of the row that the others are compared with. `plot` None draws
    charts where matplotlib is installed, True requires it, False has none.
    Raises CheckpointError for a result without the fields above, BackendUnavailableError without jinja2 or, under
    `plot=True`, without matplotlib; OSError if the folder cannot be written. Cost: about 0.1 s a chart.
    """
    target = Path(path)
    page = render(results, title=title, plot=plot, against=against)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page.encode())
    return target


def render(
    results: Sequence[Result], *, title: str | None = None, plot: bool | None = None, against: str | None = None
) -> str:
    """The page as text; arguments as for `write_report`."""
    if not results:
        raise ValueError("results must hold at least one run, got none")
    if plot and not charts.available():
        raise BackendUnavailableError('charts need matplotlib, which is not installed: pip install "cl-kernels[plot]"')
    draw = charts.available() if plot is None else plot
    found = sections(results)
    return pages.render(
        Path(__file__).parent,
        "page.html.jinja",
        title=title or view.title(found),
        runs=len(results),
        version=__version__,
        charts=draw,
        quick=any((result.get("config") or {}).get("quick") for result in results),
        sections=[view.section(s, f"s{i}", draw=draw, against=against) for i, s in enumerate(found)],
        settings=view.settings(found),
    )
