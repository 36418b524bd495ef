"""Scaling curves and end-to-end shares: what is written, what is refused, and the arithmetic between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cl_kernels.benchmarks import bench_covariance, end_to_end, figures, harness, records, sweeps

Run = Callable[..., tuple[int, str, str]]
RATES = harness.Rates(sgemm=100.0, dgemm=50.0, bf16gemm=400.0, copy=40.0)


def test_growth_is_the_slope_at_the_end() -> None:
    assert sweeps.growth([10, 20, 40], [1.0, 5.0, 20.0]) == pytest.approx(2.0)
    assert sweeps.growth([10, 20], [1.0, None]) is None
    assert sweeps.growth([10], [1.0]) is None


def test_every_curve_can_be_built_where_it_is_small() -> None:
    """Its first point, at least: the builders take what the table gives them; nothing is measured."""
    assert {"rows", "width", "layers", "tasks", "blocks"} <= {sweep.axis for sweep in sweeps.SWEEPS}
    for sweep in sweeps.SWEEPS:
        assert sweep.values == tuple(sorted(sweep.values))
        names = {sweep.at(value, "cpu").name for value in sweep.values}
        assert len(names) == len(sweep.values), f"{sweep.name}: the case is the same at two values"


def test_a_curve_is_measured_written_and_drawn(command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows(n: int, device: str) -> harness.Plan:
        return bench_covariance.one_layer(n, 8, torch.float32)

    monkeypatch.setattr(sweeps, "SWEEPS", (sweeps.Sweep("covariance", "rows", (20, 40, 80), rows),))
    code, out, _ = command("bench", "covariance", "--sweep", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert code == 0
    assert "covariance against rows: 20, 40" in out
    report = records.read(tmp_path / "sweeps.json")
    (curve,) = report["sweeps"]
    assert curve["values"] == [20, 40], "--quick takes the two smallest"
    assert set(curve["seconds"]) == {"ours", "torch C += X.T @ X"}
    assert curve["growth"]["ours"] == pytest.approx(sweeps.growth([20, 40], curve["seconds"]["ours"]))
    assert [one["case"] for one in report["results"]] == ["covariance 20x8 float32", "covariance 40x8 float32"]
    drawn = tmp_path / "figures" / "covariance-against-rows.png"
    assert drawn.is_file() == figures.available()
    code, _, err = command("bench", "import", "--sweep")
    assert code == 2
    assert "--sweep: import has no curve; known are covariance" in err


def test_a_wrong_curve_is_an_error(command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_covariance.ops, "update_covariance_", lambda cov, x: cov)
    sweep = sweeps.Sweep("covariance", "rows", (20,), lambda n, _: bench_covariance.one_layer(n, 8, torch.float32))
    monkeypatch.setattr(sweeps, "SWEEPS", (sweep,))
    assert command("bench", "--sweep", "--device", "cpu", "--out", str(tmp_path))[0] == 1


def found(method: str, part: str, before: float, after: float, each: str = "step") -> dict[str, Any]:
    return {"method": method, "part": part, "each": each, "before_s": before, "after_s": after}


def test_shares_are_of_the_step_and_not_of_the_task() -> None:
    rows = [found("m", "model", 3.0, 3.0), found("m", "step", 1.0, 0.2), found("m", "svd", 100.0, 1.0, "task")]
    (one,) = end_to_end.shares([*rows, found("other", "x", 1.0, 1.0)])[:1]
    assert (one["before_s"], one["after_s"]) == (4.0, 3.2)
    assert [part["before"] for part in one["parts"]] == [0.75, 0.25]
    assert sum(part["after"] for part in one["parts"]) == pytest.approx(1.0)
    assert [part["part"] for part in one["once_a_task"]] == ["svd"]


def test_parts_name_variants_that_exist_and_are_measured_once() -> None:
    parts = list(end_to_end.parts(end_to_end.TINY, "cpu"))
    assert {part.method for part in parts} == {"nsp2", "ftp-adamw", "lora stack, 5 tasks", "distillation"}
    known: dict[str, Any] = {}
    for part in parts:
        rows = [{"variant": name, "median_s": 0.5} for name in ("ours", part.before)]
        known[part.plan.name] = {"rows": rows}
    rows = [end_to_end.measured(part, known, RATES, "cpu", 0.0) for part in parts]
    assert [row["before_s"] for row in rows if row["part"] == "adapted layers"] == [end_to_end.TINY.depth * 0.5]
    known[parts[1].plan.name]["rows"][1] = {"variant": parts[1].before, "failed": "official loop is wrong"}
    with pytest.raises(ValueError, match="official loop is wrong"):
        end_to_end.measured(parts[1], known, RATES, "cpu", 0.0)


def test_a_tiny_model_from_end_to_end(command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two real parts, through the command line, to the table."""
    pytest.importorskip("timm", reason="the model is timm's")
    real = end_to_end.parts

    def two(model: end_to_end.Model, device: str) -> list[end_to_end.Part]:
        return [part for part in real(model, device) if part.method == "ftp-adamw"]

    monkeypatch.setattr(end_to_end, "parts", two)
    code, out, _ = command("bench", "--end-to-end", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert code == 0
    assert "### ftp-adamw" in out
    report = json.loads((tmp_path / "end-to-end.json").read_text())
    (one,) = report["methods"]
    assert one["before_s"] > 0
    assert records.read(tmp_path / "end-to-end.json")["environment"]["threads"] == 1
    assert out == (tmp_path / "end-to-end.md").read_text()
