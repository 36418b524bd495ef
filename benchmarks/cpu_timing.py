"""Times on a CPU: process CPU time of one thread, variants in turns, and what the processor can do at this moment."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from cl_kernels.benchmarks.memory import peak_extra

__all__ = ["BUDGET_S", "best", "clock", "rates", "schedule", "times"]

BUDGET_S: Final = 1.5  # seconds of timing for a case in a pass
SLICE_S: Final = 0.01  # a slice is timed as a whole; the clock counts in microseconds, a tick of the kernel in 1-4 ms
SLICES: Final = 3  # a block's value is the least of its slices: what an interrupt hit is left out
MOST, FEWEST = 15, 2  # blocks of a variant
LONG_S: Final = 0.7  # a first call this long counts as a block: warming up is a small part of it
ENDLESS_S: Final = 2.0  # a first call this long is the only one of its pass


def clock() -> float:
    """CPU seconds of this process and of the children it has waited for (these to 10 ms)."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


def best(call: Callable[[], Any], repeats: int = 7) -> float:
    """The least CPU seconds of a few calls."""
    found = []
    for _ in range(repeats):
        start = clock()
        call()
        found.append(clock() - start)
    return min(found)


def rates() -> dict[str, float]:
    """GFLOP/s of matrix products, GB/s of a copy."""

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024, dtype=dtype)
        return 2 * 1024**3 / best(lambda: a @ a) / 1e9

    source = torch.randn(1 << 24)  # 64 MiB, past most last-level cache slices
    target = torch.empty_like(source)
    return {
        "sgemm": product(torch.float32),
        "dgemm": product(torch.float64),
        "bf16gemm": product(torch.bfloat16),
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


def schedule(blocks: dict[str, int]) -> Iterator[str]:
    """Names in turns: each as often as it says, spread evenly over the rounds, the first of a round rotating.

    So a variant whose call takes seconds is timed twice while a quick one is timed fifteen times, and what the machine
    does in the meantime falls on both.
    """
    rounds = max(blocks.values(), default=0)
    names = list(blocks)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn * blocks[name] // rounds != (turn + 1) * blocks[name] // rounds:
                yield name


def times(
    variants: dict[str, Callable[[], Any]],
    first: dict[str, float],
    budget_s: float = BUDGET_S,
    *,
    peaks: bool = True,
) -> dict[str, dict[str, Any]]:
    """Blocks of CPU time a call, minimum wall time, peak extra memory of each variant.

    `first`: CPU seconds of a first call, which say how many calls and blocks fit the budget; all variants have the same
    share of it. At least 2 blocks, the first call counted where it is long; one that takes seconds is not repeated, and
    its memory not measured: the next pass brings the second block.
    """
    quickest = {name: first[name] if first[name] > 0.1 else best(call, 2) for name, call in variants.items()}
    calls = {name: max(1, round(SLICE_S / max(seconds, 1e-7))) for name, seconds in quickest.items()}
    slices = {name: SLICES if calls[name] * quickest[name] < 10 * SLICE_S else 1 for name in variants}
    blocks: dict[str, list[float]] = {name: [first[name]] if first[name] > LONG_S else [] for name in variants}
    wanted = {}
    for name, seconds in quickest.items():
        fits = int(budget_s / len(variants) / max(slices[name] * calls[name] * seconds, 1e-9))
        wanted[name] = 0 if first[name] > ENDLESS_S else max(FEWEST - len(blocks[name]), min(MOST, fits))
    wall: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for name in schedule(wanted):
            cpu_s, wall_s = _block(variants[name], calls[name], slices[name])
            blocks[name].append(cpu_s)
            wall[name].append(wall_s)
    finally:
        gc.enable()
    return {
        name: {
            "blocks": [blocks[name]],
            "calls": calls[name] * slices[name],
            "wall_min_s": min(wall[name], default=None),
            "peak_bytes": peak_extra(call) if peaks and first[name] <= ENDLESS_S else None,
        }
        for name, call in variants.items()
    }


def _block(call: Callable[[], Any], calls: int, slices: int) -> tuple[float, float]:
    """The least CPU and wall seconds a call of a few slices."""
    cpu, wall = [], []
    for _ in range(slices):
        wall_start, cpu_start = time.perf_counter(), clock()
        for _ in range(calls):
            call()
        cpu.append((clock() - cpu_start) / calls)
        wall.append((time.perf_counter() - wall_start) / calls)
    return min(cpu), min(wall)
