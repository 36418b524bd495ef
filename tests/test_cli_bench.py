"""`cl-kernels bench`: what it refuses, how it compares, and pytest-benchmark over the same cases. No timing decides."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cl_kernels.benchmarks import comparison, options, records, spread, suite

pytest.importorskip("typer", reason="the command line is built with typer")
pytest.importorskip("rich", reason="its tables are built with rich")

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


def report(**medians: float) -> dict[str, Any]:
    """A report of this machine with one case: medians by variant, a spread of 2 %."""
    rows = [{"variant": name, "blocks": [[t, t], [1.02 * t, 1.02 * t]], "error": 0.0} for name, t in medians.items()]
    case = {"room": "covariance", "case": "c", "device": "cpu", "floor_s": None, "seconds": 1.0, "rows": rows}
    return suite.empty_report(options.parse(["--quick"]), "cpu") | {"results": spread.pooled([case])}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the next runs find, instead of running."""
    waiting: list[dict[str, Any]] = []
    monkeypatch.setattr(suite, "run", lambda given: waiting.pop(0))
    return waiting


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command: Run) -> None:
    code, out, err = command("bench", "covariance", "--device", "cuda")
    assert (code, out) == (3, "")
    assert "sees no CUDA device" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["covarianc"], "unknown room 'covarianc'; did you mean covariance?"),
        (["covariance", "--shape", "vit-b61"], "unknown 'vit-b61'; did you mean vit-b16"),
        (["distillation", "--shape", "vit-b16"], "distillation has no case for --shape vit-b16; shapes there: none"),
        (["import", "--shape", "3x4"], "import takes no sizes; known are covariance"),
        (["covariance", "--shape", "3x4x5"], "--shape 3x4x5: covariance takes n x d, got 3 sizes"),
        (["covariance", "--shape", "0x5"], "sizes must be at least 1"),
        (["covariance", "--dtype", "bf61"], "unknown 'bf61'; did you mean bf16"),
        (["covariance", "--fail-above", "5%"], "--fail-above needs --compare"),
        (["covariance", "--budget", "soon"], "expected a time such as 90s or 9m, got 'soon'"),
        (["covariance", "--passes", "0"], "--passes: expected at least 1, got 0"),
        (["covariance", "--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(command: Run, words: list[str], text: str) -> None:
    code, out, err = command("bench", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_help_and_list(command: Run) -> None:
    code, out, _ = command("bench", "--help")
    assert code == 0
    assert all(f"--{name}" in out for name in ("shape", "dtype", "json", "compare", "fail-above", "quick", "list"))
    code, out, _ = command("bench", "--list", "covariance", "distillation", "--device", "cpu")
    assert code == 0
    assert "* covariance 25216x768 float32" in out
    assert "  covariance 25216x768 float64" in out
    assert "CPU cases, which say nothing about a GPU" in out
    code, out, _ = command("bench", "--list", "covariance", "--device", "cpu", "--shape", "vit-l16", "--dtype", "bf16")
    assert [line for line in out.splitlines() if line.startswith("  ")] == ["    covariance 6304x1024 bfloat16"]


def test_sizes_of_ones_own(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = ("covariance", "--shape", "50x12", "--dtype", "bf16", "--quick", "--device", "cpu", "--json", str(path))
    assert command("bench", *words)[0] == 0
    found = records.read(path)
    assert [one["case"] for one in found["results"]] == ["covariance 50x12 bfloat16"]
    rows = {one["variant"]: one for one in found["results"][0]["rows"]}
    assert rows["ours"]["error"] <= 1e-6
    assert {"median_s", "p25_s", "p75_s", "min_s", "spread", "times_ours", "blocks", "wall_min_s"} <= set(rows["ours"])
    assert found["environment"]["threads"] == 1
    assert found["environment"]["commit"]


def test_a_slow_kernel_is_caught(command: Run, measured: list[dict[str, Any]], tmp_path: Path) -> None:
    """The deliberately slow one: a tenth more than what the file says, while the baseline stands still."""
    old = tmp_path / "old.json"
    records.write(old, report(ours=1.0, torch=3.0))
    measured += [report(ours=1.1, torch=3.0)] * 2
    code, out, _ = command("bench", "--compare", str(old), "--fail-above", "5%", "--json", str(tmp_path / "new.json"))
    assert code == 1
    assert "SLOWER: covariance: c: ours: 1.01 s -> 1.11 s, 1.10x, 1.10 beside the baselines" in out
    assert records.read(tmp_path / "new.json")["results"][0]["rows"][0]["median_s"] == pytest.approx(1.111)
    assert command("bench", "--compare", str(old))[0] == 0, "without a limit it is told, and no error"


@pytest.mark.parametrize(
    ("now", "above", "why"),
    [
        ({"ours": 1.03, "torch": 3.0}, "2%", "the spreads of both explain it"),
        ({"ours": 1.1, "torch": 3.0}, "15%", "it is allowed"),
        ({"ours": 1.1, "torch": 3.3}, "5%", "the machine is slower: the baseline is too"),
        ({"ours": 0.5, "torch": 3.0}, "5%", "it is quicker"),
        ({"ours": 1.0, "torch": 9.0}, "5%", "a baseline is not ours to answer for"),
    ],
)
def test_what_is_no_regression(
    command: Run, measured: list[dict[str, Any]], tmp_path: Path, now: dict[str, float], above: str, why: str
) -> None:
    old = tmp_path / "old.json"
    records.write(old, report(ours=1.0, torch=3.0))
    measured.append(report(**now))
    assert command("bench", "--compare", str(old), "--fail-above", above)[0] == 0, why


def test_what_gave_no_time_does_not_pass_for_as_fast(
    command: Run, measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    old = tmp_path / "old.json"
    records.write(old, report(ours=1.0, torch=3.0))
    late = report(ours=1.0) | {"results": [], "not_run": {"covariance: c": "not run: the time was up"}}
    measured += [late] * 2
    code, out, _ = command("bench", "--compare", str(old), "--fail-above", "5%")
    assert code == 1
    assert "1 cases of the old report gave no time, so may be slower, such as covariance: c" in out
    assert command("bench", "--compare", str(old))[0] == 0, "without a limit it is told, and no error"


def test_a_process_that_hangs_is_ended_and_told(monkeypatch: pytest.MonkeyPatch, command: Run) -> None:
    def process(words: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        assert timeout > suite.GRACE_S
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(suite.subprocess, "run", process)
    monkeypatch.setattr(records, "_output", lambda *_: "")
    code, text, _ = command("bench", "import", "--device", "cpu", "--passes", "2", "--budget", "10s")
    assert code == 1
    assert "WRONG: import: import cl_kernels: failed: its process was ended after" in text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("cpu", "Another CPU", "CPU model: Another CPU then"),
        ("torch", "2.11.0", "torch: 2.11.0 then"),
        ("threads", 8, "threads: 8 then, 1 now"),
        ("device", "NVIDIA H200", "GPU: NVIDIA H200 then, cpu now"),
    ],
)
def test_another_machine_is_refused_before_anything_runs(
    command: Run, measured: list[dict[str, Any]], tmp_path: Path, name: str, value: Any, text: str
) -> None:
    old = report(ours=1.0)
    old["environment"][name] = value
    records.write(tmp_path / "old.json", old)
    code, out, err = command("bench", "--device", "cpu", "--compare", str(tmp_path / "old.json"))
    assert (code, out) == (2, "")
    assert text in err
    assert "taken on another machine" in err


def test_a_file_that_is_no_report_is_refused(command: Run, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"environment": {}, "results": []}')
    code, _, err = command("bench", "--compare", str(tmp_path / "old.json"))
    assert code == 2
    assert "expected a report of cl_kernels.bench/2, got None" in err
    assert command("bench", "--compare", str(tmp_path / "none.json"))[0] != 0


def test_thresholds() -> None:
    assert comparison.threshold("5%") == pytest.approx(0.05)
    assert comparison.threshold("0.05") == pytest.approx(0.05)
    for text in ("five", "-1%", "nan", "inf", "", "5"):
        with pytest.raises(ValueError, match="--fail-above"):
            comparison.threshold(text)


def test_a_wrong_threshold_is_told_before_anything_runs(command: Run, tmp_path: Path) -> None:
    records.write(tmp_path / "old.json", report(ours=1.0))
    words = ("--device", "cpu", "--compare", str(tmp_path / "old.json"), "--fail-above", "5")
    code, out, err = command("bench", *words)  # nothing stands in for the run here
    assert (code, out) == (2, "")
    assert "expected a share such as 5% or 0.05, got '5'" in err


def test_cases_that_were_not_run_again_are_named() -> None:
    old, new = report(ours=1.0), report(ours=1.0)
    gone = copy.deepcopy(old["results"][0]) | {"case": "gone"}
    old["results"].append(gone)
    text = comparison.shown(comparison.changes(old, new, 0.05), old, new)
    assert "1 cases of the old report were not run, such as covariance: gone" in text
    assert "1 rows compared, 1 agree within their spreads" in text


def test_two_processes_make_one_report(monkeypatch: pytest.MonkeyPatch, command: Run, tmp_path: Path) -> None:
    """Each pass in a process of its own; what it leaves is merged, and a process that dies is told."""
    seen: list[list[str]] = []

    def process(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(words)
        room, path = words[4], Path(words[words.index("--json") + 1])
        if room == "covariance":
            records.write(path, report(ours=1.0 + 0.1 * len(seen), torch=3.0))
        return subprocess.CompletedProcess(words, 0 if room == "covariance" else -11)

    monkeypatch.setattr(suite.subprocess, "run", process)
    monkeypatch.setattr(records, "_output", lambda *_: "")
    out = tmp_path / "out"
    words = ("covariance", "import", "--device", "cpu", "--out", str(out), "--json", str(tmp_path / "all.json"))
    code, text, _ = command("bench", *words, "--passes", "2", "--budget", "60s")
    assert code == 1
    assert "WRONG: import: import cl_kernels: failed: its process ended with exit code -11" in text
    lost = [line for line in text.splitlines() if line.startswith("WRONG: covariance: ")]
    assert lost, "cases that a process did not come to are no success"
    assert all(line.endswith("failed: its process ended with exit code 0") for line in lost)
    found = records.read(tmp_path / "all.json")
    blocks = found["results"][0]["rows"][0]["blocks"]
    assert [round(values[0], 6) for values in blocks] == [1.1, 1.122, 1.3, 1.326], "two passes of the stand-in's two"
    assert ["--no-peaks" in words for words in seen] == [False, False, True, True]
    assert records.read(out / "covariance.json")["results"] == found["results"]
    assert "### covariance" in (out / "table.md").read_text()


def test_a_case_that_only_the_second_pass_came_to_has_its_time(
    monkeypatch: pytest.MonkeyPatch, command: Run, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def process(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        path = Path(words[words.index("--json") + 1])
        found = report(ours=1.0, torch=3.0)
        found["results"][0] |= {"room": "import", "case": "import cl_kernels"}
        late = {"results": [], "rates": {}, "not_run": {"import: import cl_kernels": "not run: the time was up"}}
        records.write(path, found if len(calls) > 1 else found | late)
        return subprocess.CompletedProcess(words, 0)

    old = tmp_path / "old.json"
    earlier = report(ours=1.0, torch=3.0)
    earlier["results"][0] |= {"room": "import", "case": "import cl_kernels"}
    records.write(old, earlier)
    monkeypatch.setattr(suite.subprocess, "run", process)
    monkeypatch.setattr(suite.comparison, "differences", lambda *_: [])
    monkeypatch.setattr(records, "_output", lambda *_: "")
    words = ("import", "--device", "cpu", "--passes", "2", "--budget", "60s", "--compare", str(old))
    code, text, _ = command("bench", *words, "--fail-above", "5%", "--json", str(tmp_path / "new.json"))
    assert (code, "gave no time" in text, len(calls)) == (0, False, 2)
    new = records.read(tmp_path / "new.json")
    assert [one["case"] for one in new["results"]] == ["import cl_kernels"]
    assert not new["not_run"]


def test_pytest_benchmark_collects_the_same_cases(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="the plug-in is in the test extra")
    kept = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--bench-quick", "--benchmark-only"]
    command += ["benchmarks/bench_distillation.py", "-k", "kl and forward", "--benchmark-json", str(kept)]
    command += ["--benchmark-max-time", "0.01", "--benchmark-min-rounds", "2", "--benchmark-warmup", "off"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "bench_distillation.py::kl 16x50 float32 forward::eager torch PASSED" in done.stdout
    found = {one["name"]: one for one in json.loads(kept.read_text())["benchmarks"]}
    assert {one["group"] for one in found.values()} == {"distillation: kl 16x50 float32 forward"}
    assert found["ours"]["extra_info"]["error"] <= 1e-5
