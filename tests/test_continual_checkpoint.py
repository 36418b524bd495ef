"""Checkpoint files: exact round trips, atomic writes, and every way a file can be wrong."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cl_kernels.continual import checkpoint, seeds
from cl_kernels.errors import CheckpointError

CPU = torch.device("cpu")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def tree() -> dict[str, Any]:
    base = torch.randn(4, 6)
    return {
        "numbers": [0.1, 1e-300, math.inf, math.nan, -0.0, 2**63, True, None],
        "by index": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "tuple": (0.9, (1, "two")),
        "tensors": [base.mT, base[1:, ::2], base, torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)],
        "text": "ü 'quoted' \n",
    }


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path, made = tmp_path / "a.safetensors", tree()
    checkpoint.save_atomically(path, made, fingerprint="f")
    assert same(checkpoint.load(path, fingerprint="f", device=CPU), made)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_cannot_be_held_exactly_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for value in (np.float32(1), object(), {1.5: "key"}, {"set": {1}}):
        with pytest.raises(TypeError, match="checkpoint"):
            checkpoint.save_atomically(tmp_path / "a", value if isinstance(value, dict) else [value], fingerprint="f")
    assert os.listdir(tmp_path) == []


def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save_atomically(path, {"old": 1}, fingerprint="f")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_atomically(path, {"new": 2}, fingerprint="f")
    assert checkpoint.load(path, fingerprint="f", device=CPU) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_a_killed_save_left_behind_is_swept_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a.safetensors.{dead.pid}-0.tmp").write_bytes(b"half")
    checkpoint.save_atomically(path, {"new": 2}, fingerprint="f")
    assert os.listdir(tmp_path) == ["a.safetensors"]


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.safetensors"
        checkpoint.save_atomically(path, tree(), fingerprint="f")
        return path

    def refused(self, path: Path, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path, fingerprint="f", device=CPU)
        assert all(word in str(caught.value) for word in (str(path), *words)), str(caught.value)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
    def test_truncated(self, path: Path, share: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refused(path)

    def test_random_bytes_pickle_and_a_missing_file(self, path: Path) -> None:
        path.write_bytes(random.Random(0).randbytes(4096))
        self.refused(path)
        path.write_bytes(b"\x80\x04\x95" + bytes(100))
        self.refused(path)
        path.unlink()
        self.refused(path)

    def test_huge_header(self, path: Path) -> None:
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
        self.refused(path)

    def test_foreign_file(self, path: Path) -> None:
        save_file({"weight": torch.ones(2)}, path)
        self.refused(path, checkpoint.FORMAT)

    def test_other_version_and_other_run(self, path: Path) -> None:
        header = {"format": checkpoint.FORMAT, "version": "999", "fingerprint": "f", "tree": "null"}
        save_file({"x": torch.ones(1)}, path, header)
        self.refused(path, "version", "999")
        save_file({"x": torch.ones(1)}, path, header | {"version": checkpoint.VERSION, "fingerprint": "g"})
        self.refused(path, "another run")

    @pytest.mark.parametrize("layout", ["{", '{"tensor": "77"}', '{"dict": [1]}', '{"a": 1, "b": 2}', '{"odd": 3}'])
    def test_wrong_layout(self, path: Path, layout: str) -> None:
        header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "fingerprint": "f", "tree": layout}
        save_file({"0": torch.ones(1)}, path, header)
        self.refused(path)


class TestProbe:
    def test_makes_the_directory_and_leaves_it_empty(self, tmp_path: Path) -> None:
        checkpoint.probe(tmp_path / "new" / "deeper")
        assert os.listdir(tmp_path / "new" / "deeper") == []

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("")
        with pytest.raises(OSError, match="out: cannot write"):
            checkpoint.probe(tmp_path / "taken" / "below")


class TestSeeds:
    def draw(self) -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    def test_states_go_on_where_they_were(self, tmp_path: Path) -> None:
        with seeds.seeded(3, CPU, None):
            self.draw()
            np.random.randn(1)  # leaves a second normal number waiting: has_gauss
            checkpoint.save_atomically(tmp_path / "a", seeds.get_state(CPU), fingerprint="f")
            expected = [self.draw(), np.random.randn(1).tolist()]
            seeds.set_state(checkpoint.load(tmp_path / "a", fingerprint="f", device=CPU), CPU)
            assert [self.draw(), np.random.randn(1).tolist()] == expected

    def test_the_callers_generators_and_threads_are_put_back(self) -> None:
        threads, state = torch.get_num_threads(), json.dumps(random.getstate())
        expected = torch.random.get_rng_state()
        with seeds.seeded(5, CPU, threads + 1):
            first = self.draw()
            assert torch.get_num_threads() == threads + 1
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.random.get_rng_state(), expected)
        assert json.dumps(random.getstate()) == state
        with seeds.seeded(5, CPU, None):
            assert self.draw() == first

    def test_the_order_depends_on_every_part_of_the_place(self) -> None:
        orders = {
            tuple(seeds.permutation(50, *place).tolist()) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        }
        assert len(orders) == 4
        assert sorted(orders.pop()) == list(range(50))
        assert torch.equal(seeds.permutation(50, 0, 1, 2), seeds.permutation(50, 0, 1, 2))
