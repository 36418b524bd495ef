"""`curves.csv`: one line for each arm, size, seed and epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from .arms import Results

__all__ = ["COLUMNS", "curves"]

COLUMNS = ("arm", "size", "seed", "epoch", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "lr")


def curves(results: Results) -> str:
    """The curves of all runs as CSV with a header; numbers in full, what was not recorded is empty. Epochs count from
    1 in the order of the curve where they are not numbered."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in results.get("runs") or []:
        tests = run.get("test_loss_curve") or []
        for index, step in enumerate(run.get("curve") or []):
            values: Mapping[str, Any] = {
                "epoch": index + 1, "test_loss": tests[index] if index < len(tests) else None, **step,
                "arm": run["arm"], "size": run["size"], "seed": run["seed"],
            }  # fmt: skip
            writer.writerow(["" if values.get(name) is None else _text(values[name]) for name in COLUMNS])
    return out.getvalue()


def _text(value: Any) -> str:
    """Numbers exactly; a name that a spreadsheet would take for a formula is quoted as text."""
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
