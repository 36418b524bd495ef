"""The comparison from data to a decision: what it writes, what it never reads, kills and resumes, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_small import ARMS, comparable, run_small, small_config, small_data, trained
from test_resume import Server

from cl_kernels.compare import engine, finish, runner, session
from cl_kernels.compare.planner import BudgetError
from cl_kernels.compare.subsets import SealedLabels
from cl_kernels.compare.tuning import ranked_by_rule
from cl_kernels.continual import load_model

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One comparison, run to its end."""
    out = tmp_path_factory.mktemp("compare")
    return out, run_small(out)


def test_results_hold_every_section(whole: tuple[Path, dict[str, Any]]) -> None:
    out, results = whole
    assert json.loads((out / "results.json").read_text()) == results
    assert results["schema"] == "cl_kernels.compare/1"
    sections = {
        "settings", "environment", "data", "probes", "distance", "sizes", "arms", "runs", "cost", "diagnosis",
        "pictures", "decision", "budget", "weights", "missing",
    }  # fmt: skip
    assert sections <= results.keys()
    assert results["decision"]["verdict"] in ("prompts", "full", "other", "too-close")
    assert len(results["sizes"]) == 4
    assert {(run["arm"], run["size"], run["seed"]) for run in results["runs"]} == {
        (arm, size, draw) for arm in ARMS for size in results["sizes"] for draw in (0, 1)
    }
    for name in ("report.html", "report.md", "curves.csv"):
        assert (out / name).stat().st_size > 500


def test_arms_see_the_same_images(whole: tuple[Path, dict[str, Any]]) -> None:
    """PB10: one data hash for all arms of a size and draw, another for every other."""
    _, results = whole
    hashes: dict[tuple[int, int], set[str]] = {}
    for run in results["runs"]:
        hashes.setdefault((run["size"], run["seed"]), set()).add(run["data_hash"])
    assert all(len(found) == 1 for found in hashes.values())
    smaller = {key: found for key, found in hashes.items() if key[0] < max(results["sizes"])}
    assert len({next(iter(found)) for found in smaller.values()}) == len(smaller), "draws and sizes differ"


def test_tuning_is_equal(whole: tuple[Path, dict[str, Any]]) -> None:
    _, results = whole
    trials = {arm["name"]: arm["tuning"]["trials"] for arm in results["arms"]}
    plans = [[(t["size"], t["rung"], t["epochs"], t["repeats"]) for t in found] for found in trials.values()]
    assert all(plan == plans[0] for plan in plans)
    for arm in results["arms"]:
        trials_at_top = [t for t in arm["tuning"]["trials"] if t["size"] == max(results["sizes"])]
        last = [t for t in trials_at_top if t["rung"] == max(t["rung"] for t in trials_at_top)]
        assert arm["tuning"]["chosen"] == ranked_by_rule(last)[0]["options"]


def test_accuracies_learn_something_and_are_those_of_the_weights(whole: tuple[Path, dict[str, Any]]) -> None:
    out, results = whole
    top = max(results["sizes"])
    data = small_data()
    for arm in ARMS:
        model = load_model(out / results["weights"][arm]["file"])
        told = model(data.test.tensors()).argmax(dim=1)
        accuracy = float((told == data.test.labels).double().mean())
        run = next(r for r in results["runs"] if (r["arm"], r["size"], r["seed"]) == (arm, top, 0))
        assert accuracy == pytest.approx(run["accuracy_last"], abs=0.017)
        assert accuracy > 0.5


def test_costs_and_diagnosis_are_there(whole: tuple[Path, dict[str, Any]]) -> None:
    _, results = whole
    cost = {entry["arm"]: entry for entry in results["cost"]}
    assert set(cost) == set(ARMS)
    assert cost["vpt-deep"]["trainable_parameters"] < cost["full"]["trainable_parameters"]
    assert cost["full"]["task_bytes"]["20"] > 10 * cost["vpt-deep"]["task_bytes"]["20"]
    assert cost["linear"]["macs"] < cost["vpt-deep"]["macs"]
    rows = {row["arm"]: row for row in results["diagnosis"]}
    assert rows["linear"]["drift"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert rows["full"]["drift"]["cosine"] < 0.999
    assert all(0 < share < 1 for share in rows["vpt-deep"]["prompt_mass"])


def test_a_finished_comparison_is_not_trained_again(whole: tuple[Path, dict[str, Any]]) -> None:
    out, results = whole
    before = trained(out)
    again = run_small(out, resume=True, prefer="storage")
    assert trained(out) == before
    assert again["runs"] == results["runs"]
    with pytest.raises(FileExistsError, match="holds a comparison already"):
        run_small(out)


def test_a_changed_setting_is_refused_with_the_difference(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = whole
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other settings \(budget: 20m00s -> 10m00s; seed: 0 -> 3\)"):
        run_small(out, resume=True, budget="10m", seed=3)
    with pytest.raises(ValueError, match="data hash"):
        run_small(out, small_data(test=59), resume=True)
    other = small_data()
    shown = other.test.subset(torch.arange(60).flip(0))
    shown.labels = other.test.labels
    with pytest.raises(ValueError, match="data hash"):
        run_small(out, dataclasses.replace(other, test=shown), resume=True)
    monkeypatch.setattr(session, "__version__", "0.0.0")
    with pytest.raises(ValueError, match="version: "):
        run_small(out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_no_choice_depends_on_test_labels(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """PB11: with other test labels every trial, every chosen setting and every prediction is the same."""
    _, results = whole
    data = small_data()
    data.test.labels = data.test.labels.flip(0)
    other = run_small(tmp_path, data)
    for mine, theirs in zip(comparable(results)["arms"], comparable(other)["arms"], strict=True):
        assert mine == theirs
    assert [run["digests"] for run in other["runs"]] == [run["digests"] for run in results["runs"]]
    assert other["decision"]["prompts_arm"] == results["decision"]["prompts_arm"]
    assert [run["accuracy_last"] for run in other["runs"]] != [run["accuracy_last"] for run in results["runs"]]


def test_test_labels_are_opened_once_everything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    unseal = SealedLabels.unseal

    def noting(self: SealedLabels) -> None:
        seen.append(trained(tmp_path))
        unseal(self)

    monkeypatch.setattr(SealedLabels, "unseal", noting)
    monkeypatch.setattr(finish, "_cost", lambda *args: None)
    results = run_small(tmp_path, arms=("vpt-deep", "full"))
    tuned = sum(t["repeats"] for arm in results["arms"] for t in arm["tuning"]["trials"])
    assert seen == [tuned + len(results["runs"])]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("the runs to be killed are forked")
    made = Server()
    yield made
    made.close()


def test_kill_9_repeats_at_most_one_trial(server: Server, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Killed while it tunes, at the end of that, in the sweep (twice), and after its last trial."""
    total, rng, out = trained(whole[0]), random.Random(1), tmp_path / "run"
    left, killed = total, 0
    for share in (0.2, 0.5, 0.5, 0.9, 1.0):
        before = trained(out) if killed else 0
        kill = (max(1, round(share * left)), rng.uniform(0.0, 0.05))
        status = server.run(compare=True, out=str(out), resume=True, kill=kill)
        assert status == -signal.SIGKILL
        killed += 1
        left -= trained(out) - before - 1
        assert total <= trained(out) + left <= total + killed
    assert server.run(compare=True, out=str(out), resume=True) == 0
    assert comparable(json.loads((out / "results.json").read_text())) == comparable(whole[1])
    assert total < trained(out) <= total + killed
    assert not list(out.rglob("*.tmp"))


class Ticking:
    """A clock that goes on by 10 ms at every look, and by `slow` seconds once so many trials were begun. A trial looks
    about once a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trials: int, slow: float) -> None:
        self.time, self.begun, self._trials, self._slow = 0.0, 0, trials, slow
        train = runner.train_trial

        def counting(*args: Any, **options: Any) -> Any:
            self.begun += 1
            return train(*args, **options)

        monkeypatch.setattr(runner, "train_trial", counting)

    def __call__(self) -> float:
        self.time += self._slow if self.begun > self._trials else 0.01
        return self.time


def test_a_budget_too_small_says_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"budget: 1s is too small .* give --budget \d+s or more"):
        engine.compare(small_config(tmp_path, budget="1s"), small_data(), clock=time.process_time)


def test_a_machine_that_slows_down_drops_whole_cells_and_keeps_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty-five times slower from the second cell on: 8 trials tune, 4 are the two draws of the largest size."""
    config = small_config(tmp_path, budget="40s", arms=("vpt-deep", "full"))
    results = engine.compare(config, small_data(), clock=Ticking(monkeypatch, 10, 0.25))
    assert results["budget"]["spent"] <= 1.1 * 40
    runs = {(run["size"], run["seed"]) for run in results["runs"]}
    assert len(results["runs"]) == 2 * len(runs), "a cell is run for both arms or for none"
    assert {(60, 0), (60, 1)} <= runs
    assert len(runs) < 8
    assert any("slower than planned" in note for note in results["missing"])
    assert results["decision"]["sentence"]


def test_a_largest_size_that_does_not_fit_leaves_models_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "fits", lambda plan, rates, arms, cell, left: cell[0] < 60)
    results = run_small(tmp_path, arms=("vpt-deep", "full"))
    assert 60 not in results["sizes"], "a second draw alone is of no use"
    assert [entry["arm"] for entry in results["cost"]] == ["vpt-deep", "full"]
    top = max(results["sizes"])
    run = next(run for run in results["runs"] if (run["arm"], run["size"], run["seed"]) == ("full", top, 0))
    data = small_data()
    told = load_model(tmp_path / "best_full.safetensors")(data.test.tensors()).argmax(dim=1)
    assert float((told == data.test.labels).double().mean()) == pytest.approx(run["accuracy_last"], abs=0.017)
    assert any("size 60, draw 1; size 60, draw 2" in note for note in results["missing"])


@pytest.mark.parametrize("trials", [1, 6])
def test_a_machine_that_stands_still_says_what_it_would_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    """In the first rung of tuning, and in the sweep."""
    config = small_config(tmp_path, budget="40s", arms=("vpt-deep", "full"))
    with pytest.raises(BudgetError, match="budget: 40s ended before any size was run with two draws"):
        engine.compare(config, small_data(), clock=Ticking(monkeypatch, trials, 3.0))


def test_data_without_a_test_split_are_split_and_it_is_said(tmp_path: Path) -> None:
    data = small_data()
    empty = dataclasses.replace(data, test=data.test.subset(torch.arange(0)))
    results = run_small(tmp_path, empty, arms=("vpt-deep", "full"))
    assert results["data"]["train"]["n"] == 44
    assert results["data"]["test"]["n"] == 16
    assert "no test split" in results["data"]["test_from"]
    assert any("no test split" in note for note in results["missing"])


def folder(root: Path, classes: int, images: int = 6) -> Path:
    image = pytest.importorskip("PIL.Image", reason="writing pictures needs Pillow")
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(images):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            image.fromarray(pixels.numpy()).save(root / f"class{label}" / f"{number}.png")
    return root


Command = Callable[..., tuple[int, str, str]]


def test_bad_input_is_told_in_one_line_with_exit_code_2(command: Command, tmp_path: Path) -> None:
    one, none = folder(tmp_path / "one", 1), tmp_path / "none"
    none.mkdir()
    few = folder(tmp_path / "few", 2, images=3)
    broken = folder(tmp_path / "broken", 2)
    (broken / "class0" / "0.png").write_bytes(b"\x89PNG no picture")
    cases = [
        (["--data", str(one)], 2, "at least two class folders"),
        (["--data", str(none)], 2, "at least two class folders"),
        (["--data", str(few)], 2, "at least 5 training images, got 4"),
        (["--data", "digitz"], 2, "did you mean digits"),
        (["--data", str(tmp_path / "missing.npz")], 2, "no such file"),
        (["--data", str(broken), "--strict"], 1, "0.png"),
        (["--backbone", "vit_base_patch16_225"], 2, "nearest: vit_base_patch16_224"),
        (["--backbone", "vit_base_patch16_224"], 2, "needs its weights"),
        (["--budget", "soon"], 2, "budget: expected a time"),
        (["--arms", "full,vpt-deap"], 2, "did you mean vpt-deep"),
        (["--budget", "1s", "--backbone", "embedded-small"], 2, "too small to decide"),
        (["--reference", str(tmp_path / "nothing"), "--backbone", "embedded-small"], 2, "nothing"),
    ]
    for number, (words, code, message) in enumerate(cases):
        out = tmp_path / f"out{number}"
        found, _, err = command("compare", *words, "--out", str(out), "--threads", "1")
        assert (found, message in err) == (code, True), (words, found, err)
        assert "Traceback" not in err


def test_broken_images_are_left_out_and_counted(command: Command, tmp_path: Path) -> None:
    """Exit code 4: two classes of noise cannot be told apart by anything."""
    data = folder(tmp_path / "data", 2, images=24)
    (data / "class1" / "3.png").write_bytes(b"\x89PNG no picture")
    out = tmp_path / "out"
    code, told, err = command(
        "compare", "--data", str(data), "--backbone", "embedded-small", "--arms", "vpt-deep,full", "--quick",
        "--no-pictures", "--threads", "1", "--budget", "60m", "--out", str(out),
    )  # fmt: skip
    assert code == 4, err
    assert "Too close to call" in told
    assert "1 broken image" in told
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["skipped"] == 1
    assert results["decision"]["verdict"] == "too-close"
    assert "size sweep" in err, "progress in plain lines where there is no terminal"
