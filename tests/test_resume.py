"""kill -9 at any moment, then resume: the same results.json but for `seconds`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs to be killed are forked")

TESTS = Path(__file__).parent


class Server:
    """A process that forks a run for every request."""

    def __init__(self) -> None:
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "resume_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def run(self, when: float | str | None = None, **config: Any) -> int:
        """The exit status of a run: 0, or -9 when it was killed after `when` seconds; see resume_server."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the server has no pipes")
        self.process.stdin.write(json.dumps([when, config]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()  # it holds nothing, and an orderly end of the interpreter takes seconds
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("timm", reason="timm is not installed")
    made = Server()
    yield made
    made.close()


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    del found["seconds"]
    return found


def survive(server: Server, tmp_path: Path, kills: int, seed: int, **config: Any) -> None:
    """Kill runs `kills` times in all, at random moments of their whole length, resuming in between."""
    reference = tmp_path / "reference"
    assert server.run(**config, out=str(reference)) == 0
    start = time.monotonic()
    assert server.run(**config, out=str(tmp_path / "timed")) == 0
    length = time.monotonic() - start
    expected = results(reference)
    assert results(tmp_path / "timed") == expected
    rng, number, killed, in_between = random.Random(seed), 0, 0, 0

    def enough() -> bool:
        """Also kills behind a checkpoint: on a machine whose speed changes they may all come before it at first."""
        return killed >= kills and (in_between >= kills // 3 or killed >= 5 * kills)

    while not enough():
        out = tmp_path / f"run {number}"
        number += 1
        while not (out / "results.json").exists() and not enough():
            status = server.run(rng.uniform(0.0, 0.7 * length), **config, out=str(out), resume=True)
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            in_between += (out / "checkpoints" / "last.safetensors").exists() and status != 0
        assert server.run(**config, out=str(out), resume=True) == 0
        assert results(out) == expected
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["last.safetensors"]
    assert in_between >= kills // 3, "most kills came before the first checkpoint: nothing was resumed"


@pytest.mark.parametrize(("method", "seed"), [("nsp2", 1), ("null-space", 2)])
def test_kill_9_at_ten_random_moments(method: str, seed: int, server: Server, tmp_path: Path) -> None:
    survive(server, tmp_path, 10, seed, method=method, checkpoint_steps=1, epochs=4)


REFINED = {"refine": "gaussian", "refine_epochs": 2}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gpm", {}),
        ("adam-nscl", {"base": "prompts"}),
        ("nsp2", REFINED),
        ("dualprompt", {}),
        ("coda-prompt", {"components": 4}),
    ],
)
def test_kill_9_with_every_kind_of_memory(method: str, options: dict[str, Any], server: Server, tmp_path: Path) -> None:
    """Bases that grow, an average of moments, Gaussians of features, and pools that keep or add prompts."""
    survive(server, tmp_path, 3, 4, method=method, checkpoint_steps=1, epochs=3, options=options)


def test_kill_9_while_corrupted_images_are_evaluated(server: Server, tmp_path: Path) -> None:
    """Most of such a run is the evaluation at its end; every family that is finished is kept."""
    pytest.importorskip("PIL", reason="two of the corruptions go through Pillow")
    survive(server, tmp_path, 4, 5, method="linear", epochs=1, checkpoint_minutes=0.0, eval_shift=True)


def test_kill_9_of_a_teacher_and_its_student(server: Server, tmp_path: Path) -> None:
    """In either phase of a task."""
    survive(server, tmp_path, 4, 5, method="kdp", teacher="embedded-small", checkpoint_steps=1, epochs=2)


@pytest.mark.parametrize(
    ("method", "options"),
    [("ftp", {}), ("tpgm", {"anchor": "pretrained"})],  # c in the anchor's memory at the floor; held-out batches, radii
)
def test_kill_9_of_weights_held_to_an_anchor(
    method: str, options: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    survive(server, tmp_path, 3, 5, method=method, checkpoint_steps=1, epochs=2, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nsp2-exact", "matched-lr", "joint", "linear", "spd", "l2-sp", "wise-ft"])
def test_kill_9_of_the_other_methods(method: str, server: Server, tmp_path: Path) -> None:
    options = {"schedule": "cosine"}
    survive(server, tmp_path, 6, 3, method=method, checkpoint_steps=2, augment="crop", options=options)


def test_sigterm_ends_the_process_with_status_0_and_a_checkpoint(server: Server, tmp_path: Path) -> None:
    config: dict[str, Any] = {"method": "nsp2", "epochs": 20, "checkpoint_steps": 5}
    out, other = str(tmp_path / "run"), str(tmp_path / "other")
    assert server.run("checkpoint", **config, out=out) == 0
    assert not (tmp_path / "run" / "results.json").exists(), "it was stopped in the middle"
    assert server.run(**config, out=out, resume=True) == 0
    assert server.run(**config, out=other) == 0
    assert results(tmp_path / "run") == results(tmp_path / "other")
