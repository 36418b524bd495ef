"""The command line: what it accepts, what it says when it refuses, and its exit codes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_kernels import continual, methods
from cl_kernels.cli import _errors, _options
from cl_kernels.data.pictures import BrokenImageError
from cl_kernels.errors import (
    BackendUnavailableError,
    CheckpointError,
    NonFiniteError,
    SolverError,
    SubspaceError,
    SubspaceMismatchError,
)

pytest.importorskip("typer", reason="the command line is built with typer")
pytest.importorskip("rich", reason="its tables are built with rich")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[continual.RunConfig]:
    """Replace the run by one that only notes its configuration, so that command lines can be checked in no time."""
    seen: list[continual.RunConfig] = []

    def run(config: continual.RunConfig) -> dict[str, Any]:
        seen.append(config)
        Path(str(config.out)).mkdir(parents=True, exist_ok=True)
        return {
            "method": config.method, "seed": config.seed, "accuracy_matrix": [[0.9, None], [0.7, 0.8]],
            "average_accuracy": 0.75, "forgetting": 0.2, "config": config.as_json(),
        }  # fmt: skip

    monkeypatch.setattr(continual, "run", run)
    return seen


def one_line(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("cl-kernels: ")
    return lines[0].removeprefix("cl-kernels: ")


def test_version_and_help(command: Run) -> None:
    from cl_kernels import __version__

    assert command("--version")[:2] == (0, f"cl-kernels {__version__}\n")
    for words in (("--help",), ("train", "--help"), ("study", "--help"), ("doctor", "--help"), ("inspect", "--help")):
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert "Usage: cl-kernels" in out
    code, out, _ = command()
    assert code == 2
    assert all(name in out for name in ("train", "study", "doctor", "inspect"))
    assert "registry" not in out, "not built yet, so not offered"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tran"], "Did you mean 'train'"),
        (["train", "nsp2", "--taks", "3"], "--tasks"),
        (["train", "nsp2", "--tasks", "three"], "Invalid value for '--tasks'"),
        (["train"], "METHOD is missing; known are"),
        (["train", "nsp-2"], "did you mean nsp2"),
        (["train", "nsp2", "--option", "eta"], "expected key=value, got 'eta'"),
        (["train", "nsp2", "--option", "etaa=0.9"], "nsp2 has no option 'etaa'; did you mean eta"),
        (["train", "nsp2", "--option", "eta=1", "--option", "eta=2"], "eta is given twice"),
        (["train", "nsp2", "--lr", "nan"], "lr must be finite"),
        (["train", "nsp2", "--tasks", "1000000"], "tasks must be between 1 and 10000"),
        (["train", "nsp2", "--epochs", "0"], "epochs must be between 1"),
        (["train", "nsp2", "--stream", "klass"], "stream must be one of class, domain"),
        (["train", "nsp2", "--stream", "domain"], "domains must name at least one"),
        (["train", "nsp2", "--config", "no-such.toml"], "cannot read no-such.toml"),
        (["inspect"], "Missing argument 'FILE.safetensors'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    command: Run, configs: list[Any], words: list[str], text: str
) -> None:  # fmt: skip
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert text in one_line(err)
    assert configs == []


def test_train_passes_on_what_it_is_told(command: Run, configs: list[Any], tmp_path: Path) -> None:
    words = (
        "train null-space --data digits --tasks 3 --backbone embedded --weights w.safetensors --epochs 2 --batch-size 8"
        " --lr 1e-3 --option rule=energy:0.9 --option eta=.5 --option head=linear --seed 4 --class-seed 5 --device cpu"
        " --precision float32 --augment flip --image-size 64"
        " --eval-batch-size 9 --statistics-batch 7 --threads 1 --resume --overwrite"
        " --checkpoint-minutes 0.5 --checkpoint-steps 11 --quick --strict --tensorboard --no-plot"
    )
    code, out, err = command(*words.split(), "--out", str(tmp_path / "run"))
    assert (code, "starting from the beginning" in one_line(err)) == (0, True)
    assert configs == [
        continual.RunConfig(
            method="null-space", data="digits", tasks=3, backbone="embedded", weights="w.safetensors", epochs=2,
            batch_size=8, lr=1e-3, options={"rule": "energy:0.9", "eta": 0.5, "head": "linear"}, seed=4, class_seed=5,
            device="cpu", precision="float32", augment="flip", eval_batch_size=9, statistics_batch=7, threads=1,
            resume=True, overwrite=True, checkpoint_minutes=0.5, checkpoint_steps=11, quick=True, strict=True,
            tensorboard=True, image_size=64, out=tmp_path / "run",
        )
    ]  # fmt: skip
    assert "75.0" in out
    assert "20.0" in out
    assert (tmp_path / "run" / "report.html").is_file()


def test_every_field_of_a_run_has_an_option(command: Run) -> None:
    listed = command("train", "--help")[1]
    for field in dataclasses.fields(continual.RunConfig):
        option = {"method": "METHOD", "options": "--option"}.get(field.name, f"--{field.name.replace('_', '-')}")
        assert option in listed


def test_train_fills_in_as_little_as_possible(
    command: Run, configs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", "linear", "--data", "some/folder.npz", "--seed", "3")[0] == 0
    assert configs[0] == continual.RunConfig("linear", "some/folder.npz", seed=3, out=Path("out/linear-folder-seed3"))
    assert command("train", "linear", "--stream", "domain", "--domains", "identity, invert")[0] == 0
    assert configs[1].tasks is None
    assert configs[1].domains == ("identity", "invert")


def test_config_file(command: Run, configs: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('method = "nsp2"\ntasks = 4\nbatch-size = 32\ndomains = ["invert"]\n[options]\neta = 0.9\n')
    code, _, err = command("train", "--config", str(file), "--tasks", "2", "--out", str(tmp_path), "--option", "eta=1")
    assert (code, err) == (0, "")
    config = configs[0]
    assert (config.method, config.tasks, config.batch_size) == ("nsp2", 2, 32)
    assert config.domains == ("invert",)
    assert config.options == {"eta": 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('methods = "nsp2"', "unknown key 'methods'; did you mean method"),
        ("tasks = ", "is not TOML"),
        ("resume = true", "unknown key 'resume'"),
        ('method = "nsp2"\nlr = nan', "lr must be finite"),
        ('method = "nsp2"\ntasks = "5"', "tasks must be an int, got str"),
        ('method = "nsp2"\noptions = 3', "options"),
        ("\x00", "is not TOML"),
    ],
)
def test_hostile_config_files(command: Run, configs: list[Any], tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, _, err = command("train", "--config", str(file), "--option", "eta=1")
    assert code == 2
    assert complaint in one_line(err)
    assert configs == []
    file.write_bytes(b"\xff\xfe\x00")
    assert command("train", "--config", str(file))[0] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("tasks: 12 tasks need at least 12 classes, got 10"), 2),
        (TypeError("x must be a number"), 2),
        (BackendUnavailableError("no GPU here"), 3),
        (CheckpointError("belongs to another run"), 1),
        (SubspaceError("not orthonormal"), 1),
        (SubspaceMismatchError("names differ"), 1),
        (NonFiniteError("loss is NaN in task 2, step 7; last good checkpoint: x"), 1),
        (SolverError("all rungs failed"), 1),
        (RuntimeError("first line\nsecond line"), 1),
        (FileExistsError("out: x holds a run already; resume it, or overwrite it"), 2),
        (FileNotFoundError("data 'x.npz': there is no such file or folder"), 2),
        (FileNotFoundError(2, "No such file or directory", "pics"), 1),
        (OSError(28, "No space left on device", "out"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenImageError("pics/a.jpg: not a readable picture (truncated)"), 1),
    ],
)
def test_errors_become_one_line_and_a_code(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int
) -> None:
    def fail(config: continual.RunConfig) -> None:
        raise error

    monkeypatch.setattr(continual, "run", fail)
    got, out, err = command("train", "linear", "--out", str(tmp_path))
    assert (got, out) == (code, "")
    said = one_line(err)
    words = [error.strerror, error.filename] if isinstance(error, OSError) and error.errno else str(error).split()
    assert all(str(word) in said for word in words)


def test_a_run_that_sigterm_ends_is_no_failure(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    def stop(config: continual.RunConfig) -> None:
        raise continual.RunStopped("stopped by SIGTERM; resume continues")

    monkeypatch.setattr(continual, "run", stop)
    code, _, err = command("train", "linear", "--out", str(tmp_path))
    assert code == 0
    assert one_line(err) == "stopped by SIGTERM; resume continues"


def test_resume_says_when_there_is_nothing_to_resume(command: Run, configs: list[Any], tmp_path: Path) -> None:
    code, _, err = command("train", "linear", "--no-plot", "--resume", "--out", str(tmp_path / "new"))
    assert code == 0
    assert "no checkpoint to resume from; starting from the beginning" in one_line(err)
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "last.safetensors").touch()
    assert command("train", "linear", "--no-plot", "--resume", "--out", str(tmp_path / "old"))[::2] == (0, "")


@pytest.mark.parametrize("skipped", [0, 3])
def test_broken_images_are_told(
    command: Run, configs: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, skipped: int
) -> None:
    finished = continual.run
    monkeypatch.setattr(continual, "run", lambda config: {**finished(config), "skipped_images": skipped})
    code, out, _ = command("train", "linear", "--no-plot", "--out", str(tmp_path))
    assert code == 0
    assert ("Broken images left out" in out) == (skipped > 0)


def test_a_reader_that_leaves_early_is_no_error_message(tmp_path: Path) -> None:
    """`cl-kernels inspect FILE --all | head -1`, with more to say than a pipe holds."""
    import torch
    from safetensors.torch import save_file

    save_file({f"tensor.{i}": torch.zeros(1) for i in range(3000)}, tmp_path / "many.safetensors")
    command = [sys.executable, "-m", "cl_kernels.cli", "inspect", "--all", str(tmp_path / "many.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"many.safetensors" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_debug_shows_the_traceback(
    command: Run, monkeypatch: pytest.MonkeyPatch, configs: list[Any], tmp_path: Path
) -> None:
    monkeypatch.setenv("CL_KERNELS_DEBUG", "1")
    assert "Traceback" in command("train", "nsp-2")[2]


def test_plot_is_asked_for_before_training(
    command: Run, monkeypatch: pytest.MonkeyPatch, configs: list[Any], tmp_path: Path
) -> None:
    from cl_kernels.cli.report import charts

    monkeypatch.setattr(charts, "available", lambda: False)
    code, _, err = command("train", "linear", "--plot", "--out", str(tmp_path))
    assert code == 3
    assert "cl-kernels[plot]" in one_line(err)
    assert configs == []


@pytest.mark.parametrize("gone", ["typer", "rich"])
def test_without_typer_or_rich_the_install_line_is_printed(
    command: Run, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:  # fmt: skip
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == gone else real(name, *a))
    code, out, err = command("doctor")
    assert (code, out) == (2, "")
    assert 'pip install "cl-kernels[cli]"' in one_line(err)


def test_a_run_that_never_starts_leaves_no_folder(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    def fail(config: continual.RunConfig) -> None:
        (Path(str(config.out)) / "checkpoints").mkdir(parents=True)
        if config.seed:
            (Path(str(config.out)) / "checkpoints" / "last.safetensors").touch()
        raise ValueError("data: unknown")

    monkeypatch.setattr(continual, "run", fail)
    assert command("train", "linear", "--out", str(tmp_path / "a"))[0] == 2
    assert command("train", "linear", "--seed", "1", "--out", str(tmp_path / "b"))[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_the_program_ends_with_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cl_kernels.cli", "train", "--taks", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--tasks" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-2", -2), ("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("true", True), ("false", False),
        ("none", None), ("None", None), ("[1, 2]", [1, 2]), ('"7"', "7"), ("energy:0.95", "energy:0.95"), ("", ""),
        ("a = b", "a = b"), ("fro", "fro"), ("inf", math.inf),
    ],
)  # fmt: skip
def test_option_values_are_typed(text: str, value: Any) -> None:
    got = _options.value(text)
    assert got == value
    assert type(got) is type(value)


def test_option_pairs() -> None:
    assert _options.pairs(["a-b=1", "rule=energy:0.9=x"]) == {"a_b": 1, "rule": "energy:0.9=x"}
    with pytest.raises(_errors.UsageError, match="expected key=value"):
        _options.pairs(["=1"])


def test_nearest_names() -> None:
    assert _options.nearest("nsp", ["nsp2", "full"]) == "; did you mean nsp2?"
    assert _options.nearest("zzz", ["b", "a"]) == "; known are a, b"
    assert _options.nearest("zzz", []) == ""


def test_methods_offered_are_those_that_exist(command: Run, configs: list[Any]) -> None:
    said = one_line(command("train", "zzzzzz")[2])
    assert all(name in said for name in methods.names())
