"""Times on a GPU: cold calls (L2 flushed between them), replays of a captured graph, and what the device can do.

By the protocol of the project: medians, never one number alone; variants in turns; rates measured on the same device in
the same process, because the datasheet's are not reached. `triton` comes with CUDA builds of torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["rates", "times"]


SLOW_S = 0.1  # a call this long is timed a few times by the clock: caches do not matter, and time on a GPU is scarce
CAPTURED_S = 5e-3  # longer calls gain nothing from a graph, and eigensolvers break a capture


def _seconds(call: Callable[[], Any], rep_ms: int) -> list[float]:
    """Seconds of each of many calls, with the L2 cache zeroed before each."""
    from triton.testing import do_bench

    call()
    once = [_once(call)]
    if once[0] > SLOW_S:
        return [*once, _once(call)]
    found = do_bench(call, warmup=max(20, rep_ms // 3), rep=rep_ms, return_mode="all")
    return [milliseconds / 1e3 for milliseconds in found]


def _once(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _captured(call: Callable[[], Any]) -> Callable[[], None] | str:
    """Replays of the call as a CUDA graph, or why it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # a host synchronisation, an external library on another stream, ...
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    return graph.replay


def times(variants: dict[str, Callable[[], Any]], *, turns: int = 2, rep_ms: int = 150) -> dict[str, dict[str, Any]]:
    """Each variant's columns: cold median, 20th and 80th percentile, graph replay, host time, peak temporary bytes."""
    cold: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns):
        for name, call in variants.items():
            cold[name] += _seconds(call, rep_ms)
    return {name: _columns(call, cold[name], rep_ms) for name, call in variants.items()}


def _columns(call: Callable[[], Any], cold: list[float], rep_ms: int) -> dict[str, Any]:
    low, _, _, high = statistics.quantiles(cold, n=5) if len(cold) > 1 else (cold[0],) * 4
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    repeats = max(2, min(200, int(0.3 / max(statistics.median(cold), 1e-6))))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    host = (time.perf_counter() - start) / repeats
    replay = _captured(call) if statistics.median(cold) < CAPTURED_S else f"longer than {1e3 * CAPTURED_S:g} ms"
    graph = replay if isinstance(replay, str) else statistics.median(_seconds(replay, rep_ms))
    return {
        "min_s": min(cold),
        "median_s": statistics.median(cold),
        "p20_s": low,
        "p80_s": high,
        "graph_s": None if isinstance(graph, str) else graph,
        "graph_reason": graph if isinstance(graph, str) else None,
        "host_s": host,
        "peak_bytes": peak,
    }


def rates() -> dict[str, float]:
    """GFLOP/s of matrix products and GB/s of a copy: the ceilings that floors are computed from.

    `tallgemm` is the product that a second moment consists of, bf16 [768, 25216] x [25216, 768]: what a split over rows
    competes with. `empty_launch_us` is the time of a kernel that does nothing.
    """

    def normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, device="cuda").to(dtype)

    def product(a: Tensor, b: Tensor) -> float:
        flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        return flops / statistics.median(_seconds(lambda: a @ b, 100)) / 1e9

    def square(size: int, dtype: torch.dtype) -> float:
        a = normal(size, size, dtype)
        return product(a, a)

    allowed = torch.backends.cuda.matmul.allow_tf32
    found = {}
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        found["sgemm"] = square(4096, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32gemm"] = square(8192, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    found["dgemm"] = square(4096, torch.float64)
    found["bf16gemm"] = square(8192, torch.bfloat16)
    found["split3gemm"] = square(8192, torch.float16) / 3  # three 16-bit products for one of float32 quality
    tall = normal(25216, 768, torch.bfloat16)
    found["tallgemm"] = product(tall.mT, tall)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / statistics.median(_seconds(lambda: target.copy_(source), 100)) / 1e9
    one = torch.zeros(1, device="cuda")
    found["empty_launch_us"] = 1e6 * statistics.median(_seconds(one.zero_, 50))
    return found
