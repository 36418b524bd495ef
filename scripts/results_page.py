"""Write docs/results.md, its figures and the README's section from the kept runs of the studies: none is typed by hand.

python scripts/results_page.py --keep study out/study/results.json   keeps the runs compactly, then writes
python scripts/results_page.py                                       writes page, figures and section from what is kept
python scripts/results_page.py --check                               changes nothing, exits with 1 if a text differs

`--keep` takes the name of a settings file of examples/, study or study_*. What has not been run stands on the page as
"not yet run".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from results_cost import machine, missing, norms, settings, sixth, streams
from results_data import ACCURACY, FORGETTING, NOT_YET, RESULTS, ROOT, STUDIES, Book, group_of, keep, load
from results_figures import drawn, shown
from results_tables import AGAINST, comparable, distilled, exact, lorac, methods, ruled, rules, step
from results_words import BOTH, MISSING, best, sentence

from cl_kernels.cli.report.summary import Section

PAGE, README, FIGURES = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "figures"


def tuning() -> ModuleType:
    """examples/study_tuning.py, which knows the rows in their order."""
    spec = importlib.util.spec_from_file_location("study_tuning", ROOT / "examples" / "study_tuning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(book: Book) -> dict[str, str]:
    """What stands between the markers of the page, by their names; the count of comparisons comes last."""
    made: dict[str, Callable[[], str]] = {
        "methods": lambda: _methods(book),
        "step": lambda: step(book),
        "exact": lambda: exact(book),
        "norms": norms,
        "rules": lambda: rules(book),
        "lorac": lambda: lorac(book),
        "sixth": lambda: sixth(book),
        "kdp": lambda: distilled(book),
        "streams": lambda: streams(book),
        "machine": lambda: machine(book),
        "settings": lambda: settings(book),
        "missing": lambda: missing(book, tuning().ORDER),
    }
    section(book)  # what the README compares is counted too
    texts = {name: make() for name, make in made.items()}
    return {**texts, "count": count(book)}


def _methods(book: Book) -> str:
    parts = [f"### {s.title}\n\n{methods(book, s)}\n\n{shown(book, s)}" for s in book.reported]
    return "\n\n".join(parts) or MISSING


def count(book: Book) -> str:
    """How many differences were looked at, and how many of them chance alone would tell apart."""
    total, told = len(book.counted), sum(verdict != "not told apart" for verdict in book.counted.values())
    if not total:
        return f"The studies are {NOT_YET}: no comparison has been made."
    return (
        f"This page and the README make {total} comparisons, and {told} of them tell the two apart. The intervals are "
        f"not corrected for their number: were there no differences at all, about {round(0.05 * total)} would be told "
        "apart all the same."
    )


def section(book: Book) -> str:
    """The README's: the main stream in short, and what may be said of the questions."""
    link = "[docs/results.md](docs/results.md) has every method, stream and interval."
    if book.main is None:
        return f"The studies are {NOT_YET}. {link}"
    lines = [
        f"**{book.main.title}**",
        "",
        f"| method | accuracy (%) | forgetting (points) | better than `{AGAINST}`? |",
    ]
    lines.append("|---|---:|---:|---|")
    answers = {"better": "yes", "worse": "worse", "not told apart": "no"}
    same = [group.label for group in comparable(book.main).groups]
    for group in book.main.groups:
        told = "another backbone" if group.label not in same else ""
        if not told and group.label != AGAINST:
            told = book.verdict(book.main, group.label, AGAINST, ACCURACY)
        spreads = " | ".join(measure.text(group.spread(measure)) for measure in (ACCURACY, FORGETTING))
        lines.append(f"| {group.label} | {spreads} | {answers.get(told, told)} |")
    seeds = sorted({len(group.results) for group in book.main.groups})
    lines += ["", f'Mean ± deviation over {" or ".join(map(str, seeds))} seeds; "no": not told apart in accuracy.', ""]
    lines += [f"* {told}" for told in _answers(book)]
    return "\n".join(
        [*lines, "", "```console", "$ cl-kernels study examples/study.toml --out out/study", "```", "", link]
    )


def _answers(book: Book) -> list[str]:
    """Questions 2 to 5, of the streams that were run."""
    told = [
        f"Direction and drift term beyond the smaller step: {sentence(book, 'nsp2', 'matched-lr', book.reported)}",
        f"The direction, for all weights: {sentence(book, 'null-space', 'null-space matched', book.reported)}",
        f"The same, each at the rate its trials chose: {sentence(book, 'null-space', 'full', book.reported)}",
        f"The exact form of NSP2: {sentence(book, 'nsp2-exact', 'nsp2', book.reported)}",
    ]
    for stream in book.asked:
        rows = Section(stream.title, ruled(stream, "null-space"))
        if rows.groups:
            found = " ".join(best(book, rows, measure, brief=True) for measure in BOTH)
            told.append(f"Rank rules of `null-space`, {stream.title}: {found}")
    if not any(ruled(stream, "null-space") for stream in book.asked):
        told.append(f"Rank rules: {NOT_YET}.")
    asked = any(group_of(s, "lorac: instance") for s in book.asked)
    pair = ("lorac: instance", "sequential-lora: last") if asked else ("lorac", "sequential-lora")
    told.append(f"LoRAC image by image: {sentence(book, *pair, book.reported + book.asked)}")
    return told


def filled(text: str, made: dict[str, str], name: str) -> str:
    """`text` with every block between its markers written anew."""
    for block, lines in made.items():
        begin, end = f"<!-- {block}: begin -->\n", f"\n<!-- {block}: end -->"
        found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"{name}: the markers of {block!r} are not there once")
        fresh = begin + lines + end
        text = found.sub(lambda _, fresh=fresh: fresh, text)
    return text


def write(book: Book) -> None:
    figures = drawn(book)
    for old in FIGURES.glob("results-*.svg"):
        if old.name not in figures:
            old.unlink()
    for name, svg in figures.items():
        (FIGURES / name).write_text(svg, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="what `cl-kernels study` wrote, with --keep")
    parser.add_argument("--keep", choices=STUDIES)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if (options.results is None) != (options.keep is None):
        parser.error("--keep NAME and a results.json go together")
    if options.keep is not None:
        keep(json.loads(options.results.read_text(encoding="utf-8")), RESULTS / f"{options.keep}.json")
    book = Book(load())
    same = True
    for path, make in ((README, lambda: {"results": section(book)}), (PAGE, lambda: blocks(book))):
        text = path.read_text(encoding="utf-8")
        fresh = filled(text, make(), path.name)
        same &= fresh == text
        if not options.check:
            path.write_text(fresh, encoding="utf-8")
    if options.check:
        return 0 if same else 1
    write(book)
    return 0


if __name__ == "__main__":
    sys.exit(main())
