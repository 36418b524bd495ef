"""The projected Adam step: prompts, LoRA factors and full weights; against torch and the official loop.

The floor is the larger of the products' arithmetic and of one pass over weight, gradient and moments. The notes of a
case count what the host hands out in a step: operations on the CPU, launches on a GPU.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence

import torch
from cl_kernels.benchmarks.counting import count
from cl_kernels.benchmarks.harness import Case, Plan, can_compile, main, planned
from cl_kernels.benchmarks.options import expect
from cl_kernels.benchmarks.step_variants import FULL, State, competitors, expected

TABLE = (
    "prompts 12 x (4 x 768), rank 64",
    "prompts 12 x (100 x 768), rank 300",
    "LoRA factors of ViT-B/16, rank 64",
    "full weights, 1 block of ViT-B/16",
    "full weights, embedded model",
)
RANKS = (32, 64, 128, 300, FULL)
MODELS = {"ViT-B/16": (12, 768), "ViT-L/16": (24, 1024)}
# Input ranks at 95 % of the energy of the embedded backbone on the digits, a block a line: qkv, proj, fc1, fc2.
EMBEDDED_RANKS = (7, 16, 8, 26, 10, 13, 13, 32, 16, 19, 19, 58, 20, 14, 22, 71)
EMBEDDED_SHAPES = ((384, 128), (128, 128), (512, 128), (128, 512)) * 4


@planned("{name}")
def step_case(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    ranks: tuple[int, ...],
    device: str,
    *,
    left_rank: int = 0,
    compile_too: bool = False,
    loops: bool = True,
) -> Case:
    s = State(shapes, ranks, left_rank=left_rank, device=device)
    makers = competitors(s, compile_too=compile_too and can_compile(), loops=loops)
    counted = {kind: count(make(copy.deepcopy(s)), s.device) for kind, make in makers.items() if "compiled" not in kind}
    variants = {kind: make(copy.deepcopy(s)) for kind, make in makers.items()}
    tolerance = {kind: float("inf") if "no projection" in kind else 1e-6 for kind in variants}
    flops, bytes_moved = s.work()
    notes = {"launches" if s.device == "cuda" else "dispatched": counted}
    bare = tuple(name for name in variants if "no projection" in name)
    return Case(variants, expected(s), tolerance, flops=flops, bytes_moved=bytes_moved, notes=notes, yardsticks=bare)


def rank_name(r: int) -> str:
    return "full" if r == FULL else str(r)


def prompts(quick: bool, device: str) -> Iterable[Plan]:
    for layers, d in MODELS.values():
        for m in (4, 10, 100):
            for r in RANKS:
                if quick and (m, r, d) != (4, 64, 768):
                    continue
                compile_too = r in (64, FULL) and not quick
                yield prompt_case(layers, m, d, r, device, compile_too=compile_too)


def prompt_case(layers: int, m: int, d: int, r: int, device: str, *, compile_too: bool = False) -> Plan:
    name = f"prompts {layers} x ({m} x {d}), rank {rank_name(r)}"
    return step_case(name, ((m, d),) * layers, (r,) * layers, device, left_rank=1, compile_too=compile_too)


def lora(device: str) -> Iterable[Plan]:
    """Rank-16 factors of q, k, v, proj, fc1 [16, d] and of fc2 [16, 4 d] in every block."""
    for model, (layers, d) in MODELS.items():
        for r in RANKS[:-1]:
            shapes = (((16, d),) * 5 + ((16, 4 * d),)) * layers
            ranks = (r,) * len(shapes)
            yield step_case(f"LoRA factors of {model}, rank {r}", shapes, ranks, device, loops=r == 64)


def weights(device: str) -> Iterable[Plan]:
    for shape in ((768, 768), (768, 3072), (3072, 768)):
        for r in RANKS:
            name = f"one weight {shape[0]} x {shape[1]}, rank {rank_name(r)}"
            yield step_case(name, (shape,), (r,), device)
    yield step_case("one weight 4096 x 4096, rank 64", ((4096, 4096),), (64,), device, loops=False)
    for model, (layers, d) in MODELS.items():
        block = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))
        for r in (64, 300):
            many = layers if device == "cuda" else 1
            name = f"full weights, {many} block{'s' if many > 1 else ''} of {model}, rank {r}"
            yield step_case(name, block * many, (r,) * 4 * many, device, loops=d == 768)


def custom(sizes: Sequence[int], dtype: torch.dtype | None, device: str) -> Iterable[Plan]:
    """float32, as optimizers keep it."""
    expect("projection", sizes, "layers x rows x columns x rank")
    yield prompt_case(*sizes, device)


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    yield from prompts(quick, device)
    yield step_case("full weights, embedded model", EMBEDDED_SHAPES, EMBEDDED_RANKS, device)
    if not quick:
        yield from lora(device)
        yield from weights(device)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
