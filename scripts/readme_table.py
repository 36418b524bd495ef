"""Write the demo's tables into README.md from its results.json, so that no number there is typed by hand.

    python scripts/readme_table.py out/demo/results.json --keep benchmarks/results/demo.json
    python scripts/readme_table.py benchmarks/results/demo.json --check

The first rewrites the section between the markers and keeps the numbers it used, without the rest of the runs; the
second changes nothing and exits with 1 if README.md says something else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_kernels.cli.report.summary import MEASURES, Group, Section, Spread, check, sections

KEPT = ("method", "label", "title", "seed", "accuracy_matrix", "average_accuracy", "forgetting", "config")
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"

# (method, what it is compared with, what the difference shows)
COMPARISONS = (
    ("null-space", "full", "the same weights without projection"),
    ("null-space", "null-space matched", "the same weights with steps as small, but without direction"),
    ("null-space", "full, small step", "the best constant smaller step for later tasks"),
    ("nsp2", "sequential", "the same prompts without projection"),
    ("nsp2", "matched-lr", "the same prompts with steps as small, but without direction"),
    ("nsp2", "sequential, small step", "the best constant smaller step for later tasks"),
    ("nsp2-exact", "nsp2", "the published form"),
    ("null-space", "linear", "heads only"),
    ("nsp2", "linear", "heads only"),
)
ACCURACY, FORGETTING, KNOWN = (
    next(m for m in MEASURES if m.key == key) for key in ("average_accuracy", "forgetting", "task_accuracy")
)


def block(record: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    runs = [check(run, f"run {i}") for i, run in enumerate(record["runs"])]
    if record.get("quick"):
        raise SystemExit("these are the results of --quick, which show that everything runs and nothing else")
    parts = []
    for section in sections(runs):
        parts += [f"**{section.title}**", "", *_table(section), ""]
        sentences = [s for pair in COMPARISONS if (s := _sentence(section, *pair))]
        parts += [*sentences, ""] if sentences else []
    machine = record.get("environment") or {}
    facts = [f"{key} {machine[key]}" for key in ("torch", "device") if key in machine]
    minutes = math.fsum(run["seconds"]["total"] for run in runs) / 60
    parts.append(f"{len(runs)} runs, {minutes:.1f} minutes of one thread in all ({', '.join(facts)}).")
    return "\n".join(parts)


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of the results, and the settings they were made with."""
    runs = []
    for run in record["runs"]:
        kept = {key: run[key] for key in KEPT if key in run}
        for outer, inner in (("task_incremental", "average_accuracy"), ("task_incremental", "forgetting"),
                             ("feature_drift", "final_relative"), ("seconds", "total")):  # fmt: skip
            if isinstance(run.get(outer), dict) and inner in run[outer]:
                kept.setdefault(outer, {})[inner] = run[outer][inner]
        runs.append(kept)
    return {**record, "runs": runs}


def _table(section: Section) -> list[str]:
    measures = section.measures()
    lines = [
        "| method | " + " | ".join(m.title for m in measures) + " | seeds |",
        "|---|" + "---:|" * (len(measures) + 1),
    ]
    for group in section.groups:
        cells = [m.text(group.spread(m)) for m in measures]
        lines.append(f"| {group.label} | " + " | ".join(cells) + f" | {len(group.results)} |")
    return lines


def _sentence(section: Section, name: str, other: str, meaning: str) -> str | None:
    """`null-space` against `full`: differences paired by seed, so that the class order's luck cancels."""
    groups = {group.label: group for group in section.groups}
    if name not in groups or other not in groups:
        return None
    texts = []
    for measure, unit in ((ACCURACY, "accuracy"), (FORGETTING, "forgetting"), (KNOWN, "accuracy with the task known")):
        gap = _paired(groups[name], groups[other], measure.key)
        if gap is not None:
            sign = "+" if gap.mean >= 0 else "−"
            spread = "" if gap.deviation is None else f" ± {100 * gap.deviation:.1f}"
            texts.append(f"{unit} {sign}{abs(100 * gap.mean):.1f}{spread}")
    ratio = _ratio(groups[name], groups[other])
    return f"* `{name}` against `{other}` ({meaning}), in points: {', '.join(texts)}.{ratio}"


def _paired(first: Group, second: Group, key: str) -> Spread | None:
    measure = next(m for m in MEASURES if m.key == key)
    theirs = {r["seed"]: measure.pick(r) for r in second.results}
    gaps = []
    for result in first.results:
        mine, other = measure.pick(result), theirs.get(result["seed"])
        gaps.append(None if mine is None or other is None else mine - other)
    return Spread.of(gaps)


def _ratio(first: Group, second: Group) -> str:
    mine, other = first.spread(FORGETTING), second.spread(FORGETTING)
    if mine is None or other is None or other.mean <= 0:
        return ""
    return f" It forgets {mine.mean / other.mean:.2f} times as much."


def replaced(text: str, new: str) -> str:
    """README with the section between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md: expected one {BEGIN} before one {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if README.md differs")
    parser.add_argument("--keep", type=Path, help="also write the numbers that were used to this file")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    old = arguments.readme.read_text(encoding="utf-8")
    kept = compact(json.loads(arguments.results.read_text(encoding="utf-8")))
    new = replaced(old, block(kept))
    if arguments.check:
        return 0 if new == old else 1
    arguments.readme.write_text(new, encoding="utf-8")
    if arguments.keep is not None:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(run) for run in kept["runs"])
        rest = json.dumps({**kept, "runs": []}, indent=1)
        arguments.keep.write_text(rest.replace('"runs": []', f'"runs": [\n{lines}\n]'), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
