"""Compile Triton kernels for GPUs that are not here, and read what the machine code needs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Needs:
    """What one block (shared) and one thread (the others) of a compiled kernel take."""

    registers: int
    stack_bytes: int  # spilled registers and arrays live here: local memory, so DRAM
    local_bytes: int
    shared_bytes: int
    ptx: str


def import_kernels() -> list[Any]:
    """Import every room's kernels, so that all of them are declared; the modules, the shared ground first."""
    rooms = sorted(path.parent.name for path in (ROOT / "cl_kernels" / "ops").glob("*/kernels.py"))
    names = ["cl_kernels.ops._triton", *(f"cl_kernels.ops.{room}.kernels" for room in rooms)]
    return [importlib.import_module(name) for name in names]


def jit_functions(module: Any) -> dict[str, Any]:
    """The Triton functions that a module defines (not those that it imports)."""
    import triton

    found = inspect.getmembers(module, lambda value: isinstance(value, triton.JITFunction))
    return {name: function for name, function in found if function.fn.__module__ == module.__name__}


def compile_for(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int, options: Mapping[str, Any]
) -> Needs:
    """Compile as a launch would: addresses that torch allocates are multiples of 16, and Triton is told so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, dict(constants), aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    usage = _resource_usage(compiled.asm["cubin"])
    return Needs(
        usage["REG"], usage["STACK"], usage["LOCAL"], max(compiled.metadata.shared, usage["SHARED"]),
        compiled.asm["ptx"],
    )  # fmt: skip


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)
    if {name for name, _ in found} != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise AssertionError(f"cuobjdump says something else than before: {text!r}")
    return {name: int(number) for name, number in found}
