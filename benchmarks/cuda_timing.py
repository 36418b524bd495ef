"""Times on a GPU: cold calls (L2 zeroed between them), replays of a graph over rotated inputs, what the device can do.

By the protocol of the project: medians, never one number alone; variants in turns; rates measured on the same device in
the same process, because the datasheet's are not reached. `triton` comes with CUDA builds of torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["rates", "sets_wanted", "times"]

SLOW_S: Final = 0.1  # a call this long is timed a few times by the clock: caches do not matter, GPU time is scarce
CAPTURED_S: Final = 5e-3  # longer calls gain nothing from a graph, and eigensolvers break a capture
ROTATED_BYTES: Final = 240e6  # of inputs in turn: four times the L2 of an H200
MOST_SETS: Final = 8
REBUILD_S: Final = 4.0  # for making further sets of inputs


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


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None] | str:
    """Replays of the calls, one after the other, as a CUDA graph, or why they cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception as error:  # a host synchronisation, an external library on another stream, ...
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    return graph.replay


def sets_wanted(moved: float) -> int:
    """How many sets of inputs push each other out of the L2 cache; 0 where even `MOST_SETS` would stay inside."""
    wanted = math.ceil(ROTATED_BYTES / moved) if moved else MOST_SETS + 1
    return wanted if wanted <= MOST_SETS else 0


def times(
    variants: dict[str, Callable[[], Any]],
    *,
    rebuild: Callable[[], dict[str, Callable[[], Any]]],
    moved: float,
    turns: int = 4,
    rep_ms: int = 75,
) -> dict[str, dict[str, Any]]:
    """Each variant's columns: blocks of cold medians, graph replay cold and hot, host time, peak temporary bytes.

    `rebuild` makes the variants anew on fresh inputs; `moved`: bytes of one call. A graph runs over enough sets of
    inputs that none is found in L2 again; where a call moves too little for that, L2 is zeroed before each replay.
    """
    cold: dict[str, list[list[float]]] = {name: [] for name in variants}
    for turn in range(turns):
        names = list(variants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < 2 or statistics.median(cold[name][-1]) < SLOW_S:
                cold[name].append(_seconds(variants[name], rep_ms))
    quick = any(statistics.median(found[-1]) < CAPTURED_S for found in cold.values())
    others = _more_sets(rebuild, sets_wanted(moved)) if quick else []
    return {
        name: _columns([call, *(one[name] for one in others)], cold[name], rep_ms, moved)
        for name, call in variants.items()
    }


def _more_sets(rebuild: Callable[[], dict[str, Callable[[], Any]]], wanted: int) -> list[dict[str, Callable[[], Any]]]:
    """Further sets of inputs, or none where making all of them takes too long."""
    found: list[dict[str, Callable[[], Any]]] = []
    start = time.perf_counter()
    while len(found) < wanted - 1:
        found.append(rebuild())
        if (time.perf_counter() - start) / len(found) * (wanted - 1) > REBUILD_S:
            return []
    return found


def _columns(calls: Sequence[Callable[[], Any]], cold: list[list[float]], rep_ms: int, moved: float) -> dict[str, Any]:
    every = [value for block in cold for value in block]
    low, middle, high = statistics.quantiles(every, n=4, method="inclusive")
    call = calls[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    repeats = max(2, min(200, int(0.3 / max(middle, 1e-6))))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    host = (time.perf_counter() - start) / repeats
    graph = _graph(calls, middle, rep_ms, rotated=len(calls) * moved >= ROTATED_BYTES)
    return {
        "blocks": [[statistics.median(block) for block in cold]],
        "calls": len(every),
        "call_p25_s": low,
        "call_p75_s": high,
        **graph,
        "host_s": host,
        "peak_bytes": peak,
    }


def _graph(calls: Sequence[Callable[[], Any]], middle: float, rep_ms: int, *, rotated: bool) -> dict[str, Any]:
    """Seconds a call inside a replayed graph, with inputs that are not in L2 and, for one set, with those that are."""
    nothing = {"graph_s": None, "hot_s": None}
    if middle >= CAPTURED_S:
        return nothing | {"graph_reason": f"longer than {1e3 * CAPTURED_S:g} ms"}
    one = _captured(calls[:1])
    if isinstance(one, str):
        return nothing | {"graph_reason": one}
    every = _captured(calls) if rotated and len(calls) > 1 else one
    if isinstance(every, str):
        return nothing | {"graph_reason": every}
    hot = statistics.median(_back_to_back(one))
    found = (
        statistics.median(_back_to_back(every)) / len(calls) if rotated else statistics.median(_seconds(one, rep_ms))
    )
    return {"graph_s": found, "hot_s": hot, "graph_inputs": len(calls) if rotated else "L2 zeroed"}


def _back_to_back(replay: Callable[[], None], repeats: int = 30) -> list[float]:
    """Seconds of each of many replays, by events, nothing between them."""
    for _ in range(3):
        replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


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
