"""`make gpu` as far as it can be proved without a GPU: parts, going on where time ran out, what its table claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cl_kernels.benchmarks import gpu_report, resources, run_gpu, sanitize

ROOT = Path(__file__).resolve().parents[1]
DEVICE = {"device": "A GPU", "torch": "2.13", "cuda": "13.0"}
NOW = {"commit": "c" * 40, "changed": False, "date": "today", **DEVICE, "driver": "1"}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was run, instead of running it; the time is up after three units."""
    seen: list[str] = []
    now = [0.0]

    def do(unit: run_gpu.Unit, out: Path, left: float) -> dict[str, Any]:
        seen.append(unit.key)
        now[0] += 200.0
        return {"status": "done", "seconds": 200.0, "tail": []}

    monkeypatch.setattr(run_gpu, "do", do)
    monkeypatch.setattr(run_gpu, "describe", lambda device: dict(NOW))
    monkeypatch.setattr(run_gpu, "SITE", tmp_path)
    monkeypatch.setattr(run_gpu.time, "monotonic", lambda: now[0])
    return seen


def test_parts_are_the_whole_and_nothing_twice(tmp_path: Path) -> None:
    every = run_gpu.units(tmp_path)
    for n in (1, 2, 3, 5):
        parts = [run_gpu.chosen(every, f"{k}/{n}") for k in range(1, n + 1)]
        assert [unit.key for part in parts for unit in part] == [unit.key for unit in every if unit.kind != "build"]
        most = max(sum(unit.seconds for unit in part) for part in parts)
        assert most <= sum(unit.seconds for unit in every) / n + max(unit.seconds for unit in every)
    assert len({unit.key for unit in every}) == len(every) == len({unit.log for unit in every})
    assert {unit.kind for unit in every} == set(run_gpu.KINDS)
    assert {unit.kind for unit in run_gpu.chosen(every, "benchmarks")} == {"benchmarks"}
    for wrong in ("0/3", "4/3", "2", "bench", "", "1/0"):
        with pytest.raises(ValueError, match="expected k/n such as 2/3"):
            run_gpu.chosen(every, wrong)


def test_the_same_command_goes_on_where_time_ran_out(done: list[str], tmp_path: Path) -> None:
    wanted = run_gpu.chosen(run_gpu.units(tmp_path), "tests")
    report = run_gpu.run(wanted, tmp_path, DEVICE)
    assert done == ["build", wanted[0].key, wanted[1].key]
    assert report["units"][wanted[2].key] == {"status": "not run: the time was up"}
    assert json.loads((tmp_path / "report.json").read_text())["units"][wanted[1].key]["status"] == "done"
    run_gpu.run(wanted, tmp_path, DEVICE)
    assert done[3:5] == [wanted[2].key, wanted[3].key], "what is done is not done again"
    (tmp_path / run_gpu.STAMP).unlink()
    run_gpu.run(wanted, tmp_path, DEVICE)
    assert done[6] == "build", "the report came along to a machine where nothing is built"


def test_another_commit_starts_anew(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run_gpu.chosen(run_gpu.units(tmp_path), "tests")[:1]
    run_gpu.run(wanted, tmp_path, DEVICE)
    for change in ({"commit": "d" * 40}, {"device": "Another GPU"}, {"changed": True}):
        done.clear()
        monkeypatch.setattr(run_gpu, "describe", lambda device, change=change: NOW | change)
        run_gpu.run(wanted, tmp_path, DEVICE)
        assert done == ["build", wanted[0].key]


def test_a_failed_build_ends_it(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_gpu, "do", lambda unit, out, left: done.append(unit.key) or {"status": "failed"})
    run_gpu.run(run_gpu.chosen(run_gpu.units(tmp_path), "1/3"), tmp_path, DEVICE)
    assert done == ["build"]


def case(share: float) -> dict[str, Any]:
    row = {"variant": "ours", "median_s": 1e-5, "floor_percent": share, "times_ours": 1.0, "error": 1e-7}
    return {"case": f"c{share}", "rows": [row | {"graph_s": 8e-6}, {"variant": "b", "failed": "b is wrong"}]}


def test_the_table_claims_what_every_tool_saw() -> None:
    """A room is verified where its tests and all three tools are done; one that is missing or failed says so."""
    keys = ["tests: test_covariance_gpu.py", *(f"sanitizer: {tool} test_covariance_gpu.py" for tool in sanitize.TOOLS)]
    units = {key: {"status": "done", "seconds": 1.0} for key in keys}
    report = NOW | {"units": units, "benchmarks": {"covariance": {"results": [case(61.0), case(80.0)]}}}
    assert "| covariance | A GPU | cccccccccc | 61 to 80 % |" in gpu_report.markdown(report)
    assert "| c61.0 | b | b is wrong | | | | |" in gpu_report.markdown(report)
    units[keys[2]]["status"] = "failed with exit code 99"
    assert "not clean: sanitizer: racecheck test_covariance_gpu.py failed" in gpu_report.markdown(report)
    del units[keys[2]]
    assert "not clean: 3 of 4 units were run" in gpu_report.markdown(report)


def test_the_sanitizer_sees_our_kernels_without_the_allocators_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append((words, env))
        return type("Done", (), {"returncode": {"memcheck": 0, "racecheck": 99, "initcheck": 1}[words[2]]})

    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    found = sanitize.sanitize(sanitize.TOOLS, ["tests/test_x_gpu.py"], 100.0)
    assert list(found.values()) == ["clean", "FINDINGS", "failed with exit code 1"]
    for words, env in seen:
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert "kernel_substring=cl_" in words


def test_every_room_with_a_kernel_has_tests_that_the_sanitizer_runs() -> None:
    triton = {path.parent.name for path in (ROOT / "cl_kernels" / "ops").glob("*/kernels.py")}
    cuda = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    files = sanitize.gpu_test_files()
    for room in sorted(triton | cuda):
        assert f"tests/test_{room}_gpu.py" in files
        assert room in run_gpu.rooms(), "and a benchmark on a GPU"


def test_a_kernel_that_spills_or_does_not_fit_is_named() -> None:
    fits = {"kernel": "k", "arch": "sm_90", "form": "bf16", "registers": 128, "shared": 100, "spilled": 0}
    assert resources.too_much([fits, fits | {"shared limit": 100}]) == []
    assert resources.too_much([fits | {"spilled": 8}]) == ["k (bf16) on sm_90: 8 bytes spilled, 100 shared"]
    assert len(resources.too_much([fits | {"shared limit": 99}])) == 1
    lines = list(gpu_report.resources([fits, fits | {"registers": 130, "form": "fp32"}]))
    assert lines[2:] == ["| k | sm_90 | 2 | 130 | 100 | 0 |"]


def test_names_of_cuda_kernels_are_read() -> None:
    assert (
        resources.plain("_ZN3clk49_GLOBAL__N__dee_16_orthogonal_qr_cu_5252161d14cl_qr_backwardIdEEvNS")
        == "cl_qr_backward"
    )
    assert resources.plain("something_else") == "something_else"
    found = resources.cuda_kernels("")
    if not found:
        pytest.skip("the native module has no CUDA half here")
    assert all(one["kernel"].startswith("cl_") for one in found)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_triton_kernel_is_compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels for CUDA are written in Triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import aot

    from cl_kernels.ops import _tuning

    aot.import_kernels()
    one = next(iter(_tuning.compilations()))
    found = resources.triton_kernels(one.name)
    assert [row["kernel"] for row in found] == [one.table.kernel.__name__]
    assert resources.too_much(found) == []
    assert all(one["registers"] > 0 for one in found)
