"""Every Triton kernel in every configuration compiles for GPUs that are not here, fits, and spills nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import aot
import pytest

pytest.importorskip("triton", reason="the kernels for CUDA are written in Triton")

from cl_kernels.ops import _tuning

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under TRITON_INTERPRET=1 Triton compiles nothing"
)
OPS = aot.ROOT / "cl_kernels" / "ops"
COMPILATIONS = [] if os.environ.get("TRITON_INTERPRET") == "1" else [aot.import_kernels(), *_tuning.compilations()][1:]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Compiled afresh: what an older source left in the user's cache proves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("case", COMPILATIONS, ids=lambda case: case.name)
def test_compiles_fits_and_spills_nothing(case):
    table, config = case.table, case.config
    needs = aot.compile_for(
        table.kernel, table.signature(case.dtype), dict(config.constants), case.capability, config.options()
    )
    assert needs.stack_bytes == 0, f"{needs.stack_bytes} bytes of stack, {needs.registers} registers"
    assert needs.local_bytes == 0
    assert needs.shared_bytes <= _tuning.ARCHITECTURES[case.capability]
    assert re.search(r"\.entry cl_", needs.ptx)  # the name that the sanitizer looks for


def test_there_is_something_to_compile():
    assert len(COMPILATIONS) >= 3
    assert {case.capability for case in COMPILATIONS} == set(_tuning.ARCHITECTURES)


def test_no_kernel_is_forgotten():
    """What is launched is named cl_ and declared; what is not declared is a helper and is never launched."""
    for module in aot.import_kernels():
        functions = aot.jit_functions(module)
        declared = {name for name in functions if name in _tuning.KERNELS}
        assert declared == {name for name in functions if name.startswith("cl_")}, module.__name__
        launched = set(re.findall(r"\b(\w+)\[[^\]]*\]\(", Path(module.__file__).read_text())) & set(functions)
        assert launched <= declared


def test_a_launch_compiles_what_the_gate_compiles():
    """A launch would compile other forms for numbers that are 1 or multiples of 16, in the middle of a captured graph
    too; some of those spilled.
    """
    for table in _tuning.KERNELS.values():
        numbers = [p for p in table.kernel.params if not p.is_constexpr and not _is_pointer_or_float(table, p.name)]
        assert [p.name for p in numbers if not p.do_not_specialize] == [], table.kernel.__name__


def _is_pointer_or_float(table, name):
    return table.signature("fp16")[name].startswith(("*", "fp"))  # floats never are specialised


def test_a_configuration_that_spills_is_caught():
    """The gate itself: one warp for a tile that needs four must show, or the zeros above mean nothing."""
    import triton
    import triton.language as tl

    @triton.jit
    def cl_too_much(x, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tile = tl.load(x + at[:, None] * SIZE + at[None, :])
        total = tl.zeros((SIZE, SIZE), tl.float32)
        for _ in range(3):
            total += tl.dot(tile, tile.T, total)
        tl.store(x + at[:, None] * SIZE + at[None, :], total.to(tl.float16))

    signature = {"x": "*fp16"}
    spilled = aot.compile_for(cl_too_much, signature, {"SIZE": 128}, 90, _tuning.Config((), warps=1).options())
    assert spilled.stack_bytes > 0
    fine = aot.compile_for(cl_too_much, signature, {"SIZE": 64}, 90, _tuning.Config((), warps=4).options())
    assert fine.stack_bytes == 0


@pytest.mark.parametrize("path", sorted([*OPS.glob("*/kernels.py"), OPS / "_triton.py"]), ids=lambda p: p.parent.name)
def test_program_ids_are_widened_before_they_are_multiplied(path):
    bare = [
        f"{path.name}:{number}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"tl\.program_id\(\d\)(?!\.to\(tl\.int64\))", line)
    ]
    assert bare == []


def test_nothing_is_tuned_by_trial():
    tuned = re.compile(r"^\s*@triton\.(autotune|heuristics)", re.M)
    assert [path.name for path in OPS.rglob("*.py") if tuned.search(path.read_text())] == []


def test_the_interpreters_pass_of_make_test_finds_every_test_that_is_marked_for_it():
    marked = {path.name for path in Path(__file__).parent.glob("test_*.py") if "mark.interpret" in path.read_text()}
    assert marked >= {"test_triton.py"}
    assert [name for name in marked if "triton" not in name] == []
    assert "-m interpret" in (recipe := (aot.ROOT / "Makefile").read_text())
    assert "wildcard tests/test_*triton*.py" in recipe
