"""The demo's driver: what it plans, that it runs, skips what is finished, and survives a run that fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cl_kernels import continual, methods

ROOT = Path(__file__).resolve().parents[1]
LAYERS = """
[run]
epochs = 3
lr = 0.1
options = { a = 1, b = 1 }
[[stream]]
title = "plain"
[[stream]]
title = "turned"
domains = ["invert"]
lr = 0.2
[[stream]]
title = "own"
[[stream.row]]
label = "c"
method = "linear"
[[row]]
label = "a"
method = "full"
[[row]]
label = "b"
method = "full"
lr = 0.3
options = { b = 2 }
"""


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # its dataclass looks the module up
    spec.loader.exec_module(module)
    return module


def test_the_committed_settings_are_runs(demo: ModuleType) -> None:
    jobs = demo.plan(ROOT / "examples" / "demo.toml", 2, Path("out"), quick=False)
    labels = {job.label for job in jobs}
    wanted = {"class-mean", "linear", "sequential", "matched-lr", "nsp2", "nsp2-exact", "full", "null-space"}
    assert wanted <= {job.settings["method"] for job in jobs}
    assert {"null-space matched"} <= labels
    assert len({job.out for job in jobs}) == len(jobs), "every run has a folder of its own"
    for job in jobs:
        config = continual.RunConfig(**job.settings, out=job.out)
        assert config.seed in (0, 1)
        assert set(config.options) <= set(methods.options(config.method))


def test_streams_and_rows_override_each_other(demo: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text(LAYERS)
    jobs = demo.plan(file, 1, Path("out"), quick=True)
    assert [(j.title, j.label, j.settings["lr"]) for j in jobs] == [
        ("plain", "a", 0.1), ("plain", "b", 0.3), ("turned", "a", 0.2), ("turned", "b", 0.3), ("own", "c", 0.1),
    ]  # fmt: skip
    assert [j.settings["options"] for j in jobs[:2]] == [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert all(j.settings["epochs"] == 3 and j.settings["quick"] for j in jobs)
    assert [j.label for j in demo.plan(file, 2, Path("out"), quick=False, only=["b"])] == ["b"] * 4
    file.write_text("[runs]\n")
    with pytest.raises(SystemExit, match=r"expected \[run\], \[\[stream\]\] and \[\[row\]\] or"):
        demo.plan(file, 1, Path("out"), quick=False)


def test_control_c_ends_in_one_line(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(demo, "execute", interrupt)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_rows_for_real(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("timm", reason="the backbone is a timm model")
    monkeypatch.syspath_prepend(ROOT / "examples")  # the worker process imports the driver by name
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings, out = tmp_path / "demo.toml", tmp_path / "out"
    settings.write_text(
        '[run]\ntasks = 5\nepochs = 1\n[[row]]\nlabel = "means"\nmethod = "class-mean"\n'
        '[[row]]\nlabel = "heads"\nmethod = "linear"\n[[row]]\nlabel = "broken"\nmethod = "linear"\nlr = -1\n'
    )
    words = ["--settings", str(settings), "--out", str(out), "--quick", "--seeds", "1", "--jobs", "1"]
    assert demo.main(words) == 1, "one row cannot run"
    said = capsys.readouterr().out
    assert "failed: broken, seed 0: ValueError: lr" in said
    record: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert [run["label"] for run in record["runs"]] == ["means", "heads"]
    assert record["quick"] is True
    mean = record["runs"][0]["average_accuracy"]
    assert mean > 0.3, "better than chance on ten classes"
    for text in (said, (out / "report.html").read_text()):
        assert "means" in text
        assert f"{100 * mean:.1f}" in text
    means, heads, _ = demo.plan(settings, 1, out, quick=True)
    assert demo.work(means) == record["runs"][0], "a finished run is taken from disk"
    other = demo.work(demo.Job(means.label, means.title, means.out, {**means.settings, "tasks": 2}))
    assert len(other["accuracy_matrix"]) == 2, "a run with other settings replaces it"
    assert Path(heads.out, "results.json").is_file()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_workers_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="the backbone is a timm model")
    command = [
        sys.executable,
        str(ROOT / "examples" / "demo.py"),
        "--seeds",
        "9",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: any(tmp_path.glob("runs/*/metrics.jsonl")), "a worker runs")
        workers = children(demo.pid)
    finally:
        demo.kill()
        demo.wait()
    assert workers
    until(lambda: not any(alive(pid) for pid in workers), "the workers have ended")


def until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)


def status(pid: int) -> list[str]:
    """State and parent of a process, from the fields behind its name; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def children(parent: int) -> list[int]:
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in found if status(pid)[1:] == [str(parent)]]


def alive(pid: int) -> bool:
    return bool(status(pid)) and status(pid)[0] != "Z"
