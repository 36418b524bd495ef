"""examples/sixth_task.py: ours and the official way give the same, bytes are the tensors', what is wrong stops it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cl_kernels.benchmarks import official_ends, official_steps, task_costs
from conftest import ROOT

from cl_kernels import data

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

RANK, PROMPTS = 8, 4  # defaults of the methods
Report = dict[str, Any]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("sixth_task", ROOT / "examples" / "sixth_task.py")
    if spec is None or spec.loader is None:
        pytest.fail("the example is not where it should be")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, spec.name, module)  # where dataclasses look their annotations up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def report(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("sixth") / "sixth_task.json"
    threads = torch.get_num_threads()
    assert example.main(["--quick", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads

    def refused(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    found: Report = json.loads(out.read_text(), parse_constant=refused)
    return found


def stream(report: Report) -> dict[str, dict[str, Any]]:
    return {row["title"]: row for row in report["rows"] if row["step_ms"] is not None}


def test_every_row_has_equal_results_and_all_columns(report: Report, example: ModuleType) -> None:
    rows = stream(report)
    assert list(rows) == [title for title, _, _ in example.METHODS]
    assert 0 < len(report["columns"]) <= 9
    for row in report["rows"]:
        assert {key for key, _, _ in report["columns"]} <= row.keys()
        assert row["step_difference"] <= task_costs.STEP_LIMIT
        assert row.get("end_difference", 0.0) <= task_costs.END_LIMIT
        assert row["own_ms"] == pytest.approx(sum(part["ours_ms"] for part in row["parts"].values()))
    for title, row in rows.items():
        assert min(row["step_ms"], row["own_ms"], row["end_s"], row["kept_mb"], row["official_kept_mb"]) > 0
        assert (row["official_end_x"] is None) == (title in ("ftp", "lorac"))
    assert any("own part" in note for note in report["notes"])
    at_shapes = [row["method"] for row in report["rows"] if row["step_ms"] is None]
    assert at_shapes == ["nsp2", "adam-nscl", "gpm", "ftp", "lorac", "inf-lora"]
    text = json.dumps(report)
    assert str(ROOT) not in text, "a path of this machine is in the results"
    assert {"commit", "torch", "cpu"} <= report["environment"].keys()


def test_bytes_are_those_of_the_tensors(report: Report) -> None:
    """Counted again here from the shapes of the backbone alone."""
    rows, (model, _) = stream(report), data.load_backbone(report["settings"]["backbone"])
    width, depth, tasks = model.embed_dim, len(model.blocks), report["settings"]["tasks"]
    named = {
        n: p for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith("weight") and p.ndim > 1
    }
    inputs = sum(p.shape[1] ** 2 for p in named.values())
    weights, lines = sum(p.numel() for p in named.values()), sum(len(p) for p in named.values())
    squares = depth * (width**2 + PROMPTS**2)
    assert rows["nsp2"]["official_kept_bytes"] == 4 * (2 * squares + depth * PROMPTS * width)
    assert rows["adam-nscl"]["official_kept_bytes"] == 4 * 3 * inputs
    # FTP: anchors and cached displacements, a number a row, three a tensor; ours two anchors and a record of 8
    assert rows["ftp"]["official_kept_bytes"] == 4 * (2 * weights + lines + 3 * len(named))
    assert rows["ftp"]["kept_bytes"] == 4 * (2 * weights + 8 * len(named))
    places = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    factors = depth * sum(RANK * tasks * (a + b) for a, b in places)
    assert rows["lorac"]["official_kept_bytes"] == 4 * (factors + depth * 6 * (2 * tasks + tasks**2))
    assert rows["lorac"]["kept_bytes"] == rows["lorac"]["official_kept_bytes"]  # omega, norms and bank
    for title in ("adam-nscl", "nsp2"):
        thin = rows[title]["kept_bytes"] - 8 * (inputs if title == "adam-nscl" else squares)
        assert 0 < thin < rows[title]["official_kept_bytes"]


def test_what_is_wrong_has_no_time(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A term that is 1 % off, and a basis with one direction less, end the run and write nothing."""
    right, needed = official_steps.drift, official_ends.needed
    cases: list[tuple[str, Any, str, Any]] = [
        ("nsp2", official_steps, "drift", lambda *given: 1.01 * right(*given)),
        ("gpm", official_ends, "needed", lambda *given: max(needed(*given) - 1, 0)),
    ]
    for method, module, name, wrong in cases:
        monkeypatch.setattr(example, "METHODS", [row for row in example.METHODS if row[0] == method])
        with monkeypatch.context() as patched:
            patched.setattr(module, name, wrong)
            assert example.main(["--quick", "--out", str(tmp_path / "out.json")]) == 2
        assert f"{method}: {'step' if method == 'nsp2' else 'end'}_difference is" in capsys.readouterr().err
        monkeypatch.undo()
    assert not (tmp_path / "out.json").exists()


def test_ways_take_turns_and_differences_are_relative() -> None:
    called: list[str] = []
    ways = {name: (lambda name=name: called.append(name)) for name in "abc"}
    found = task_costs.turns(ways, 3)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert {len(seconds) for seconds in found.values()} == {3}
    one = torch.ones(4)
    assert task_costs.relative([one, 1.1 * one], [one, one]) == pytest.approx(0.1)
    assert task_costs.relative([1e-9 * one], [0 * one], [2.0]) == pytest.approx(1e-9)
    assert task_costs.bytes_of([one, one, one.clone(), one[:0]]) == 32
