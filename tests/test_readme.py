"""The documents tell the truth: their code runs, their commands exist, their numbers come from a file."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
KEPT = ROOT / "benchmarks" / "results" / "demo.json"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [shlex.split(line[2:]) for b in blocks("console") for line in b.splitlines() if line.startswith("$ ")]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_python_blocks_run() -> None:
    found = blocks("python")
    assert "violations" in found[0]
    for code in found:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        if "violations" not in code:
            continue
        leaks = [float(n) for n in re.findall(r"\d\.\d+(?:e[-+]?\d+)?", done.stdout)]
        assert leaks, "the quickstart prints violations()"
        assert max(leaks) < 1e-5, "the promise of the quickstart: nothing but rounding in the protected directions"


def test_quickstart_is_short() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip() and not line.startswith("import ")]
    assert len(lines) <= 12


def test_commands_exist() -> None:
    found = commands()
    assert {words[0] for words in found} == {"make", "python", ".venv/bin/python", "cl-kernels"}
    for words in found:
        program, *rest = words
        if program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert rest[0] in targets
        elif program == "cl-kernels":
            check_command_line(rest)
        elif rest[0] == "-m":
            assert rest[1] in ("venv", "pip")
        else:
            load(rest[0])._arguments(rest[1:])  # argparse exits on what it does not know


def check_command_line(words: list[str]) -> None:
    """The command exists and knows every option; files it names are there unless they are the reader's own."""
    typer = pytest.importorskip("typer", reason="the command line is built with typer")
    from cl_kernels.cli import _app

    known = typer.main.get_command(_app.build()).commands
    assert words[0] in known
    if words[0] == "bench":  # its words are argparse's, which a GPU machine has too
        from cl_kernels.benchmarks import options as bench

        bench.parse(words[1:])
        return
    options = {o for p in known[words[0]].params for o in (*p.opts, *p.secondary_opts)}
    for word in words[1:]:
        if word.startswith("--"):
            assert word in options
    if words[0] in ("inspect", "study"):
        assert (ROOT / words[1]).is_file()
    if words[0] == "train":
        from cl_kernels import methods

        assert words[1] in methods.names()
        given = [words[i + 1].partition("=")[0] for i, w in enumerate(words) if w == "--option"]
        assert set(given) <= set(methods.options(words[1]))


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [p.read_text(encoding="utf-8") for p in (*DOCUMENTS, *(ROOT / "cl_kernels").rglob("*.py"))]
    named = {name for text in sources for name in re.findall(r'(?:cl-kernels|"\.)\[(\w+)\]', text)}
    assert {"cli", "plot", "demo", "test"} <= named <= set(extras)


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_methods_named_are_methods() -> None:
    from cl_kernels import methods

    listed = README.split("Methods today: ")[1].split(". What each")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == set(methods.names())
    described = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` ", described, re.MULTILINE)) == set(methods.names())


def test_citation_and_version() -> None:
    from cl_kernels import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {__version__}\n" in citation
    assert all(number in citation for number in ("2406.05658", "2103.07113", "2103.09762"))
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def run(label: str, seed: int, accuracy: float, forgetting: float) -> dict[str, Any]:
    return {
        "method": label, "label": label, "title": "a stream", "seed": seed, "average_accuracy": accuracy,
        "forgetting": forgetting, "accuracy_matrix": [[0.9, None], [0.5, 0.9]],
        "seconds": {"total": 22.5, "train": [1]},
        "task_incremental": {"average_accuracy": 0.9, "forgetting": 0.0, "accuracy_matrix": []},
    }  # fmt: skip


def record() -> dict[str, Any]:
    runs = [run("full", s, 0.5 + 0.1 * s, 0.4) for s in (0, 1)] + [
        run("null-space", s, 0.7 + 0.1 * s, 0.1) for s in (0, 1)
    ]
    return {
        "version": 1,
        "seconds": 90.0,
        "processes": 2,
        "environment": {"torch": "2.13", "device": "cpu"},
        "runs": runs,
    }


def test_readme_table_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load("scripts/readme_table.py")
    readme, results, kept = tmp_path / "README.md", tmp_path / "results.json", tmp_path / "kept" / "demo.json"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    results.write_text(json.dumps(record()))
    assert table.main([str(results), "--readme", str(readme), "--check"]) == 1
    assert table.main([str(results), "--readme", str(readme), "--keep", str(kept)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| null-space | 75.0 ± 7.1 | 10.0 ± 0.0 |" in text
    assert "accuracy +20.0 ± 0.0, forgetting −30.0 ± 0.0" in text, "paired by seed"
    assert "0.25 times as much" in text
    assert "4 runs, 1.5 minutes of one thread in all (torch 2.13, device cpu)" in text
    assert table.main([str(kept), "--readme", str(readme), "--check"]) == 0, "the kept file has all that is needed"
    assert "train" not in json.loads(kept.read_text())["runs"][0]["seconds"]


def test_the_benchmark_tables_say_what_was_measured() -> None:
    """And the check can fail: a table with another number is not the one that the results give."""
    benchmarks = load("scripts/readme_benchmarks.py")
    assert f"{benchmarks.BEGIN}\n{benchmarks.block()}\n{benchmarks.END}" in README


def test_a_gpus_results_are_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = load("scripts/readme_benchmarks.py")
    rows = [
        {"variant": "ours", "median_s": 2e-5, "times_ours": 1.0, "floor_percent": 61.2, "error": 1e-7},
        {"variant": "slow", "median_s": 9e-5, "times_ours": 4.5, "floor_percent": 13.0, "error": 1e-6},
        {"variant": "quick", "median_s": 4e-5, "times_ours": 2.0, "floor_percent": 30.0, "error": 2e-6},
        {
            "variant": "bare",
            "median_s": 1e-6,
            "times_ours": 0.1,
            "floor_percent": None,
            "error": 1.0,
            "yardstick": True,
        },
        {"variant": "wrong", "failed": "wrong is wrong"},
    ]
    machine = {"device": "A GPU", "torch": "2.13", "commit": "abc+", "clock": "CUDA events"}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    result = {"environment": machine, "results": [{"case": "c", "rows": rows}]}
    (tmp_path / "gpu" / "room.json").write_text(json.dumps(result))
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "cpu")
    monkeypatch.setattr(benchmarks, "TABLES", ())
    head, _, line, *_, foot = benchmarks.block().splitlines()
    assert head == "| A GPU | ours | of floor | the quickest other takes |"
    assert line == "| c | 20 us (1e-07) | 61 % | 2x (2e-06), quick |"
    assert foot.endswith("CUDA events, torch 2.13, commit abc.")


def test_the_methods_page_says_what_was_measured() -> None:
    """Each table between its markers is the one that the kept results give."""
    tables = load("scripts/methods_tables.py")
    page = tables.PAGE.read_text(encoding="utf-8")
    record = json.loads(tables.KEPT.read_text(encoding="utf-8"))
    taught = json.loads(tables.DISTILLED.read_text(encoding="utf-8"))
    photos = json.loads(tables.PHOTOS.read_text(encoding="utf-8"))
    assert tables.filled(page, record, taught, photos) == page
    for wrong in (record, taught, photos):
        wrong["runs"][0]["average_accuracy"] += 0.1
        assert tables.filled(page, record, taught, photos) != page, "and the check can fail"
        wrong["runs"][0]["average_accuracy"] -= 0.1


def test_readme_table_refuses(tmp_path: Path) -> None:
    table = load("scripts/readme_table.py")
    with pytest.raises(SystemExit, match="quick"):
        table.block(record() | {"quick": True})
    with pytest.raises(SystemExit, match="expected one"):
        table.replaced("no markers", "x")


def test_readme_says_what_the_kept_results_say() -> None:
    if not KEPT.is_file():
        assert "Not filled in yet" in README, "a table in README.md needs the file it was made from"
        pytest.skip("no results of the demo are kept yet")
    table = load("scripts/readme_table.py")
    assert table.main([str(KEPT), "--check"]) == 0
