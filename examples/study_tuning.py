"""Choose the settings of the studies beside this file: six trials a method, on classes that they do not report.

    python examples/study_tuning.py examples/study.toml --out out/study_tuning
    python examples/study_tuning.py examples/study_domains.toml --out out/study_domains_tuning

Trials run on the first classes of the same images, which the study leaves out, in the stream that `TUNED` gives, with
the seeds of `SEEDS`. The best mean accuracy at the end wins, of equal ones the lowest learning rate.
Controls that take the settings of another method have no trials of their own. The rows of the file, between its
markers, are written anew from what was chosen; scores go to benchmarks/results. Goes on where it was cut off.
About 30 minutes of one thread a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "# chosen rows: begin\n", "# chosen rows: end\n"
SEEDS = {"study": (100, 101), "study_domains": (100,)}
#: Files that take the rows of another.
ALSO = {"study": ("study_streams",)}
#: What the trials have instead of the first stream of the file.
TUNED: dict[str, dict[str, Any]] = {
    "study": {"classes": "0:20", "tasks": 5, "images_per_class": 100},
    "study_domains": {"classes": "0:20"},
}


def _rates(*rates: float, **options: Any) -> list[dict[str, Any]]:
    return [{"lr": rate, **({"options": options} if options else {})} for rate in rates]


def _grid(name: str, values: Sequence[Any], rates: Sequence[float], **options: Any) -> list[dict[str, Any]]:
    return [{"lr": rate, "options": {**options, name: value}} for rate in rates for value in values]


_PROMPTS, _WEIGHTS, _ADAPTERS = (3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)
#: Where less may be learned, since all tasks share one head: as low as `full` and `sequential-lora` may go there, whose
#: trials chose their lowest. (Trials with the rates above came first; ftp, l2-sp and o-lora could not follow.)
_LOW = {"study_domains": ((1e-5, 1e-4, 1e-3), (1e-4, 1e-3, 3e-3))}
STUDENT = {
    "backbone": "benchmarks/backbones/vit_tin32_tiny.safetensors",
    "teacher": "benchmarks/backbones/vit_tin32_small.safetensors",
}
#: Label: (method, six trials, further fields of the row).
Trials = dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]]
TRIALS: Trials = {
    "linear": ("linear", _rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), {}),
    "joint, prompts": ("joint", _rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1, base="prompts"), {}),
    "joint, weights": ("joint", _rates(3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, base="full"), {}),
    "sequential": ("sequential", _rates(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), {}),
    "sequential, small step": ("matched-lr", _grid("scale", (0.3, 0.1, 0.03), (1e-2, 3e-2), base="prompts"), {}),
    "nsp2": ("nsp2", _grid("rule", ("knee", "energy:0.9"), _PROMPTS), {}),
    "nsp2-exact": ("nsp2-exact", _grid("rule", ("knee", "energy:0.9"), _PROMPTS), {}),
    "full": ("full", _rates(1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3), {}),
    "full, small step": ("matched-lr", _grid("scale", (0.3, 0.1, 0.03), (3e-4, 1e-3), base="full"), {}),
    "null-space": ("null-space", _grid("rule", ("energy:0.95", "energy:0.99"), _WEIGHTS), {}),
    "adam-nscl": ("adam-nscl", _grid("rule", ("times:1000", "times:100"), _WEIGHTS), {}),
    "sgd, nothing protected": ("gpm", _rates(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, threshold=0.0, increment=0.0), {}),
    "gpm": ("gpm", _grid("threshold", (0.9, 0.97), (3e-2, 1e-1, 3e-1)), {}),
    "ftp": ("ftp", _grid("kappa", (1.0, 0.5), _WEIGHTS), {}),
    "l2-sp": ("l2-sp", _grid("strength", (0.01, 0.1), _WEIGHTS), {}),
    "sequential-lora": ("sequential-lora", _rates(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2), {}),
    "o-lora": ("o-lora", _grid("penalty", (0.5, 0.1), _ADAPTERS), {}),
    "sd-lora": ("sd-lora", _rates(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2), {}),
    "inf-lora": ("inf-lora", _grid("threshold", (0.95, 0.9), _ADAPTERS), {}),
    "lorac": ("lorac", _grid("penalty", (0.5, 0.1), _ADAPTERS), {}),
    "lorac-ipc": ("lorac-ipc", _grid("share", (0.05, 0.01), _ADAPTERS), {}),
    "l2p": ("l2p", _grid("length", (20, 6), (1e-3, 3e-3, 1e-2)), {}),
    "dualprompt": ("dualprompt", _grid("length", (20, 6), (1e-3, 3e-3, 1e-2)), {}),
    "coda-prompt": ("coda-prompt", _grid("length", (8, 4), (1e-3, 3e-3, 1e-2)), {}),
    "student alone": (
        "kdp",
        _rates(3e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2, distillation="none"),
        {"backbone": STUDENT["backbone"]},  # alone means without a teacher: one that is given is refused
    ),
    "kdp (student)": ("kdp", _grid("alpha", (0.5, 0.25), (1e-3, 3e-3, 1e-2)), STUDENT),
}
#: The trials that `_LOW` changes: label, option, its two values, and whether weights or an adapter train.
_LOWERED = (
    ("null-space", "rule", ("energy:0.95", "energy:0.99"), 0), ("adam-nscl", "rule", ("times:1000", "times:100"), 0),
    ("ftp", "kappa", (1.0, 0.5), 0), ("l2-sp", "strength", (0.01, 0.1), 0),
    ("o-lora", "penalty", (0.5, 0.1), 1), ("inf-lora", "threshold", (0.95, 0.9), 1),
    ("lorac", "penalty", (0.5, 0.1), 1), ("lorac-ipc", "share", (0.05, 0.01), 1),
)  # fmt: skip
#: Label: (method, the label whose settings it takes, further options; None: its learning rate alone).
TAKEN: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "sequential, rate of nsp2": ("sequential", "nsp2", None),
    "matched-lr": ("matched-lr", "nsp2", {"scale": "auto"}),
    "null-space matched": ("matched-lr", "null-space", {"base": "full", "scale": "auto"}),
}
ORDER = (
    "class-mean", "linear", "joint, prompts", "joint, weights",
    "sequential", "sequential, rate of nsp2", "sequential, small step", "matched-lr", "nsp2", "nsp2-exact",
    "full", "full, small step", "null-space matched", "null-space", "adam-nscl",
    "sgd, nothing protected", "gpm", "ftp", "l2-sp",
    "sequential-lora", "o-lora", "sd-lora", "inf-lora", "lorac", "lorac-ipc",
    "l2p", "dualprompt", "coda-prompt",
    "class-mean (student)", "student alone", "kdp (student)",
)  # fmt: skip


def trials_of(study: str) -> Trials:
    """`TRIALS`, with the rates of `_LOW` where the study has some."""
    rates = _LOW.get(study)
    if rates is None:
        return TRIALS
    lowered = {label: _grid(name, values, rates[kind]) for label, name, values, kind in _LOWERED}
    return {label: (method, lowered.get(label, trials), fields) for label, (method, trials, fields) in TRIALS.items()}


def choose(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the best mean score; of equal ones that with the lowest learning rate, then the first."""
    return min(trials, key=lambda trial: (-round(sum(trial["scores"]) / len(trial["scores"]), 9), trial["lr"]))


def rows(chosen: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row of the study, in the order of its table."""
    made = []
    for label in ORDER:
        if label in TRIALS:
            method, _, fields = TRIALS[label]
            made.append({"label": label, "method": method, **fields, **chosen[label]})
        elif label in TAKEN:
            method, of, options = TAKEN[label]
            taken = {"lr": chosen[of]["lr"]}
            if options is not None:
                taken["options"] = {**chosen[of]["options"], **options}
            made.append({"label": label, "method": method, **taken})
        else:
            fields = {"backbone": STUDENT["backbone"]} if "student" in label else {}
            made.append({"label": label, "method": "class-mean", **fields})
    return made


def written(text: str, chosen: dict[str, dict[str, Any]]) -> str:
    """The study's file `text` with the rows between its markers written anew."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"the file has no rows between {BEGIN.strip()!r} and {END.strip()!r}")
    tables = ["[[row]]\n" + "".join(f"{key} = {_toml(item)}\n" for key, item in row.items()) for row in rows(chosen)]
    return head + found + "\n".join(tables) + closed + tail


def _slug(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "-")


def _toml(item: Any) -> str:
    if isinstance(item, dict):
        return "{ " + ", ".join(f"{key} = {_toml(value)}" for key, value in item.items()) + " }"
    return json.dumps(item)


def main() -> int:
    from cl_kernels.continual import study, workers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help=f"{', '.join(SEEDS)} with .toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=workers.cores())
    given = parser.parse_args()
    with open(given.study, "rb") as file:
        settings = tomllib.load(file)
    shared = {**settings["run"], **settings["stream"][0], **TUNED[given.study.stem]}
    shared.pop("title", None)
    seeds, every = SEEDS[given.study.stem], trials_of(given.study.stem)
    jobs = [
        study.Job(
            f"{label}: {trial}", "", str(given.out / f"{_slug(label)}-{number}-seed{seed}"),
            {**shared, "method": method, **fields, **trial, "seed": seed},
        )
        for label, (method, trials, fields) in every.items() for number, trial in enumerate(trials) for seed in seeds
    ]  # fmt: skip

    def told(job: study.Job, outcome: dict[str, Any] | str) -> None:
        result = outcome if isinstance(outcome, str) else f"{100 * outcome['average_accuracy']:.1f}"
        sys.stdout.write(f"{job.label}, seed {job.seed}: {result}\n")
        sys.stdout.flush()

    results, failures = study.execute(jobs, given.jobs, told)
    if failures:
        raise SystemExit(f"{len(failures)} trials failed, first: {failures[0][0].label}: {failures[0][1]}")
    scores = iter(result["average_accuracy"] for result in results)
    found: dict[str, Any] = {}
    for label, (_, trials, _) in every.items():
        tried = [{**trial, "scores": [next(scores) for _ in seeds]} for trial in trials]
        best = choose(tried)
        found[label] = {"trials": tried, "chosen": {name: best[name] for name in best if name != "scores"}}
    kept = {"seeds": seeds, "run": shared, "seconds": sum(r["seconds"]["total"] for r in results), "methods": found}
    target = ROOT / "benchmarks" / "results" / f"{given.study.stem}_tuning.json"
    target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name in (given.study.stem, *ALSO.get(given.study.stem, ())):
        file = given.study.with_name(f"{name}.toml")
        chosen = {label: one["chosen"] for label, one in found.items()}
        file.write_text(written(file.read_text(encoding="utf-8"), chosen), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
