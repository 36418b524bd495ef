"""scripts/setup_env.py, which stands behind `make demo` and `make test`: what it decides, says, and leaves alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module whose .venv is the interpreter that runs the tests."""
    import setup_env

    monkeypatch.setattr(setup_env, "PYTHON", sys.executable)
    monkeypatch.setattr(setup_env, "CONSTRAINTS", str(tmp_path / "constraints.txt"))
    return setup_env


def test_requirements_follow_our_own_extras(setup_env: ModuleType) -> None:
    demo, test = setup_env.requirements(["demo"]), setup_env.requirements(["test"])
    names = {re.split(r"[<>=; ]", text)[0] for text in test}
    assert {"torch", "numpy", "safetensors", "timm", "typer", "scikit-learn", "pillow", "pytest", "hypothesis"} <= names
    assert set(demo) < set(test)
    assert not [text for text in test if text.startswith("cl-kernels")], "the package itself is not looked for anywhere"
    assert len(set(test)) == len(test)


def test_missing_knows_versions_and_markers(setup_env: ModuleType) -> None:
    there, absent = ["torch>=2.11", "numpy"], ["torch>=99", "no-such-package-as-this"]
    assert setup_env.missing([*there, *absent]) == absent
    assert setup_env.missing(["no-such-package; platform_system == 'Nowhere'"]) == []


def test_constraints_hold_the_torch_that_is_there(setup_env: ModuleType) -> None:
    setup_env.write_constraints(torch.__version__)
    lines = Path(setup_env.CONSTRAINTS).read_text().splitlines()
    assert f"torch=={torch.__version__.split('+')[0]}" in lines
    setup_env.write_constraints("2.13.0+cpu")
    assert any(line.startswith("torchvision==") for line in Path(setup_env.CONSTRAINTS).read_text().splitlines())


def test_an_old_torch_is_left_alone_and_stops_the_setup(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "version_of", lambda package: "2.4.1")
    monkeypatch.setattr(setup_env, "run", lambda *command: pytest.fail(f"installed something: {command}"))
    with pytest.raises(SystemExit):
        setup_env.install_torch()
    assert "not upgraded" in capsys.readouterr().out


def test_an_old_python_is_named(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        setup_env.find_python()
    assert "this is 3.9" in capsys.readouterr().out


@pytest.fixture
def bare_machine(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """No browser on the path, and an apt-get that must not be asked."""
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: "/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(setup_env.subprocess, "run", lambda *a, **k: pytest.fail(f"asked for something: {a}"))
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: 0)
    monkeypatch.setenv("CI", "true")
    return setup_env


@pytest.mark.parametrize("why", ["there", "not CI", "CI=false", "not root", "no apt"])
def test_no_browser_is_installed_on_a_users_machine(
    bare_machine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    if why == "not CI":
        monkeypatch.delenv("CI")
    elif why == "CI=false":
        monkeypatch.setenv("CI", "false")
    elif why == "not root":
        monkeypatch.setattr(bare_machine.os, "geteuid", lambda: 1000)
    else:
        found = "/usr/bin/chromium" if why == "there" else None
        monkeypatch.setattr(bare_machine.shutil, "which", lambda name: found if name == "chromium" else None)
    bare_machine.install_browser()
    (line,) = capsys.readouterr().out.splitlines()
    assert ("browser tests use /usr/bin/chromium" if why == "there" else "are skipped") in line


@pytest.mark.parametrize("outcome", ["installed", "exit code 100", "TimeoutExpired", "FileNotFoundError"])
def test_ci_installs_a_browser_or_says_why_not(
    bare_machine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        if outcome == "TimeoutExpired":
            raise subprocess.TimeoutExpired(command, 1)
        if outcome == "FileNotFoundError":
            raise FileNotFoundError
        if outcome == "installed" and "install" in command:
            monkeypatch.setattr(bare_machine.shutil, "which", lambda name: "/usr/bin/" + name)
        return subprocess.CompletedProcess(command, 0 if outcome == "installed" else 100)

    monkeypatch.setattr(bare_machine.subprocess, "run", run)
    bare_machine.install_browser()
    (line,) = capsys.readouterr().out.splitlines()
    assert "update" in commands[0]
    if outcome == "installed":
        assert "chromium" in commands[1]
        assert "installed chromium" in line
    else:
        assert outcome in line
        assert "are skipped" in line


@pytest.mark.slow
def test_a_machine_that_has_everything_needs_no_network(tmp_path: Path) -> None:
    """A checkout beside an interpreter with torch: .venv borrows, and only the package itself is installed."""
    tree = tmp_path / "a checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "*.egg-info", "_build_info.json", "*-out")
    shutil.copytree(ROOT, tree, ignore=ignored)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "CL_KERNELS_"))}
    env = kept | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "CL_KERNELS_NO_CUDA": "1", "CXXFLAGS": "-O0"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tree / "scripts", env=env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run("setup_env.py", "demo")
    assert f"has torch {torch.__version__}: .venv uses it" in first
    assert f"torch {torch.__version__} is there and stays" in first
    assert "requirements of 'demo' are there" in first
    assert "without build isolation" in first
    assert re.search(r"CUDA part left out: switched off|no native module: ", first)
    code = "import torch, cl_kernels; print(torch.__file__); print(cl_kernels.__file__)"
    inside = [str(tree / ".venv" / "bin" / "python"), "-c", code]
    used = subprocess.run(inside, cwd=tmp_path, env=env, text=True, capture_output=True, check=True).stdout.split("\n")
    assert used[:2] == [torch.__file__, str(tree / "cl_kernels" / "__init__.py")]
    assert ".venv is there already" in run("-c", "import setup_env; setup_env.make_venv()")
