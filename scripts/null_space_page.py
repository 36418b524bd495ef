"""Write the tables of docs/null_space.md from the numbers they show, so that none is typed by hand.

python scripts/null_space_page.py            rewrite the sections between the markers
python scripts/null_space_page.py --check    change nothing; exit with 1 if the page says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "null_space.md"
STABILITY = ROOT / "docs" / "figures" / "stability.json"
SPECTRA = ROOT / "benchmarks" / "results" / "cpu" / "null_space.json"
TITLES = {"digits": "digits", "tin32_novel100": "tiny ImageNet, 32 x 32"}
VARIANTS = {
    "ours": "ours, eigh",
    "official: full SVD loop, dense": "official SVD",
    "ours: spectral_projector": "spectral_projector",
    "ours: log_odds_filter": "log_odds_filter",
}


def stability(found: list[dict[str, Any]]) -> str:
    lines = ["| features of | projector | change of P | worst energy / tau | worst layer | free |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for entry in found:
        for edge, row in entry["summary"].items():
            numbers = f"{100 * row['change']:.1f} % | {row['worst_energy']:.2f} | {row['worst_layer']:.2f}"
            title = TITLES.get(entry["data"], entry["data"])
            lines.append(f"| {title} | {edge} | {numbers} | {100 * row['free_share']:.1f} % |")
    return "\n".join(lines)


def spectra(report: dict[str, Any]) -> str:
    head = " | ".join(f"{title}: leak / lost" for title in VARIANTS.values())
    lines = [f"| spectrum | {head} | time of official SVD | of log_odds_filter |"]
    lines.append("|---|" + "---:|" * (len(VARIANTS) + 2))
    for result in report["results"]:
        name = result["case"]
        if not name.startswith("projectors 12x768 float32"):
            continue
        rows = {row["variant"]: row for row in result["rows"]}
        cells = [f"{tiny(rows[v]['leak'])} / {tiny(rows[v]['lost'])}" for v in VARIANTS]
        times = [f"{rows[v]['times_ours']:.1f}x" for v in ("official: full SVD loop, dense", "ours: log_odds_filter")]
        lines.append(f"| {name.split(', ')[1]} | " + " | ".join([*cells, *times]) + " |")
    return "\n".join(lines)


def tiny(value: float) -> str:
    """One digit and the power of ten; rounding errors below 0 are 0."""
    mantissa, power = f"{max(value, 0.0):.0e}".split("e")
    return f"{mantissa}e{int(power)}" if mantissa != "0" else "0"


def filled(page: str) -> str:
    """The page with its tables made again."""
    tables = {
        "stability": stability(json.loads(STABILITY.read_text(encoding="utf-8"))),
        "spectra": spectra(json.loads(SPECTRA.read_text(encoding="utf-8"))),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE.name} has no section between {begin} and {end}")
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page)
    if options.check:
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
