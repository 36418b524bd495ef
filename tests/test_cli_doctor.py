"""`cl-kernels doctor` and `cl-kernels inspect`: right about this machine and about files, and not fooled by either."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cl_kernels as clk
from cl_kernels.cli import doctor, inspection, selftest
from cl_kernels.cli.inspection import examine
from cl_kernels.continual import checkpoint
from cl_kernels.errors import CheckpointError
from cl_kernels.ops import _native, _registry

pytest.importorskip("typer", reason="the command line is built with typer")

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


# doctor --------------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_self_test() -> None:
    assert set(_registry.OPS) == set(selftest.CASES)


def test_doctor_is_well_and_right_about_this_machine(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_KERNELS_BAKCEND", "native")
    code, out, err = command("doctor", "--json")
    facts: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, ""), facts["problems"]
    assert facts["problems"] == []
    assert facts["cl_kernels"] == clk.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["native"]["loaded"] == (_native.why_missing() is None)
    assert set(facts["ops"]) == set(_registry.OPS)
    assert facts["unknown_variables"] == ["CL_KERNELS_BAKCEND"]
    assert any("did you mean CL_KERNELS_BACKEND" in note for note in facts["notes"])
    tried = {(t["op"], t["device"], t["backend"]) for t in facts["self_test"]}
    for name, record in _registry.OPS.items():
        assert (name, "cpu", "reference") in tried
        for implementation in record.on("cpu"):
            there = (name, "cpu", implementation.backend) in tried
            assert there == (implementation.missing() is None)
    assert all(t["ok"] and t["error"] < selftest.TOLERANCE for t in facts["self_test"])
    assert sum(t["seconds"] for t in facts["self_test"]) < 10


def test_doctor_as_tables(command: Run) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    assert all(name in out for name in _registry.OPS)
    assert "All is well." in out
    assert "FAILED" not in out


def test_doctor_notices_a_wrong_kernel(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(device: torch.device, dtype: torch.dtype) -> Tensor:
        value = torch.ones(3, device=device, dtype=dtype)
        return value if _registry.backend() == "reference" and dtype == torch.float64 else value * 1.001

    def nan(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.full((3,), 1.0 if dtype == torch.float64 else torch.nan, device=device, dtype=dtype)

    def crash(device: torch.device, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64:
            return torch.ones(1)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(selftest, "CASES", {"project": slightly_wrong, "a": nan, "b": crash})
    records = dict.fromkeys(("project", "a", "b", "forgotten"), _registry.OPS["project"])
    monkeypatch.setattr(_registry, "OPS", records)
    code, out, _ = command("doctor", "--json")
    assert code == 1
    problems = json.loads(out)["problems"]
    for text in ("project on cpu", "relative error nan", "no kernel image", "forgotten on -"):
        assert any(text in problem for problem in problems), text
    assert "FAILED" in command("doctor")[1]


def test_doctor_knows_every_variable_that_is_read() -> None:
    sources = [
        *ROOT.glob("cl_kernels/**/*.py"), *ROOT.glob("csrc/**/*"), *ROOT.glob("scripts/*.py"), ROOT / "setup.py",
        ROOT / "Makefile",
    ]  # fmt: skip
    named: set[str] = set()
    for path in sources:
        if path.is_file() and path.suffix != ".o":
            named |= set(re.findall(r"\bCL_KERNELS_[A-Z][A-Z_]+\b", path.read_text(encoding="utf-8", errors="ignore")))
    assert named - {"CL_KERNELS_BAKCEND"} == set(doctor.VARIABLES)


def test_doctor_survives_a_program_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    broken.rename(tmp_path / "bin" / "nvcc")
    assert doctor._ask(doctor._nvcc(), "--version") is None
    assert doctor._ask("no-such-program") is None


# inspect -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    basis, _ = torch.linalg.qr(torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    made = clk.SubspaceStore()
    made.put("blocks.0.attn.qkv.weight", clk.Projector(basis), right_energy=0.953, right_condition=1e4)
    made.put("prompts.0", clk.Sides(clk.Projector(basis[:4, :0]), clk.Projector(basis, 0.5, 0.25)))
    made.provenance = {"method": "nsp2", "task": "3"}
    made.save(tmp_path / "store.safetensors")
    return tmp_path / "store.safetensors"


def test_inspect_a_subspace(command: Run, store: Path) -> None:
    code, out, err = command("inspect", str(store))
    assert (code, err) == (0, "")
    for text in ("cl_kernels.subspace", "blocks.0.attn.qkv.weight", "95.3%", "nsp2", "prompts.0"):
        assert text in out
    facts = json.loads(command("inspect", str(store), "--json")[1])
    rows = {(row["layer"], row["side"]): row for row in facts["layers"]}
    row = rows["blocks.0.attn.qkv.weight", "right"]
    assert (row["dimension"], row["rank"], row["energy"], row["condition"]) == (24, 7, 0.953, 1e4)
    assert row["orthogonality_error"] < 1e-14
    assert row["free"] == pytest.approx(17 / 24)
    assert rows["prompts.0", "left"]["rank"] == 0
    assert (row["used"], row["added"], row["tasks_left"]) == (pytest.approx(7 / 24), 7, 2)
    assert rows["prompts.0", "left"]["tasks_left"] == "no end"
    assert "tasks left" in " ".join(out.split())


def test_inspect_covariances(command: Run, tmp_path: Path) -> None:
    from cl_kernels.subspace import Covariance, PromptCovariance, save_covariances

    eye = torch.eye(6, dtype=torch.float64)
    one = Covariance(4 * eye, 8.0, torch.zeros(6, dtype=torch.float64), 8)
    path = tmp_path / "c.safetensors"
    save_covariances(path, {"head.weight": one, "prompts.2": PromptCovariance(one, one)})
    code, out, err = command("inspect", str(path))
    assert (code, err) == (0, "")
    for text in ("cl_kernels.covariances", "head.weight", "prompts.2", "right"):
        assert text in out
    facts = json.loads(command("inspect", str(path), "--json")[1])["covariances"]
    assert [(row["layer"], row["part"], row["dimension"], row["rows"], row["energy"]) for row in facts] == [
        ("head.weight", "", 6, 8, 3.0),
        ("prompts.2", "left", 6, 8, 3.0),
        ("prompts.2", "right", 6, 8, 3.0),
    ]


def test_inspect_a_run_checkpoint(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    row = {"dim": 128, "protected": 9, "gain": 0.1, "energy": 0.8, "added": 7, "tasks_left": 17}
    report = {"prompts.0": {"right": row, "left": row | {"dim": 0, "added": 0, "tasks_left": None}}}
    tree = {"position": {"task": 2, "epoch": 0}, "steps": 99, "method": {"own": {"report": report}}, "x": torch.ones(3)}
    checkpoint.save_atomically(path, tree, fingerprint="abc")
    assert [t["name"] for t in examine(path)["tensors"]] == ["x"]
    code, out, _ = command("inspect", str(path))
    assert code == 0
    for text in ("cl_kernels.run", "position.task", "99", "prompts.0", "128", "80.0%", "93.0%", "+7", "17"):
        assert text in out
    facts = examine(path)
    assert facts["run"]["position.task"] == 2
    assert facts["layers"][0]["rank"] == 9


def test_inspect_names_tensors_that_were_on_a_device() -> None:
    layout = {"dict": [["method", {"dict": [["prompts.0", {"device tensor": "0"}], ["step", {"tensor": "1"}]]}]]}
    assert inspection._paths(layout) == {"0": "method.prompts.0", "1": "method.step"}


@pytest.mark.parametrize("tree", [None, "{", '{"dict": 3}'])
def test_inspect_refuses_a_checkpoint_with_a_damaged_tree(command: Run, tmp_path: Path, tree: str | None) -> None:
    metadata = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "fingerprint": "abc"}
    save_file(
        {"0": torch.ones(1)}, tmp_path / "x.safetensors", {**metadata, **({} if tree is None else {"tree": tree})}
    )
    code, out, err = command("inspect", str(tmp_path / "x.safetensors"))
    assert (code, out) == (1, "")
    assert "not a readable checkpoint" in err


def test_inspect_weights(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {f"blocks.{i}.weight": torch.full((2, 3), 2.0) for i in range(30)}
    save_file(
        tensors | {"bad": torch.tensor([1.0, torch.nan])}, path, metadata={"architecture": "{}", "licence": "MIT"}
    )
    code, out, _ = command("inspect", str(path))
    assert code == 0
    for text in ("backbone", "licence", "MIT", "NaN or infinity", "182 numbers", "and 11 more"):
        assert text in out
    assert "blocks.9.weight" in command("inspect", str(path), "--all")[1]
    facts = examine(path)
    assert facts["tensors"][1]["norm"] == pytest.approx(24**0.5)
    assert [t["name"] for t in facts["tensors"] if not t["finite"]] == ["bad"]


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_inspect_never_executes(command: Run, tmp_path: Path) -> None:
    fuse = tmp_path / "executed"
    torch.save({"x": Bomb(fuse)}, tmp_path / "zip.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Bomb(fuse)))
    for name in ("zip", "pickle"):
        code, out, err = command("inspect", str(tmp_path / f"{name}.safetensors"))
        assert (code, out) == (1, "")
        assert "can run code" in err
    assert not fuse.exists()


def test_a_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    """The first byte of a safetensors file is the low byte of its header's length, which may well be 0x80."""
    path = tmp_path / "w.safetensors"
    for padding in range(300):
        save_file({"w": torch.ones(2)}, path, metadata={"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no padding gave the first byte 0x80")
    assert examine(path)["parameters"] == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00", b"hello, world, this is text", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}      ',
    ],
    ids=["empty", "short", "text", "huge header", "bad json", "truncated"],
)  # fmt: skip
def test_inspect_damaged_files(command: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    code, out, err = command("inspect", str(path))
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "damaged.safetensors: not a readable safetensors file" in err


def test_inspect_damaged_contents(command: Run, store: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(store, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, no mapping
        metadata = file.metadata()
    name = "blocks.0.attn.qkv.weight/right/basis"
    save_file(tensors | {name: tensors[name] * 1.5}, tmp_path / "skewed.safetensors", metadata=metadata)
    code, _, err = command("inspect", str(tmp_path / "skewed.safetensors"))
    assert code == 1
    assert "blocks.0.attn.qkv.weight" in err
    with pytest.raises(CheckpointError):
        examine(tmp_path / "skewed.safetensors")


def test_inspect_missing_and_folder(command: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        code, _, err = command("inspect", str(path))
        assert code == 1
        assert str(path) in err
        assert len(err.splitlines()) == 1
