"""Write the tables of docs/methods.md from the results of examples/methods.toml, distillation.toml and
distillation_photos.toml: no number there is typed by hand.

python scripts/methods_tables.py out/methods/results.json     keeps the numbers and rewrites the tables
python scripts/methods_tables.py --distillation out/distillation/results.json     the same for the table of kdp
python scripts/methods_tables.py --photos out/photos/results.json     and for that of kdp on photographs
python scripts/methods_tables.py --check                      changes nothing, exits with 1 if they differ
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
KEPT = ROOT / "benchmarks" / "results" / "methods.json"
DISTILLED = ROOT / "benchmarks" / "results" / "distillation.json"
PHOTOS = ROOT / "benchmarks" / "results" / "distillation_photos.json"
ALONE = "student alone"
FIELDS = (
    "method",
    "label",
    "title",
    "seed",
    "protocol",
    "accuracy_matrix",
    "average_accuracy",
    "forgetting",
    "teacher",
    "config",
)
TABLES = {
    "projecting": (
        "sequential (prompts)",
        "adam-nscl, prompts",
        "gpm, prompts",
        "full",
        "adam-nscl",
        "gpm, nothing protected",
        "gpm",
        "nsp2",
        "nsp2, refined heads",
    ),
    "anchored": ("full", "ftp", "tpgm", "spd", "l2-sp", "wise-ft"),
    "lora": (
        "sequential-lora",
        "lorac, last model",
        "lorac, image by image",
        "lorac-ipc, last model",
        "lorac-ipc, image by image",
        "lorac-ipc, told its task",
    ),
    "pools": ("linear", "sequential (prompts)", "l2p", "dualprompt", "coda-prompt"),
}


def spread(values: list[float]) -> str:
    """Mean and sample deviation, in percent or points."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def table(runs: list[dict[str, Any]], labels: tuple[str, ...]) -> str:
    """One line for each stream and label that was run."""
    lines = ["| stream | method | average accuracy (%) | forgetting (points) | seeds |", "|---|---|---:|---:|---:|"]
    for title in dict.fromkeys(run["title"] for run in runs):
        for label in labels:
            mine = [run for run in runs if (run["title"], run["label"]) == (title, label)]
            if mine:
                accuracy, forgetting = (spread([r[key] for r in mine]) for key in ("average_accuracy", "forgetting"))
                lines.append(f"| {title} | {label} | {accuracy} | {forgetting} | {len(mine)} |")
    return "\n".join(lines)


def distilled(runs: list[dict[str, Any]]) -> str:
    """One line for each way of distilling; the gain over the student alone is taken seed by seed."""
    lines = [
        "| stream | student learns from | average accuracy (%) | over the student alone (points) | forgetting (points) "
        "| teacher's accuracy (%) | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    alone = {(r["title"], r["seed"]): r["average_accuracy"] for r in runs if r["label"] == ALONE}
    for title, label in dict.fromkeys((run["title"], run["label"]) for run in runs):
        mine = [run for run in runs if (run["title"], run["label"]) == (title, label)]
        accuracy, forgetting = (spread([r[key] for r in mine]) for key in ("average_accuracy", "forgetting"))
        gain = "" if label == ALONE else spread([r["average_accuracy"] - alone[title, r["seed"]] for r in mine])
        taught = [r["teacher"]["average_accuracy"] for r in mine if r.get("teacher")]
        teacher = spread(taught) if taught else ""
        lines.append(f"| {title} | {label} | {accuracy} | {gain} | {forgetting} | {teacher} | {len(mine)} |")
    return "\n".join(lines)


def filled(text: str, record: dict[str, Any], taught: dict[str, Any], photos: dict[str, Any]) -> str:
    """`text` with every table written anew between its markers."""
    tables = {name: table(record["runs"], labels) for name, labels in TABLES.items()}
    tables |= {"distillation": distilled(taught["runs"]), "distillation-photos": distilled(photos["runs"])}
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"{PAGE.name}: the markers of the table {name!r} are not there once")
        fresh = begin + lines + end
        text = found.sub(lambda _, fresh=fresh: fresh, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--distillation", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for given, kept in ((options.results, KEPT), (options.distillation, DISTILLED), (options.photos, PHOTOS)):
        if given is not None:
            record = json.loads(given.read_text(encoding="utf-8"))
            record["runs"] = [{key: run[key] for key in FIELDS if key in run} for run in record["runs"]]
            kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    fresh = filled(text, *(json.loads(kept.read_text(encoding="utf-8")) for kept in (KEPT, DISTILLED, PHOTOS)))
    if fresh == text:
        return 0
    if options.check:
        sys.stdout.write("docs/methods.md does not say what the results say; run scripts/methods_tables.py\n")
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
