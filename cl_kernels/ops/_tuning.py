"""How Triton kernels are compiled: frozen values chosen by (architecture, dtype, size class), not by trial.

No `@triton.autotune`: a kernel that adds in place would add once for each trial, a run in its interpreter has nothing
to measure, and a choice that depends on noise changes the bits of a result. Every choice is in a table instead, a test
can pin it, and `compilations` lists all of them for the gate that compiles them ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "ARCHITECTURES",
    "KERNELS",
    "Compilation",
    "Config",
    "KernelTable",
    "architecture",
    "compilations",
    "declare",
]

#: Compute capabilities that the gate compiles for, and the shared memory a block may have there. Major 8 and 12 have
#: members with 99 KB (8.6, 8.9, 12.0): what is chosen for 8 serves all of those, so it must fit there.
ARCHITECTURES: Final[dict[int, int]] = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Key = tuple[str, str]  # dtype as Triton calls it ("bf16", "fp16", "fp32", "fp64"), and a size class of the kernel's own


@dataclass(frozen=True)
class Config:
    """One compiled form: the values of the kernel's constexpr parameters, warps of a block, stages of its pipeline."""

    constants: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 3

    def __getitem__(self, name: str) -> Any:
        return dict(self.constants)[name]

    def options(self) -> dict[str, Any]:
        """What a launch is given. FP fusion is off, here and not by Triton's default, which changed in 3.10: a product
        and a sum that are rounded apart give the bits that the source says, on every version.
        """
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


@dataclass(frozen=True)
class KernelTable:
    """A kernel, the types of its arguments for a dtype, and its configuration on each architecture."""

    kernel: Any
    signature: Callable[[str], Mapping[str, str]]
    configs: Mapping[int, Mapping[Key, Config]]  # by compute capability: 80, 90, 100

    def choose(self, capability: int, dtype: str, size: str) -> Config:
        """The configuration for a device of this compute capability (0 for the interpreter: as on 90)."""
        return self.configs[architecture(capability)][dtype, size]


@dataclass(frozen=True)
class Compilation:
    """One thing for the gate to compile."""

    table: KernelTable
    capability: int
    dtype: str
    size: str
    config: Config

    @property
    def name(self) -> str:
        return f"{self.table.kernel.__name__}-{self.dtype}-{self.size}-sm_{self.capability}"


#: Every kernel that was declared, by its name; filled when a room's `kernels.py` is imported.
KERNELS: Final[dict[str, KernelTable]] = {}


def architecture(capability: int) -> int:
    """The entry of the tables that serves a compute capability such as 86."""
    major = capability // 10
    return {0: 90, 9: 90, 10: 100}.get(major, 80)  # 12 (workstations) has the shared memory of 8.6, not of 10


def declare(
    kernel: Any, signature: Callable[[str], Mapping[str, str]], configs: Mapping[int, Mapping[Key, Config]]
) -> KernelTable:
    """Register a kernel with all its configurations; a launch takes them from here and from nowhere else."""
    missing = [capability for capability in ARCHITECTURES if not configs.get(capability)]
    if missing:
        raise ValueError(f"configs: {kernel.__name__} has none for compute capability {missing}")
    table = KERNELS[kernel.__name__] = KernelTable(kernel, signature, configs)
    return table


def compilations() -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, architecture) that was declared."""
    for table in KERNELS.values():
        for capability, entries in table.configs.items():
            for (dtype, size), config in entries.items():
                yield Compilation(table, capability, dtype, size, config)
