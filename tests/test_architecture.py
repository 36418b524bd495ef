"""The house keeps its floors: what each part may import, what the package never does, and how long its files are."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cl_kernels"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))

# A part may import what is listed for it, and itself. Everything may import the ground: errors, _version, _timm.
GROUND = {"errors", "_version", "_timm"}
BELOW: dict[str, set[str]] = {
    "ops": set(),
    "subspace": {"ops"},
    "optim": {"ops", "subspace"},
    "nn": {"ops", "subspace"},
    "integrations": {"ops", "subspace", "optim", "nn"},
    "data": set(),
    "pages": set(),
    "methods": {"ops", "subspace", "optim", "nn", "integrations"},
    "continual": {"ops", "subspace", "optim", "nn", "integrations", "methods", "data"},
    "compare": {"ops", "subspace", "optim", "nn", "integrations", "methods", "data", "continual", "pages"},
    "cli": {"ops", "subspace", "optim", "nn", "integrations", "methods", "data", "continual", "compare", "pages"},
}
OPS_SHARED = {"_registry", "_native", "_checks", "_precision", "_tuning", "_triton", "_projector", "rules"}
TRITON_FILES = {"kernels.py", "_triton.py"}  # loaded when a kernel is first asked for
HARD_DEPENDENCIES = {"torch", "numpy", "safetensors"}
EXTRAS = {
    "timm",
    "triton",
    "typer",
    "rich",
    "jinja2",
    "sklearn",
    "matplotlib",
    "PIL",
    "torchvision",
    "datasets",
    "tensorboard",
    "avalanche",
    "accelerate",
    "lightning",
}


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Every imported name in full, relative ones resolved, wherever in the file the import stands."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node, [*stem, alias.name]


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not inside functions, not under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def floor_complaints(path: Path, tree: ast.AST) -> list[str]:
    """Imports that go upwards or sideways."""
    here = module_of(path)[1:]
    if not here:
        return []  # the facade at the top may name everything; it loads the upper floors on first use
    out = []
    for node, name in imports(path, tree):
        if name[0] != "cl_kernels" or len(name) < 2:
            continue
        part, where = name[1], f"{path.relative_to(ROOT)}:{node.lineno} imports {'.'.join(name)}"
        if here[0] in GROUND:
            if part not in GROUND:
                out.append(f"{where}: the ground imports nothing above it")
        elif here[0] not in BELOW:
            out.append(f"{path.relative_to(ROOT)}: {here[0]} has no floor in the list of this test")
        elif part in BELOW and part != here[0] and part not in BELOW[here[0]]:
            out.append(f"{where}: {here[0]} may not import {part}")
        elif here[0] == part == "ops" and len(here) > 1 and len(name) > 2:
            mine, theirs = here[1], name[2]
            shared = theirs in OPS_SHARED or theirs[0].isupper() or not (PACKAGE / "ops" / theirs).is_dir()
            if mine in OPS_SHARED and not shared:
                out.append(f"{where}: what rooms share imports no room")
            elif mine != theirs and not shared:
                out.append(f"{where}: rooms never import each other")
    return out


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20
    assert {module_of(p)[1] for p in FILES if p.parent != PACKAGE} <= set(BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(module_of(p)[1:]) or "facade")
def test_imports_go_down(path: Path) -> None:
    assert floor_complaints(path, parsed(path)) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("ops/projection/__init__.py", "from cl_kernels.ops.covariance import update_covariance_", "rooms never"),
        ("ops/projection/native.py", "from ..null_space import reference", "rooms never"),
        ("ops/_checks.py", "from cl_kernels.ops import covariance", "imports no room"),
        ("ops/covariance/__init__.py", "def f():\n    import cl_kernels.subspace", "ops may not import subspace"),
        ("optim/adam.py", "from cl_kernels import nn", "optim may not import nn"),
        ("optim/adam.py", "from cl_kernels import integrations", "optim may not import integrations"),
        ("integrations/timm.py", "from cl_kernels import methods", "integrations may not import methods"),
        ("data/sets.py", "from cl_kernels.ops import Projector", "data may not import ops"),
        ("methods/x.py", "from cl_kernels import data", "methods may not import data"),
        ("errors.py", "from cl_kernels import ops", "nothing above"),
        ("brandnew/x.py", "from cl_kernels import ops", "no floor"),
    ],
)
def test_the_check_itself_complains(file: str, code: str, complaint: str) -> None:
    found = floor_complaints(PACKAGE / file, ast.parse(code))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("ops/projection/__init__.py", "from cl_kernels.ops import _registry, Projector, rules"),
        ("ops/projection/__init__.py", "from cl_kernels.ops.projection import reference\nfrom . import native"),
        ("methods/x.py", "from cl_kernels.ops.null_space import null_space_projector"),
        ("data/sets.py", "from cl_kernels.errors import CheckpointError"),
    ],
)
def test_the_check_lets_pass(file: str, code: str) -> None:
    assert floor_complaints(PACKAGE / file, ast.parse(code)) == []


def test_only_hard_dependencies_at_import_time() -> None:
    bad = []
    for path in FILES:
        tree = parsed(path)
        eager = {id(node) for node in at_import_time(tree)}
        for node, name in imports(path, tree):
            top = name[0]
            known = top in sys.stdlib_module_names or top in HARD_DEPENDENCIES or top == "cl_kernels"
            triton_file = top == "triton" and path.name in TRITON_FILES
            if id(node) in eager and not known and not triton_file:
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {top}")
    assert bad == []


def test_importing_everything_loads_no_extra() -> None:
    names = [".".join(module_of(p)) for p in FILES if p.name not in {*TRITON_FILES, "__main__.py"}]
    code = f"""
import importlib, sys
import torch
with_torch = {{name.split(".")[0] for name in sys.modules}}
for name in {names!r}:
    importlib.import_module(name)
loaded = {{name.split(".")[0] for name in sys.modules}} - with_torch
assert torch.cuda.is_initialized() is False
print(*sorted(loaded & {EXTRAS!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_pickle_no_private_torch_no_print() -> None:
    bad = []
    for path in FILES:
        tree = parsed(path)
        for node, name in imports(path, tree):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if name[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
                bad.append(f"{where} imports {name[0]}")
            if name[0] == "torch" and any(part.startswith("_") and part != "__future__" for part in name):
                bad.append(f"{where} imports the private name {'.'.join(name)}")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("print", "torch.load", "torch.save", "eval", "exec"):
                bad.append(f"{path.relative_to(ROOT)}:{call.lineno} calls {ast.unparse(call.func)}")
    assert bad == []


def test_no_assert_on_what_users_give() -> None:
    """An assert that tells the type checker what must hold anyway is fine, if its line says why."""
    bad = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Assert) and "  # " not in lines[node.lineno - 1]:
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bad == []


def test_length_is_a_smell() -> None:
    """Reported, never failed: past 250 lines a file or 60 a function, look for two things in one."""
    smells = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 250:
            smells.append(f"{path.relative_to(ROOT)} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    smells.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    if smells:
        warnings.warn("long: " + "; ".join(smells), stacklevel=1)
