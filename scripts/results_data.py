"""What docs/results.md is made from: the kept runs of the studies, their streams, and differences that are counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_kernels.cli.report.paired import Difference, paired
from cl_kernels.cli.report.summary import MEASURES, Group, Measure, Result, Section, sections
from cl_kernels.cli.report.versus import reading, verdict

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Neither good nor bad in itself: said as what it is.
NEUTRAL = {
    (key, told): word for key in ("feature_drift", "share") for told, word in (("better", "lower"), ("worse", "higher"))
}
#: The main one first; that of the questions last: its rows are variants, which no table of all methods shows.
MAIN, QUESTIONS = "study", "study_questions"
REPORTED = (MAIN, *sorted({path.stem for path in ROOT.glob("examples/study_*.toml")} - {QUESTIONS}))
STUDIES = (*REPORTED, QUESTIONS)
NOT_YET = "not yet run"

_PLAIN = (
    "method", "label", "title", "seed", "protocol", "average_accuracy", "forgetting", "accuracy_matrix", "loss",
    "parameters", "skipped_images", "environment",
)  # fmt: skip
ACCURACY, FORGETTING, KNOWN, DRIFT, SECONDS = (
    next(m for m in MEASURES if m.key == key)
    for key in ("average_accuracy", "forgetting", "task_accuracy", "feature_drift", "seconds")
)


def _kept_subspace(result: Result) -> dict[str, float] | None:
    """The last task's entry that says something: after the last one nothing has to be stored."""
    return next((entry for entry in reversed(result.get("subspace") or []) if entry), None)


def _share(result: Result) -> float | None:
    entry = _kept_subspace(result)
    return None if entry is None or result["method"] == "matched-lr" else entry["protected"] / entry["dim"]


def _energy(result: Result) -> float | None:
    entry = _kept_subspace(result)
    return None if entry is None or result["method"] == "matched-lr" else entry.get("energy")


SHARE = Measure("share", "Directions protected (%)", "protected", _share, better="lower")
ENERGY = Measure("energy", "Energy protected (%)", "energy", _energy)
END_TASK = Measure(
    "end_task", "Seconds of end_task, all tasks", "end_task",
    lambda result: math.fsum(result["seconds"]["end_task"]), 1.0, 2, "lower",
)  # fmt: skip


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats of any nested value to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without those that say nothing."""
    return {key: item for key, item in config.items() if item is not False and item not in (None, [], {})}


def compact(run: Result) -> dict[str, Any]:
    """Of a run in the format of results.json what tables, figures and a sceptical reader need, in at most 4 KB."""
    kept = {key: run[key] for key in _PLAIN if key in run}
    kept["config"] = said(run["config"])
    if run.get("task_incremental"):
        kept["task_incremental"] = run["task_incremental"]
    drift = run.get("feature_drift") or {}
    kept["feature_drift"] = {key: drift[key] for key in ("final_relative", "final_cosine") if key in drift}
    if run.get("teacher"):
        kept["teacher"] = {key: run["teacher"][key] for key in ("backbone", "average_accuracy", "forgetting")}
    kept["subspace"] = [_summed(layers) for layers in run.get("subspace") or []]
    kept["seconds"] = {key: item for key, item in run["seconds"].items() if key not in ("phases", "latency")}
    short: dict[str, Any] = rounded(kept)
    return short


def _summed(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Directions of all parameters together, and the mean share of the energy that they hold."""
    sides = [side for entry in layers.values() for side in entry.values()]
    if not sides:
        return {}
    energies = [side["energy"] for side in sides if side.get("energy") is not None]
    found = {"dim": sum(side["dim"] for side in sides), "protected": sum(side["protected"] for side in sides)}
    return {**found, **({"energy": math.fsum(energies) / len(energies)} if energies else {})}


def keep(record: Mapping[str, Any], path: Path) -> None:
    """Write a study's record with its runs made compact, one a line."""
    if record.get("quick"):
        raise SystemExit("these are the results of --quick, which show that everything runs and nothing else")
    lines = ",\n".join(json.dumps(compact(run), separators=(",", ":")) for run in record["runs"])
    rest = json.dumps({**record, "runs": []}, indent=1)
    path.write_text(rest.replace('"runs": []', f'"runs": [\n{lines}\n]') + "\n", encoding="utf-8")


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any] | None]:
    """Every kept file by name; None where there is none yet."""
    names = (*STUDIES, *(f"{name}_tuning" for name in REPORTED), "sixth_task")
    paths = {name: folder / f"{name}.json" for name in names}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for name, path in paths.items()
    }


def group_of(section: Section, label: str) -> Group | None:
    return next((group for group in section.groups if group.label == label), None)


@dataclass
class Book:
    """The streams of all studies, and every difference that was read off them, each counted once."""

    kept: Mapping[str, dict[str, Any] | None]
    counted: dict[tuple[str, str, str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reported = [section for name in REPORTED for section in self._sections(name)]
        self.main = self.reported[0] if self.kept.get(MAIN) is not None else None
        # other learning rates and numbers of images than the study's, even where the stream has the same name
        self.asked = [Section(f"{section.title} (questions)", section.groups) for section in self._sections(QUESTIONS)]

    def _sections(self, name: str) -> list[Section]:
        record = self.kept.get(name)
        return [] if record is None else sections(record["runs"])

    def difference(self, section: Section, label: str, against: str, measure: Measure) -> Difference | None:
        """`label` minus `against`, counted among the comparisons where both are there."""
        mine, other = group_of(section, label), group_of(section, against)
        found = None if mine is None or other is None else paired(mine, other, measure)
        if found is not None and found.student is not None:
            self.counted[section.title, label, against, measure.key] = verdict(measure, found)
        return found

    def verdict(self, section: Section, label: str, against: str, measure: Measure) -> str:
        return verdict(measure, self.difference(section, label, against, measure))

    def words(self, section: Section, label: str, against: str, measure: Measure) -> str:
        """A table's cell: mean and Student's interval; the bootstrap's; what may be said."""
        found = self.difference(section, label, against, measure)
        if found is None:
            return "–"
        told = reading(measure, found)
        return f"{told['text']}; {told['bootstrap']}; {NEUTRAL.get((measure.key, told['verdict']), told['verdict'])}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
