"""Write the tables and the figure of docs/robust.md from the runs of examples/robust.toml: none is typed by hand.

python scripts/robust_page.py out/robust/results.json   keeps the numbers, draws the figure, rewrites the tables
python scripts/robust_page.py                           rewrites figure and tables from the kept numbers
python scripts/robust_page.py --check                   changes nothing, exits with 1 if the page says something else
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "robust.md"
FIGURE = ROOT / "docs" / "figures" / "robust.svg"
KEPT = ROOT / "benchmarks" / "results" / "robust.json"
TUNING = ROOT / "benchmarks" / "results" / "robust_tuning.json"
FIELDS = ("method", "label", "title", "seed", "average_accuracy", "shift", "config")
COLOURS = {
    "linear": "#7F7F7F", "full": "#D55E00", "l2-sp": "#56B4E9", "ftp": "#0072B2", "spd": "#CC79A7", "tpgm": "#E69F00",
    "wise-ft": "#009E73",
}  # fmt: skip
MARKERS = {"linear": "X", "full": "o", "l2-sp": "s", "ftp": "D", "spd": "^", "tpgm": "v", "wise-ft": "P"}


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a results.json of examples/demo.py, and of each run how far its weights went."""
    runs = []
    for run in record["runs"]:
        short = {key: run[key] for key in FIELDS}
        anchoring = run["anchoring"][-1]
        short["distance"] = statistics.mean(entry["relative"] for entry in anchoring.values()) if anchoring else None
        short["seconds"] = run["seconds"]["train"][0]
        runs.append(short)
    return {**{key: record[key] for key in ("version", "seeds", "quick", "environment")}, "runs": runs}


def titles(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["title"] for run in runs))


def labels(runs: Sequence[dict[str, Any]], title: str) -> list[str]:
    return list(dict.fromkeys(run["label"] for run in runs if run["title"] == title))


def of(runs: Sequence[dict[str, Any]], title: str, label: str) -> list[dict[str, Any]]:
    """The runs of one line of a table, by seed."""
    return sorted((r for r in runs if (r["title"], r["label"]) == (title, label)), key=lambda run: int(run["seed"]))


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean and sample deviation, in percent or points."""
    return f"{100 * statistics.mean(values):{'+' if sign else ''}.1f} ± {100 * statistics.stdev(values):.1f}"


def differences(runs: Sequence[dict[str, Any]], title: str, label: str, name: str) -> list[float]:
    """`shift[name]` minus that of `full` with the same seed."""
    pairs = zip(of(runs, title, label), of(runs, title, "full"), strict=True)
    return [float(one["shift"][name] - full["shift"][name]) for one, full in pairs]


def comparison(runs: Sequence[dict[str, Any]], title: str) -> str:
    """One line a method: both accuracies, and both against `full` seed by seed."""
    lines = [
        "| method | lr | clean | corrupted | severity 5 | clean - full | corrupted - full | weights moved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in labels(runs, title):
        mine = of(runs, title, label)
        cells = [f"{mine[0]['config']['lr']:g}"]
        cells += [spread([run["shift"][name] for run in mine]) for name in ("clean", "mean")]
        cells.append(spread([run["shift"]["severities"][4] for run in mine]))
        for name in ("clean", "mean"):
            cells.append("" if label == "full" else spread(differences(runs, title, label, name), sign=True))
        moved = [run["distance"] for run in mine if run["distance"] is not None]
        cells.append(f"{100 * statistics.mean(moved):.0f} %" if moved else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def families(runs: Sequence[dict[str, Any]], title: str, chosen: Sequence[str]) -> str:
    """Accuracy by corruption, mean over severities and seeds, for a few methods."""
    lines = ["| corruption | " + " | ".join(chosen) + " |", "|---|" + "---:|" * len(chosen)]
    for name in runs[0]["shift"]["families"]:
        cells = [
            spread([statistics.mean(r["shift"]["families"][name]) for r in of(runs, title, who)]) for who in chosen
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trials(tuning: dict[str, Any]) -> str:
    """What was tried for each method, and what was chosen."""
    lines = ["| method | tried (accuracy on held-out training images) | chosen |", "|---|---|---|"]
    for method, entry in tuning["methods"].items():
        told = [f"{setting(trial)}: {100 * statistics.mean(trial['scores']):.1f}" for trial in entry["trials"]]
        lines.append(f"| {method} | {'; '.join(told)} | {setting(entry['chosen'])} |")
    return "\n".join(lines)


def setting(trial: dict[str, Any]) -> str:
    options = [f"{name} {value}" for name, value in trial.get("options", {}).items()]
    return ", ".join([f"{trial['lr']:g}", *options])


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "robust", "font.family": "sans-serif", "font.size": 9}
    found = titles(runs)
    size = (4.1 * len(found) + 1.2, 3.9)
    figure, panels = plt.subplots(1, len(found), figsize=size, squeeze=False, sharex=True, sharey=True)
    for axes, title in zip(panels[0], found, strict=True):
        path_of_wise = []
        for label in labels(runs, title):
            mine = of(runs, title, label)
            clean, worse = ([100 * run["shift"][name] for run in mine] for name in ("clean", "mean"))
            who = str(mine[0]["method"])
            place = statistics.mean(clean), statistics.mean(worse)
            axes.scatter(clean, worse, s=7, color=COLOURS[who], alpha=0.45, linewidths=0)
            axes.errorbar(
                *place, xerr=statistics.stdev(clean), yerr=statistics.stdev(worse), color=COLOURS[who], linewidth=0.9,
                marker=MARKERS[who], markersize=6, label=None if who == "wise-ft" else label, linestyle="none",
            )  # fmt: skip
            if who == "wise-ft":
                alpha = mine[0]["config"]["options"]["alpha"]
                axes.annotate(f"{alpha:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=7)
                path_of_wise.append((alpha, *place))
            elif who == "full":
                path_of_wise.append((1.0, *place))
        _, x, y = zip(*sorted(path_of_wise), strict=True)
        axes.plot(
            x, y, color=COLOURS["wise-ft"], linewidth=1.2, marker="P", markersize=0, label="wise-ft, alpha", zorder=1
        )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("accuracy on clean images (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.4, color="#dddddd")
    panels[0, 0].set_ylabel("accuracy on corrupted images (%)")
    panels[0, -1].legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def filled(page: str, record: dict[str, Any], tuning: dict[str, Any]) -> str:
    """The page with its tables made again."""
    runs = record["runs"]
    first, second = titles(runs)
    tables = {
        "chosen": comparison(runs, first),
        "high": comparison(runs, second),
        "families": families(runs, first, ("linear", "full", "l2-sp", "ftp", "wise-ft, alpha 0.5")),
        "trials": trials(tuning),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, mark, rest = page.partition(begin)
        if not mark or end not in rest:
            raise SystemExit(f"{PAGE.name} has no section between {begin} and {end}")
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.results is not None:
        record = kept(json.loads(options.results.read_text(encoding="utf-8")))
        KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record, tuning = (json.loads(path.read_text(encoding="utf-8")) for path in (KEPT, TUNING))
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page, record, tuning)
    if options.check:
        return int(page != wanted)
    draw(record["runs"], FIGURE)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
