"""What `import cl_kernels` costs beside `import torch`, in fresh processes: CPU seconds of interpreter and import.

The promise is at most 1.3 times `import torch`, the interpreter's own start ("python alone") taken off both. The check
here is that the statement runs; tests/test_native.py holds what the import may load.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterable

import torch
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from torch import Tensor

TABLE = ("import",)
STATEMENTS = {"ours": "import cl_kernels", "import torch": "import torch", "python alone": "pass"}


@functools.cache
def one() -> Tensor:
    return torch.ones(1)


def run(statement: str) -> Tensor:
    subprocess.run([sys.executable, "-c", statement], check=True)
    return one()


@planned("import cl_kernels")
def fresh_processes() -> Case:
    for statement in STATEMENTS.values():
        run(statement)  # files into the page cache, bytecode onto the disk
    calls = {name: functools.partial(run, statement) for name, statement in STATEMENTS.items()}
    return Case(calls, one(), 0.0, yardsticks=tuple(STATEMENTS)[1:])


def cases(quick: bool) -> Iterable[Plan]:
    yield fresh_processes()


if __name__ == "__main__":
    sys.exit(main(__name__))
