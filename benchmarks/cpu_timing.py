"""Times on a CPU: process CPU time of one thread, variants in turns, and what the processor can do at this moment."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

if __package__:
    from .memory import peak_extra
else:
    from memory import peak_extra

__all__ = ["best", "rates", "times"]


def best(call: Callable[[], Any], repeats: int = 7) -> float:
    """The least CPU seconds of a few calls."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
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


def times(
    variants: dict[str, Callable[[], Any]],
    first: dict[str, float],
    rounds: int = 7,
    *,
    slice_s: float = 0.05,
    budget_s: float = 30.0,
) -> dict[str, dict[str, Any]]:
    """Minimum and median CPU time, minimum wall time, peak extra memory; at least 3 rounds where they are long.

    `first`: CPU seconds of a first call, which say how many calls and rounds are wanted.
    """
    quickest = {name: first[name] if first[name] > 0.3 else best(call, 3) for name, call in variants.items()}
    calls = {name: max(1, round(slice_s / max(seconds, 1e-7))) for name, seconds in quickest.items()}
    rounds = max(min(rounds, 3), min(rounds, int(budget_s / max(sum(quickest.values()), 1e-3))))
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                call, count = variants[name], calls[name]
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                for _ in range(count):
                    call()
                cpu[name].append((time.process_time() - cpu_start) / count)
                wall[name].append((time.perf_counter() - wall_start) / count)
    finally:
        gc.enable()
    return {
        name: {
            "min_s": min(cpu[name]),
            "median_s": statistics.median(cpu[name]),
            "wall_min_s": min(wall[name]),
            "rounds": rounds,
            "peak_bytes": peak_extra(call),
        }
        for name, call in variants.items()
    }
