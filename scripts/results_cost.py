"""What docs/results.md says of cost, settings and backbones: the sixth task, the machine, the trials, norm1.weight."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_data import MAIN, NOT_YET, REPORTED, ROOT, STUDIES, Book, group_of
from results_words import MISSING

from cl_kernels.cli.report.summary import Group, Section, Spread

FOLDERS = (ROOT / "benchmarks" / "backbones", ROOT / "cl_kernels" / "data" / "weights")
SIXTH = 5
#: What the studies are meant to hold: (what, how a run shows that it is there).
WANTED = (
    ("a stream of twenty tasks", lambda config: config.get("tasks") == 20),
    ("groceries", lambda config: "grocery" in config["data"].lower()),
    ("alphabets (Omniglot)", lambda config: "omniglot" in config["data"].lower()),
    ("one data set after another", lambda config: config.get("stream") == "source" and "+" in config["data"]),
    ("new domains", lambda config: config.get("stream") == "domain"),
)


def sixth(book: Book) -> str:
    """The table of examples/sixth_task.py as it is, then each method's seconds in the studies."""
    record = book.kept.get("sixth_task")
    lines = [MISSING] if record is None else [_given(record), "", *(f"* {note}" for note in record.get("notes", ()))]
    lines += ["", "In the runs of the studies (training and `end_task` of the sixth task, mean over seeds):", ""]
    tables = [_seconds(section) for section in book.reported if section.groups[0].tasks > SIXTH]
    return "\n".join([*lines, *(tables or [MISSING])])


def _given(record: Mapping[str, Any]) -> str:
    columns = record["columns"]
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("|" + "|".join("---" if digits is None else "---:" for *_, digits in columns) + "|")
    for row in record["rows"]:
        cells = [_cell(row.get(key), digits) for key, _, digits in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any, digits: int | None) -> str:
    if value is None:
        return "–"
    if digits is None:
        return f"{value:.0e}" if isinstance(value, float) else str(value)
    return f"{value:.{digits}f}"


def _seconds(section: Section) -> str:
    lines = [
        f"**{section.title}**", "",
        "| method | sixth task (s) | by its first | by `sequential` | by `full` | share of `end_task` (%) |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    others = [_task(group, SIXTH) if (group := group_of(section, who)) else None for who in ("sequential", "full")]
    for group in section.groups:
        took, first, ends = _task(group, SIXTH), _task(group, 0), _task(group, SIXTH, ("end_task",))
        if took:
            ratios = [f"{took / other:.2f}" if other else "–" for other in (first, *others)]
            lines.append(f"| {group.label} | {took:.2f} | {' | '.join(ratios)} | {100 * (ends or 0.0) / took:.0f} |")
    return "\n".join([*lines, ""])


def _task(group: Group, task: int, parts: Sequence[str] = ("train", "end_task")) -> float | None:
    """Mean seconds over seeds of one task."""
    took = [math.fsum(r["seconds"][part][task] for part in parts) for r in group.results if r["seconds"].get("train")]
    spread = Spread.of(took)
    return None if spread is None else spread.mean


def norms(folders: Sequence[Path] = FOLDERS) -> str:
    """The spread of norm1.weight of every block of every backbone that the repository holds."""
    from safetensors.torch import load_file

    lines = ["| backbone | block | min | max | mean | deviation / mean |", "|---|---:|---:|---:|---:|---:|"]
    spreads: dict[str, list[float]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        weights = load_file(path)
        for name in sorted(name for name in weights if name.endswith("norm1.weight")):
            values = weights[name].double().tolist()
            mean = statistics.fmean(values)
            spreads.setdefault(path.stem, []).append(statistics.stdev(values) / mean)
            numbers = f"{min(values):.3f} | {max(values):.3f} | {mean:.3f} | {spreads[path.stem][-1]:.3f}"
            lines.append(f"| {path.stem} | {name.split('.')[1]} | {numbers} |")
    told = [f"{stem} {min(found):.2f} to {max(found):.2f}" for stem, found in spreads.items()]
    return "\n".join([*lines, "", f"Deviation over mean, least to greatest block: {'; '.join(told)}."])


def settings(book: Book) -> str:
    """What was chosen for each method, and of how many trials."""
    lines: list[str] = []
    for study in REPORTED:
        tuning = book.kept.get(f"{study}_tuning")
        lines += [f"**Settings of `{study}`**", ""]
        if tuning is None:
            same = study != MAIN and _rows(study) == _rows(MAIN)
            lines += [f"Its rows are those of `{MAIN}`." if same else f"The trials are {NOT_YET}.", ""]
            continue
        counts = sorted({len(entry["trials"]) for entry in tuning["methods"].values()})
        seeds, run = ", ".join(map(str, tuning["seeds"])), tuning["run"]
        lines += [
            f"{' or '.join(map(str, counts))} trials a method, each with the seeds {seeds}, on the classes "
            f"{run['classes']} of {run['data']}, {tuning['seconds'] / 60:.0f} minutes of one thread in all.",
            "",
            "| method | learning rate | at an end of those tried | options | accuracy in the trials (%) |",
            "|---|---:|---|---|---:|",
        ]
        for label, entry in tuning["methods"].items():
            chosen = entry["chosen"]
            scores = next(t["scores"] for t in entry["trials"] if {k: t[k] for k in t if k != "scores"} == chosen)
            spread = Spread.of(scores)
            options = ", ".join(f"{key} {item}" for key, item in chosen.get("options", {}).items())
            rates = [trial["lr"] for trial in entry["trials"]]
            end = {min(rates): "lowest", max(rates): "highest"}.get(chosen["lr"], "")
            lines.append(f"| {label} | {chosen['lr']:g} | {end} | {options} | {spread.text() if spread else '–'} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _rows(study: str) -> list[dict[str, Any]]:
    """The rows of a settings file for all its streams."""
    path = ROOT / "examples" / f"{study}.toml"
    found: list[dict[str, Any]] = (
        tomllib.loads(path.read_text(encoding="utf-8")).get("row", []) if path.is_file() else []
    )
    return found


def streams(book: Book) -> str:
    """One line a stream: what was run on it."""
    lines = [
        "| stream | data | classes | tasks | images a class | epochs a task | methods | seeds | thread-minutes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for section in book.reported + book.asked:
        config = section.groups[0].results[0]["config"]
        classes, images = config.get("classes", "all"), config.get("images_per_class", "all")
        source = " + ".join(Path(part).name for part in config["data"].split("+"))
        source += f": {', '.join(config['domains'])}" if config.get("domains") else ""
        counts = sorted({len(group.results) for group in section.groups})
        minutes = math.fsum(r["seconds"]["total"] for group in section.groups for r in group.results) / 60
        cells = [section.title, source, classes, section.groups[0].tasks, images, config["epochs"], len(section.groups)]
        cells += [" or ".join(map(str, counts)), f"{minutes:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) if book.reported + book.asked else MISSING


def machine(book: Book) -> str:
    """Commands, machines and thread-minutes of every study."""
    lines = ["```console"]
    for name in STUDIES:
        lines.append(f"$ cl-kernels study examples/{name}.toml --out out/{name}")
        lines.append(f"$ python scripts/results_page.py --keep {name} out/{name}/results.json")
    lines += ["```", ""]
    for name in STUDIES:
        record = book.kept.get(name)
        if record is None:
            lines.append(f"* `{name}`: {NOT_YET}.")
            continue
        minutes = math.fsum(run["seconds"]["total"] for run in record["runs"]) / 60
        found = list(dict.fromkeys(json.dumps(run["environment"], sort_keys=True) for run in record["runs"]))
        told = ["; ".join(f"{key} {item}" for key, item in json.loads(one).items()) for one in found]
        lines.append(
            f"* `{name}`: {len(record['runs'])} runs, {minutes:.0f} minutes of one thread ({' and '.join(told)})."
        )
    return "\n".join(lines)


def missing(book: Book, order: Sequence[str]) -> str:
    """What was meant to be run and was not, read off what is there."""
    runs = [run for name in STUDIES for run in (book.kept.get(name) or {"runs": []})["runs"]]
    lines = [f"* {what}" for what, there in WANTED if not any(there(run["config"]) for run in runs)]
    for section in book.reported:
        labels = {group.label for group in section.groups}
        absent = [label for label in order if label not in labels]
        if absent:
            lines.append(f"* {section.title}: {', '.join(f'`{label}`' for label in absent)}")
        fewest = min(len(group.results) for group in section.groups)
        if fewest < 5:
            lines.append(f"* {section.title}: five seeds (the fewest of a method are {fewest})")
    if not any(str(run["environment"].get("device", "")).startswith("cuda") for run in runs):
        lines.append("* a GPU")
    lines += [f"* all of `{name}`" for name in (*STUDIES, "sixth_task") if book.kept.get(name) is None]
    return "\n".join(lines) or "Nothing that was planned is missing."
