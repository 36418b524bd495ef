"""`cl-kernels study` and the demo on it: what is planned, that it runs, goes on where it stopped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_kernels import methods
from cl_kernels.cli import run as command
from cl_kernels.cli.report.paired import difference
from cl_kernels.cli.report.summary import sections
from cl_kernels.cli.report.versus import markdown, versus
from cl_kernels.continual import study
from cl_kernels.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
LAYERS = """
[run]
epochs = 3
lr = 0.1
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
"""


ROWS = """
[study]
title = "Means and heads"
seeds = 2
against = "means"
[run]
tasks = 5
epochs = 1
quick = true
[[row]]
label = "means"
method = "class-mean"
[[row]]
label = "heads"
method = "linear"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text)
    return file


def test_the_committed_settings_are_runs() -> None:
    jobs = study.load_plan(ROOT / "examples" / "demo.toml", "out", seeds=2).jobs
    labels = {job.label for job in jobs}
    wanted = {"class-mean", "linear", "sequential", "matched-lr", "nsp2", "nsp2-exact", "full", "null-space"}
    assert wanted <= {job.settings["method"] for job in jobs}
    assert {"null-space matched"} <= labels
    assert len({job.out for job in jobs}) == len(jobs), "every run has a folder of its own"
    for job in jobs:
        config = job.config()
        assert config.seed in (0, 1)
        assert set(config.options) <= set(methods.options(config.method))


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda file: file.stem)
def test_every_settings_file_of_the_examples_is_a_plan(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where its backbones are
    monkeypatch.setattr(study.data, "check", lambda name: None)  # shards are not in the repository
    assert study.load_plan(file, "out").jobs


def test_streams_and_rows_override_each_other(tmp_path: Path) -> None:
    file = written(tmp_path, LAYERS)
    jobs = study.load_plan(file, "out", seeds=1, quick=True).jobs
    assert [(j.title, j.label, j.settings["lr"]) for j in jobs] == [
        ("plain", "a", 0.1), ("plain", "b", 0.3), ("turned", "a", 0.2), ("turned", "b", 0.3), ("own", "c", 0.1),
    ]  # fmt: skip
    assert [j.settings["options"] for j in jobs] == [{}] * 5
    assert all(j.settings["epochs"] == 3 and j.settings["quick"] for j in jobs)
    assert [j.label for j in study.load_plan(file, "out", seeds=2, only=["b"]).jobs] == ["b"] * 4


def test_options_are_merged_key_by_key(tmp_path: Path) -> None:
    text = (
        '[run]\nmethod = "sequential"\noptions = { prompts = 8, depth = "shallow" }\n'
        '[[row]]\nlabel = "a"\noptions = { prompts = 2 }'
    )
    (job,) = study.load_plan(written(tmp_path, text), "out", seeds=1).jobs
    assert job.settings["options"] == {"prompts": 2, "depth": "shallow"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[runs]\n", r"expected the tables study, run, stream, row, got 'runs'; did you mean run"),
        ("[run]\n", r"every stream needs \[\[row\]\]"),
        ("[study]\nseed = 2\n", r"\[study\] has no 'seed'; did you mean seeds"),
        ("[study]\nseeds = 0\n", r"seeds must be between 1 and 1000, got 0"),
        ('[[row]]\nmethod = "linear"\n', r"a row has no label"),
        ('[[row]]\nlabel = "a"\nmethod = "linaer"\n', r"row 'a': .*linaer.*linear"),
        ('[[row]]\nlabel = "a"\nmethod = "linear"\nepoch = 2\n', r"row 'a': .*epoch"),
        ('[[row]]\nlabel = "a"\nmethod = "linear"\nlr = -1\n', r"row 'a': lr must be"),
        (
            '[[row]]\nlabel = "a"\nmethod = "linear"\ndata = "digit"\n',
            r"row 'a': unknown data 'digit': did you mean digits",
        ),
        (
            '[[row]]\nlabel = "a"\nmethod = "linear"\ndata = "digits+none.npz"\n',
            r"row 'a': data 'none.npz': there is no",
        ),
        (
            '[[row]]\nlabel = "a"\nmethod = "linear"\nstream = "domain"\ndomains = ["invrt"]\ntasks = 1\n',
            r"row 'a': domains: unknown transform 'invrt'; nearest: invert",
        ),
        (
            '[[row]]\nlabel = "a"\nmethod = "linear"\nbackbone = "none.safetensors"\n',
            r"row 'a': backbone 'none.safetensors': there is no such file",
        ),
        ('[study]\nagainst = "b"\n[[row]]\nlabel = "a"\nmethod = "linear"\n', r"no row is called 'b'; known are a"),
        ('[[row]]\nlabel = "a"\nmethod = "linear"\n[[row]]\nlabel = "a"\nmethod = "full"\n', r"the same name"),
        ("not toml", r"is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_before_the_first_run(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study.load_plan(written(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_an_unknown_row(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        study.load_plan(tmp_path / "none.toml", tmp_path)
    with pytest.raises(ValueError, match="no row is called 'hands'; did you mean heads"):
        study.load_plan(written(tmp_path, ROWS), tmp_path, only=["hands"])


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study.settle(study.load_plan(written(tmp_path, ROWS), out), out)
    study.settle(study.load_plan(written(tmp_path, ROWS), out, seeds=3), out)
    more = ROWS + '[[row]]\nlabel = "all"\nmethod = "full"\n'
    study.settle(study.load_plan(written(tmp_path, more), out, seeds=1), out)
    before = (out / "plan.json").read_bytes()
    changed = study.load_plan(written(tmp_path, ROWS.replace("epochs = 1", "epochs = 2")), out)
    with pytest.raises(CheckpointError, match=r"1-means-seed0: epochs was 1 and is 2") as error:
        study.settle(changed, out)
    assert str(out) in str(error.value)
    assert (out / "plan.json").read_bytes() == before, "a refusal changes nothing"
    study.settle(changed, out, overwrite=True)
    study.settle(changed, out)


def test_a_study_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that it writes, one JSON a run, and the same table from runs that are taken from disk."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("timm", reason="the backbone is a timm model")
    pytest.importorskip("matplotlib", reason="draws figures")
    file, out = written(tmp_path, ROWS), tmp_path / "out"
    words = ["study", str(file), "--out", str(out), "--jobs", "1"]
    assert command(words) == 0
    capsys.readouterr()
    record: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert [(run["label"], run["seed"]) for run in record["runs"]] == [
        ("means", 0), ("heads", 0), ("means", 1), ("heads", 1),
    ]  # fmt: skip
    for run in record["runs"]:
        alone = json.loads((out / "runs" / f"1-{run['label']}-seed{run['seed']}" / "results.json").read_text())
        assert {**alone, "label": run["label"], "title": ""} == run
    tables, page = (out / "results.md").read_text(), (out / "report.html").read_text()
    gain = np.mean([record["runs"][k + 1]["average_accuracy"] - record["runs"][k]["average_accuracy"] for k in (0, 2)])
    for text in (tables, page):
        assert f"{100 * gain:+.1f} [" in text
    figures = {path.name for path in (out / "figures").iterdir()}
    curves = {f"stream1-{name}.svg" for name in ("accuracy", "forgetting", "cost", "tasks-means", "tasks-heads")}
    assert figures == curves
    for name in figures:
        assert (out / "figures" / name).read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    (out / "runs" / "1-heads-seed1" / "results.json").unlink()  # as if killed between checkpoint and result
    assert command(words) == 0
    again = json.loads((out / "results.json").read_text())
    assert [run["accuracy_matrix"] for run in again["runs"]] == [run["accuracy_matrix"] for run in record["runs"]]
    assert (out / "results.md").read_text().split("Seconds")[0] == tables.split("Seconds")[0]
    file.write_text(ROWS.replace("tasks = 5", "tasks = 2"))
    capsys.readouterr()
    assert command(words) == 1
    assert "tasks was 5 and is 2" in capsys.readouterr().err


def test_one_failed_run_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("timm", reason="the backbone is a timm model")
    weights = tmp_path / "damaged.safetensors"
    weights.write_bytes(b"cut off")
    broken = ROWS + f'[[row]]\nlabel = "broken"\nmethod = "linear"\nbackbone = "{weights.as_posix()}"\n'
    out = tmp_path / "out"
    words = ["study", str(written(tmp_path, broken)), "--out", str(out), "--jobs", "1", "--seeds", "1", "--no-plot"]
    assert command(words) == 1
    said = capsys.readouterr().out
    assert "failed: broken, seed 0: CheckpointError" in said
    assert [run["label"] for run in json.loads((out / "results.json").read_text())["runs"]] == ["means", "heads"]


def test_differences_are_taken_seed_by_seed() -> None:
    """A gain that every seed has is told apart although the seeds differ by more than it."""
    matrix = [[0.5]]
    runs = [
        {"method": "m", "label": label, "seed": seed, "accuracy_matrix": matrix, "forgetting": 0.0,
         "average_accuracy": 0.5 + 0.1 * seed + gain + 0.001 * (-1) ** seed * (label == "better")}
        for seed in range(4)
        for label, gain in (("base", 0.0), ("better", 0.02), ("same", 0.0))
    ]  # fmt: skip
    runs = [run for run in runs if (run["label"], run["seed"]) != ("same", 2)]
    (found,) = sections(runs)
    table = versus(found, "base")
    assert table is not None
    better, same = table["rows"]
    assert better["label"] == "better"
    assert better["cells"][0]["text"].startswith("+2.0 [+1.8, +2.2]")
    assert [cell["verdict"] for cell in better["cells"]] == ["better", "not told apart"]
    assert same["cells"][0]["seeds"] == 3
    assert "| better | +2.0 [+1.8, +2.2]; [+1.9, +2.1]; better |" in markdown(found, "base")
    assert versus(found, "none") is None
    assert versus(found, None) is None


def test_intervals_hold_what_they_say() -> None:
    """Of 1,000 samples of normal differences around 0: the share whose interval holds 0."""
    generator = np.random.default_rng(0)
    for seeds, bootstrap in ((3, 0.75), (5, 0.85)):
        found = [difference(list(generator.normal(size=seeds)), draws=1000) for _ in range(1000)]
        student = np.mean([f is not None and not f.told_apart for f in found])
        assert abs(student - 0.95) < 0.03
        held = [f is not None and f.bootstrap is not None and f.bootstrap[0] <= 0 <= f.bootstrap[1] for f in found]
        assert abs(np.mean(held) - bootstrap) < 0.05
    assert difference([]) is None
    single = difference([0.5])
    assert single is not None
    assert (single.mean, single.student, single.told_apart) == (0.5, None, False)
    assert difference([math.nan]) is None


def test_control_c_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "execute", interrupt)
    assert command(["study", str(written(tmp_path, ROWS)), "--out", str(tmp_path / "out")]) == 130
    assert "the same command" in capsys.readouterr().err


def test_the_demo_runs_changed_rows_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("timm", reason="the backbone is a timm model")
    file, out = written(tmp_path, ROWS), tmp_path / "out"
    words = [sys.executable, str(ROOT / "examples" / "demo.py"), "--settings", str(file), "--out", str(out)]
    words += ["--seeds", "1", "--jobs", "1", "--only", "means"]
    for tasks in (5, 2):
        file.write_text(ROWS.replace("tasks = 5", f"tasks = {tasks}"))
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (run,) = json.loads((out / "results.json").read_text())["runs"]
        assert len(run["accuracy_matrix"]) == tasks


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
