"""`report.html`, `report.md` and `curves.csv` of a comparison, from its results and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_kernels import pages
from cl_kernels._version import __version__
from cl_kernels.continual.checkpoint import write_atomically
from cl_kernels.errors import CheckpointError

from . import answer, costs, diagnosis, evidence, method, pictures
from . import numbers as n
from .arms import Arms
from .blocks import Page, Section
from .curves import curves
from .markdown import markdown

__all__ = ["render", "write_report"]

#: The version of results.json that this page reads; later minor additions keep the name.
SCHEMA = "cl_kernels.compare/1"

_HERE = Path(__file__).parent


def write_report(results: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md and curves.csv into the folder `out`, each atomically; return report.html's path.

    `results` is what results.json holds; pictures are read from their files below `out` and put into the page, which
    needs nothing beside it. What is not in `results` is said in a sentence. Raises CheckpointError for results of
    another schema or without a decision, BackendUnavailableError without jinja2, OSError if `out` cannot be written.
    Cost: about 0.1 s.
    """
    folder = Path(out)
    page, text = render(results, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "curves.csv", curves(results).encode())
    write_atomically(folder / "report.md", text.encode())
    target = folder / "report.html"
    write_atomically(target, page.encode())
    return target


def render(results: Mapping[str, Any], folder: Path | None = None) -> tuple[str, str]:
    """The page and its Markdown form as text; `folder` is where the pictures' files lie."""
    if results.get("schema") != SCHEMA:
        raise CheckpointError(f"results: expected the schema {SCHEMA!r}, got {results.get('schema')!r}")
    if not isinstance(results.get("decision"), Mapping) or not results["decision"].get("sentence"):
        raise CheckpointError("results: not the results of a finished comparison: decision.sentence missing")
    arms = Arms(results)
    page = Page(
        title="Prompts or full fine-tuning?",
        subtitle=_subtitle(results),
        sentence=str(results["decision"]["sentence"]),
        confidence=answer.confidence(arms),
        reasons=answer.reasons(arms),
        sections=_sections(results, arms, folder),
    )
    html = pages.render(
        _HERE, "page.html.jinja", script=(_HERE / "page.js").read_text(encoding="utf-8"), images=True,
        version=__version__, schema=SCHEMA, light=pages.LIGHT, dark=pages.DARK, title=page.title, page=page,
    )  # fmt: skip
    return html, markdown(page)


def _sections(results: Mapping[str, Any], arms: Arms, folder: Path | None) -> list[Section]:
    return [
        answer.accuracy(arms),
        answer.gap(arms),
        answer.later(arms),
        *costs.costs(results, arms),
        pictures.pictures(results, arms, folder),
        evidence.evidence(results),
        diagnosis.diagnosis(results, arms),
        method.decided(results, arms),
        method.prior(results),
        method.changes(results),
        method.weights(results, arms),
        method.missing(results),
    ]


def _subtitle(results: Mapping[str, Any]) -> str:
    """What was compared on what, in a line."""
    settings = results.get("settings") or {}
    data = str(settings.get("data") or "").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    backbone = str(settings.get("backbone") or "").replace("\\", "/").rsplit("/", 1)[-1]
    card = results.get("data") or {}
    counts = [
        f"{n.count(value)} {words}"
        for words, path in (
            ("training images", ("train", "n")),
            ("test images", ("test", "n")),
            ("classes", ("classes",)),
        )
        if (value := n.value_of(card, *path)) is not None
    ]
    told = f"Data: {data}" + (f" ({', '.join(counts)})" if counts else "")
    parts = [told if data else "", f"Backbone: {backbone}" if backbone else ""]
    return ". ".join(part for part in parts if part) + "." if any(parts) else "A comparison by cl_kernels."
