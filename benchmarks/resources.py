"""What every GPU kernel takes of a multiprocessor: registers, shared memory, spilled bytes. No GPU is needed.

Triton kernels are compiled ahead of time in every configuration; of CUDA ones it is what ptxas reported at the build.

    python benchmarks/resources.py [--json F] [--only TEXT]

Ends with exit code 1 where anything spills or does not fit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def triton_kernels(only: str) -> list[dict[str, Any]]:
    """Each kernel, dtype, size class and architecture of the tables; empty without Triton."""
    if importlib.util.find_spec("triton") is None:
        print("resources: no Triton here: its kernels are left out")
        return []
    sys.path.insert(0, str(ROOT / "tests"))
    import aot

    from cl_kernels.ops import _tuning

    aot.import_kernels()
    found = []
    for one in _tuning.compilations():
        if only not in one.name:
            continue
        needs = aot.compile_for(
            one.table.kernel, one.table.signature(one.dtype), dict(one.config.constants), one.capability,
            one.config.options(),
        )  # fmt: skip
        found.append(
            {
                "kernel": one.table.kernel.__name__, "arch": f"sm_{one.capability}", "form": f"{one.dtype} {one.size}",
                "made by": "Triton", "registers": needs.registers, "shared": needs.shared_bytes,
                "spilled": needs.stack_bytes + needs.local_bytes, "shared limit": _tuning.ARCHITECTURES[one.capability],
                "warps": one.config.warps,
            }
        )  # fmt: skip
    return found


def cuda_kernels(only: str) -> list[dict[str, Any]]:
    """From the record of the build: static shared memory only, what a launch asks for comes on top."""
    from cl_kernels.ops import _native

    found = []
    for kernel in _native.build_record().get("kernels", []):
        name = plain(kernel["name"])
        if only in name:
            spilled = max(kernel["spill_stores"], kernel["spill_loads"])
            found.append(
                {
                    "kernel": name, "arch": kernel["arch"], "form": kernel["name"], "made by": "nvcc",
                    "registers": kernel["registers"], "shared": kernel["shared"], "spilled": spilled,
                }
            )  # fmt: skip
    return found


def plain(mangled: str) -> str:
    """The kernel's own name in a mangled one: the length before it says where it ends."""
    for start in re.finditer(r"(\d+)(?=cl_)", mangled):
        name = mangled[start.end() : start.end() + int(start[1][-2:])]
        if re.fullmatch(r"cl_\w+", name):
            return name
    return mangled


def too_much(found: list[dict[str, Any]]) -> list[str]:
    """What spills or does not fit."""
    return [
        f"{one['kernel']} ({one['form']}) on {one['arch']}: {one['spilled']} bytes spilled, {one['shared']} shared"
        for one in found
        if one["spilled"] or one["shared"] > one.get("shared limit", one["shared"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args()
    found = [*cuda_kernels(options.only), *triton_kernels(options.only)]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import gpu_report

    print("\n".join(gpu_report.resources(found)))
    for line in too_much(found):
        print(f"TOO MUCH: {line}")
    return 1 if too_much(found) else 0


if __name__ == "__main__":
    sys.exit(main())
