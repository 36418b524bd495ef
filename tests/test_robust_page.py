"""docs/robust.md tells the truth: tables come from kept runs, the runs from the settings, the settings from trials."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_kernels import continual, data, methods
from cl_kernels.continual import study
from cl_kernels.data import corruptions

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "robust.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
KEPT: dict[str, Any] = json.loads((RESULTS / "robust.json").read_text(encoding="utf-8"))
TUNING: dict[str, Any] = json.loads((RESULTS / "robust_tuning.json").read_text(encoding="utf-8"))
RUNS: list[dict[str, Any]] = KEPT["runs"]
SEEDS = (0, 1, 2)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


page = load("scripts/robust_page.py")
CHOSEN, HIGH = page.titles(RUNS)


def test_tables_are_those_of_the_files() -> None:
    assert page.filled(PAGE, KEPT, TUNING) == PAGE, "python scripts/robust_page.py"
    changed = re.sub(r"(\d)\.(\d) ±", r"\1.9\2 ±", PAGE)
    assert changed != PAGE
    assert page.filled(changed, KEPT, TUNING) == PAGE
    with pytest.raises(SystemExit, match="no section"):
        page.filled("a page without markers", KEPT, TUNING)


def test_the_kept_runs_are_those_of_the_settings() -> None:
    jobs = study.load_plan(ROOT / "examples" / "robust.toml", "out", seeds=len(SEEDS)).jobs
    assert KEPT["quick"] is False
    assert len(jobs) == len(RUNS)
    kept = {(run["title"], run["label"], run["seed"]): run["config"] for run in RUNS}
    for job in jobs:
        config = continual.RunConfig(**job.settings)
        assert config.eval_shift
        assert kept[job.title, job.label, config.seed] == config.as_json()
    for run in RUNS:
        assert list(run["shift"]["families"]) == corruptions.names()
        assert run["shift"]["clean"] == run["average_accuracy"]


def test_the_settings_are_those_that_the_trials_chose() -> None:
    """With as many trials for one method as for another, and none of them with a seed that is reported."""
    tuning = load("examples/robust_tuning.py")
    assert not set(TUNING["seeds"]) & set(SEEDS)
    assert {len(entry["trials"]) for entry in TUNING["methods"].values()} == {6}
    assert {name: [{**t} for t in trials] for name, trials in tuning.TRIALS.items()} == {
        name: [{k: v for k, v in trial.items() if k != "scores"} for trial in entry["trials"]]
        for name, entry in TUNING["methods"].items()
    }
    for entry in TUNING["methods"].values():
        best = tuning.choose(entry["trials"])
        assert {name: value for name, value in best.items() if name != "scores"} == entry["chosen"]
    for run in RUNS:
        chosen = TUNING["methods"]["full" if run["method"] == "wise-ft" else run["method"]]["chosen"]
        assert run["config"]["lr"] == (chosen["lr"] if run["title"] == CHOSEN else 1e-3)
        said = {name: value for name, value in run["config"]["options"].items() if name != "alpha"}
        assert said == chosen.get("options", {})


def test_the_tie_rule() -> None:
    choose = load("examples/robust_tuning.py").choose
    trials = [{"lr": 1.0, "scores": [0.9, 0.7]}, {"lr": 0.5, "scores": [0.8, 0.8]}, {"lr": 0.1, "scores": [0.7, 0.8]}]
    assert choose(trials) == trials[1]


def test_a_trial_trains_on_most_images_and_sees_no_test_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="the backbone is timm's")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    given: list[Any] = []

    def run(config: continual.RunConfig, *, data: Any) -> dict[str, Any]:
        given.append((config, data))
        return {"average_accuracy": 0.5}

    monkeypatch.setattr(continual, "run", run)
    assert load("examples/robust_tuning.py").score(("full", {"lr": 0.5}, 100)) == 0.5
    ((config, parts),) = given
    assert (config.lr, config.seed, config.eval_shift, config.epochs) == (0.5, 100, False, 4)
    whole = data.load("digits", image_size=32).train
    assert (len(parts.train), len(parts.test), len(whole)) == (1010, 337, 1347)
    rows = torch.cat([parts.train._rows, parts.test._rows])
    assert torch.equal(rows.sort().values, whole._rows.sort().values), "all training images, each on one side"


def test_the_figure_is_small_and_whole() -> None:
    figure = (ROOT / "docs" / "figures" / "robust.svg").read_text(encoding="utf-8")
    assert len(figure) < 100_000
    assert not re.findall(r'href="(?!#)[^"]*"', figure), "it loads nothing from elsewhere"
    assert all(label in figure for label in ("full", "ftp", "l2-sp", "wise-ft", CHOSEN, HIGH))


def test_the_figure_is_drawn_from_the_kept_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure is matplotlib's")
    page.draw(RUNS, tmp_path / "again.svg")
    labels = re.compile(r"<text[^>]*>([^<]*)</text>")
    drawn, committed = (
        labels.findall(path.read_text(encoding="utf-8"))
        for path in (tmp_path / "again.svg", ROOT / "docs" / "figures" / "robust.svg")
    )
    assert drawn == committed, "python scripts/robust_page.py"


def test_what_it_names_exists(command: Callable[..., tuple[int, str, str]]) -> None:
    named = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE))
    assert named == {"full", "l2-sp", "ftp", "tpgm", "spd", "wise-ft"}
    assert named <= set(methods.names())
    (block,) = re.findall(r"```console\ncl-kernels train (.*?)\n```", PAGE)
    _, told, _ = command("train", "--help")
    assert set(re.findall(r"--[\w-]+", block)) <= set(re.findall(r"--[\w-]+", told))


def test_the_kept_numbers_are_those_of_the_code() -> None:
    """The cheapest line again; platforms differ in an image or two."""
    pytest.importorskip("timm", reason="the backbone is timm's")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    (run,) = (r for r in RUNS if (r["title"], r["label"], r["seed"]) == (CHOSEN, "linear", 0))
    values = {k: v for k, v in run["config"].items() if k in continual.RunConfig.__dataclass_fields__}
    again = continual.run(continual.RunConfig(**{**values, "eval_shift": False, "threads": 1}))
    assert again["average_accuracy"] == pytest.approx(run["average_accuracy"], abs=0.01)


def mean(title: str, label: str, name: str) -> float:
    return statistics.mean(run["shift"][name] for run in page.of(RUNS, title, label))


def difference(title: str, label: str, name: str) -> float:
    return statistics.mean(page.differences(RUNS, title, label, name))


class TestConclusions:
    """In the order of the page."""

    def test_at_the_chosen_learning_rates_nothing_is_traded(self) -> None:
        gained = {name: -difference(CHOSEN, "linear", name) for name in ("clean", "mean")}
        assert 0 < gained["clean"] < gained["mean"]
        for label in ("l2-sp", "spd", "tpgm"):
            for name in ("clean", "mean"):
                assert abs(difference(CHOSEN, label, name)) <= 0.002, (label, name)
        for alpha in ("0.25", "0.5", "0.75"):
            assert difference(CHOSEN, f"wise-ft, alpha {alpha}", "clean") < 0
            assert difference(CHOSEN, f"wise-ft, alpha {alpha}", "mean") < 0

    def test_ftp_is_behind_on_both(self) -> None:
        assert difference(CHOSEN, "ftp", "clean") < 0
        assert difference(CHOSEN, "ftp", "mean") < 0
        rates = {name: entry["chosen"]["lr"] for name, entry in TUNING["methods"].items() if name != "linear"}
        assert rates.pop("ftp") == 1e-3 > max(rates.values())
        for one, other in zip(page.of(RUNS, CHOSEN, "ftp"), page.of(RUNS, HIGH, "ftp"), strict=True):
            assert one["shift"] == other["shift"]

    def test_the_average_of_both_weights_gains_at_the_high_rate(self) -> None:
        average = "wise-ft, alpha 0.5"
        assert min(page.differences(RUNS, HIGH, average, "mean")) > 0
        assert difference(HIGH, average, "mean") == pytest.approx(0.010, abs=0.0005)
        assert difference(HIGH, average, "clean") >= 0
        best = max(
            (mean(title, label, "mean"), label) for title in (CHOSEN, HIGH) for label in page.labels(RUNS, title)
        )
        assert best == (mean(HIGH, average, "mean"), average)
        for label in ("l2-sp", "ftp"):
            assert difference(HIGH, label, "mean") < 0
        spreads = {
            title: statistics.stdev(run["shift"]["clean"] for run in page.of(RUNS, title, "full"))
            for title in (CHOSEN, HIGH)
        }
        assert spreads[HIGH] > 2 * spreads[CHOSEN]

    def test_five_families_cost_most(self) -> None:
        runs = page.of(RUNS, CHOSEN, "full")
        lost = {
            name: statistics.mean(
                run["shift"]["clean"] - statistics.mean(run["shift"]["families"][name]) for run in runs
            )
            for name in corruptions.names()
        }
        costly = {"frost", "fog", "contrast", "elastic", "impulse-noise"}
        assert min(lost[name] for name in costly) > 0.02
        assert max(lost[name] for name in set(lost) - costly) < 0.01
