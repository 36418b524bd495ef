"""The projected Adam step: prompts, LoRA factors and full weights; against torch and the official loop.

The floor is the larger of the products' arithmetic and of one pass over weight, gradient and moments. The notes of a
case count what the host hands out in a step: operations on the CPU, launches on a GPU.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable

if __package__:
    from .harness import Case, can_compile, main
    from .step_variants import FULL, State, competitors, count, expected
else:
    from harness import Case, can_compile, main
    from step_variants import FULL, State, competitors, count, expected

RANKS = (32, 64, 128, 300, FULL)
MODELS = {"ViT-B/16": (12, 768), "ViT-L/16": (24, 1024)}
# Input ranks at 95 % of the energy of the embedded backbone on the digits, a block a line: qkv, proj, fc1, fc2.
EMBEDDED_RANKS = (7, 16, 8, 26, 10, 13, 13, 32, 16, 19, 19, 58, 20, 14, 22, 71)
EMBEDDED_SHAPES = ((384, 128), (128, 128), (512, 128), (128, 512)) * 4


def step_case(name: str, s: State, *, compile_too: bool = False, loops: bool = True, slow: bool = False) -> Case:
    makers = competitors(s, compile_too=compile_too and can_compile(), loops=loops)
    counted = {kind: count(make(copy.deepcopy(s)), s.device) for kind, make in makers.items() if "compiled" not in kind}
    variants = {kind: make(copy.deepcopy(s)) for kind, make in makers.items()}
    tolerance = {kind: float("inf") if "no projection" in kind else 1e-6 for kind in variants}
    flops, bytes_moved = s.work()
    notes = {"launches" if s.device == "cuda" else "dispatched": counted}
    return Case(name, variants, expected(s), tolerance, flops=flops, bytes_moved=bytes_moved, notes=notes, slow=slow)


def rank_name(r: int) -> str:
    return "full" if r == FULL else str(r)


def prompts(quick: bool, device: str) -> Iterable[Case]:
    for layers, d in MODELS.values():
        for m in (4, 10, 100):
            for r in RANKS:
                if quick and (m, r, d) != (4, 64, 768):
                    continue
                state = State(((m, d),) * layers, (r,) * layers, left_rank=1, device=device)
                name = f"prompts {layers} x ({m} x {d}), rank {rank_name(r)}"
                yield step_case(name, state, compile_too=r in (64, FULL) and not quick)


def lora(device: str) -> Iterable[Case]:
    """Rank-16 factors of q, k, v, proj, fc1 [16, d] and of fc2 [16, 4 d] in every block."""
    for model, (layers, d) in MODELS.items():
        for r in RANKS[:-1]:
            shapes = (((16, d),) * 5 + ((16, 4 * d),)) * layers
            state = State(shapes, (r,) * len(shapes), device=device)
            yield step_case(f"LoRA factors of {model}, rank {r}", state, loops=r == 64)


def weights(device: str) -> Iterable[Case]:
    for shape in ((768, 768), (768, 3072), (3072, 768)):
        for r in RANKS:
            name = f"one weight {shape[0]} x {shape[1]}, rank {rank_name(r)}"
            yield step_case(name, State((shape,), (r,), device=device))
    yield step_case("one weight 4096 x 4096, rank 64", State(((4096, 4096),), (64,), device=device), loops=False)
    for model, (layers, d) in MODELS.items():
        block = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))
        for r in (64, 300):
            many = layers if device == "cuda" else 1
            name = f"full weights, {many} block{'s' if many > 1 else ''} of {model}, rank {r}"
            yield step_case(name, State(block * many, (r,) * 4 * many, device=device), loops=d == 768)


def all_cases(quick: bool, device: str) -> Iterable[Case]:
    yield from prompts(quick, device)
    yield step_case("full weights, embedded model", State(EMBEDDED_SHAPES, EMBEDDED_RANKS, device=device))
    if not quick:
        yield from lora(device)
        yield from weights(device)


def cases(quick: bool) -> Iterable[Case]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Case]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__doc__, cases, cuda_cases))
