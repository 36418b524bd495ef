"""Many runs from one file: what it plans, one process a run, and going on where an earlier attempt stopped."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_kernels import data, methods
from cl_kernels.continual import checkpoint, transforms, workers
from cl_kernels.continual.config import RunConfig
from cl_kernels.continual.trainer import run
from cl_kernels.errors import CheckpointError

__all__ = ["Job", "Plan", "execute", "load_plan", "settle"]

PLAN = "plan.json"
_TABLES = ("study", "run", "stream", "row")
_FIELDS = {"title": str, "seeds": int, "against": str}


@dataclass(frozen=True)
class Job:
    """One run: a line of the table (`label`) on a stream (`title`), and the fields of its `RunConfig`."""

    label: str
    title: str
    out: str
    settings: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    def config(self, **extra: Any) -> RunConfig:
        return RunConfig(**self.settings, out=self.out, **extra)


@dataclass(frozen=True)
class Plan:
    """Every run of a settings file; `against` is the label that the others are compared with."""

    jobs: list[Job]
    title: str = ""
    seeds: int = 3
    against: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def load_plan(
    path: str | Path, out: str | Path, *, seeds: int | None = None, quick: bool = False, only: Sequence[str] = ()
) -> Plan:
    """Read a settings file and lay out its runs, seeds outermost, so that an interrupted study has whole seeds to show.

    The file has the tables ``[study]`` (``title``, ``seeds``, ``against``), ``[run]`` (fields of `RunConfig` for every
    run), ``[[stream]]`` (fields for one stream, and a ``title``) and ``[[row]]`` (fields for one line of the table, and
    its ``label``); ``[[stream.row]]`` are the rows of one stream. Later tables override earlier ones; ``options`` are
    merged key by key. A path in ``data``, ``backbone``, ``weights``, ``teacher`` or ``teacher_weights`` is relative to
    the working directory, as on the command line. ``only`` keeps the rows with these labels.

    Every run is checked before the first one starts: raises `ValueError` naming the file, the row and what is wrong
    (with the nearest names), `FileNotFoundError` for a missing settings file.
    """
    file, folder = Path(path), Path(out)
    wanted = _read(file)
    study = _study(file, wanted.get("study", {}))
    streams, rows = wanted.get("stream") or [{}], wanted.get("row", [])
    if not all(stream.get("row", rows) for stream in streams):
        raise ValueError(f"{file}: every stream needs [[row]] or [[stream.row]] tables, and one has none")
    count = int(study.get("seeds", 3)) if seeds is None else seeds
    jobs = [
        _job(file, folder, number, (wanted.get("run", {}), stream, row), seed, quick)
        for seed in range(count)
        for number, stream in enumerate(streams, 1)
        for row in stream.get("row", rows)
    ]
    labels = list(dict.fromkeys(job.label for job in jobs))
    for name in [*only, *([study["against"]] if "against" in study else [])]:
        if name not in labels:
            raise ValueError(f"{file}: no row is called {name!r}{_nearest(name, labels)}")
    _distinct(file, jobs)
    kept = [job for job in jobs if not only or job.label in only]
    return Plan(kept, study.get("title", ""), count, study.get("against"), wanted)


def settle(plan: Plan, out: str | Path, *, overwrite: bool = False) -> None:
    """Hold a study's plan against what `out` was begun with, and note it there. New runs may join.

    Raises `CheckpointError` naming the differences when a run's settings have changed, unless `overwrite`, which lets
    changed runs be replaced.
    """
    file = Path(out) / PLAN
    runs = {job.out: job.config().as_json() for job in plan.jobs}
    keyed = {str(Path(name).relative_to(out)): config for name, config in runs.items()}
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else {}
    changed = {name: _differences(before[name], new) for name, new in keyed.items() if before.get(name, new) != new}
    if changed and not overwrite:
        shown = "; ".join(f"{name}: {', '.join(found[:3])}" for name, found in list(changed.items())[:4])
        more = f" and {len(changed) - 4} runs more" if len(changed) > 4 else ""
        raise CheckpointError(
            f"{out} holds a study with other settings: {shown}{more}. "
            "Overwrite the changed runs, or choose another --out"
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(file, json.dumps({"version": 1, "runs": {**before, **keyed}}, indent=1).encode())


def execute(
    jobs: Sequence[Job],
    processes: int,
    finished: Callable[[Job, dict[str, Any] | str], None],
) -> tuple[list[dict[str, Any]], list[tuple[Job, str]]]:
    """Run the jobs in worker processes of one thread each: results in the order of `jobs`, and failed jobs with their
    reason. `finished(job, results or reason)` is told as they end; a failed run does not stop the others."""
    results: dict[int, dict[str, Any]] = {}
    failures: list[tuple[Job, str]] = []
    for index, outcome in workers.outcomes(work, jobs, processes):
        if isinstance(outcome, str):
            failures.append((jobs[index], outcome))
        else:
            results[index] = outcome
        finished(jobs[index], outcome)
    return [results[index] for index in sorted(results)], failures


def work(job: Job) -> dict[str, Any]:
    """One run: taken from disk if finished, continued if interrupted, made anew if its settings changed."""
    config = job.config(resume=True, threads=1)
    finished = Path(job.out) / "results.json"
    if finished.is_file():
        results = json.loads(finished.read_text(encoding="utf-8"))
        if results.get("config") == config.as_json():
            return {**results, "label": job.label, "title": job.title}
    try:
        results = run(config)
    except CheckpointError:  # what lies there was made with other settings
        results = run(job.config(overwrite=True, threads=1))
    return {**results, "label": job.label, "title": job.title}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"settings {str(file)!r}: there is no such file")
    try:
        wanted = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    for name in wanted:
        if name not in _TABLES:
            raise ValueError(f"{file}: expected the tables {', '.join(_TABLES)}, got {name!r}{_nearest(name, _TABLES)}")
    return wanted


def _study(file: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    for name, item in said.items():
        kind = _FIELDS.get(name)
        if kind is None:
            raise ValueError(f"{file}: [study] has no {name!r}{_nearest(name, _FIELDS)}")
        if not isinstance(item, kind) or isinstance(item, bool):
            raise ValueError(f"{file}: [study] {name} must be of type {kind.__name__}, got {item!r}")
    if not 1 <= said.get("seeds", 3) <= 1000:
        raise ValueError(f"{file}: [study] seeds must be between 1 and 1000, got {said['seeds']}")
    return dict(said)


def _job(file: Path, out: Path, number: int, layers: tuple[Mapping[str, Any], ...], seed: int, quick: bool) -> Job:
    fields = {name: item for layer in layers for name, item in layer.items() if name != "row"}
    fields["options"] = {name: item for layer in layers for name, item in layer.get("options", {}).items()}
    title, label = str(fields.pop("title", "")), fields.pop("label", None)
    if not isinstance(label, str) or not label:
        raise ValueError(f"{file}: a row has no label: {dict(layers[-1])}")
    fields.update(seed=seed, quick=quick)
    slug = "".join(c if c.isalnum() else "-" for c in f"{number}-{label}")
    job = Job(label, title, str(out / "runs" / f"{slug}-seed{seed}"), fields)
    try:
        options = fields["options"] | ({"lr": fields["lr"]} if fields.get("lr") is not None else {})
        config = job.config()
        methods.check(config.method, **options)
        _check_names(config)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file}: row {label!r}: {error}") from error
    return job


def _check_names(config: RunConfig) -> None:
    """Data, domains and backbone files that are not there, told now and not by every run."""
    data.check(config.data)
    for name in config.domains:
        transforms.get(name)
    for field_name in ("backbone", "teacher", "weights", "teacher_weights"):
        text = str(getattr(config, field_name) or "")
        if text.endswith(".safetensors") and not Path(text).is_file():
            raise FileNotFoundError(f"{field_name} {text!r}: there is no such file")


def _distinct(file: Path, jobs: Iterable[Job]) -> None:
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.out, job)
        if other is not job:
            raise ValueError(f"{file}: the rows {other.label!r} and {job.label!r} of one stream have the same name")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(known)}"
