"""Trainable projection: one step of all parameters of ViT-B/16, ViT-L/16 and ResNet-50, heads left out.

A share of the rows, 0, 0.3 or all, is projected in every step. Against the official loop, the same step in foreach and
in compiled operations, and against torch's AdamW and SGD, which project nothing and are the yardstick. The floor is one
pass over weight, gradient, moments and anchor and a second one over projected rows: 32 + 12 share bytes a parameter
(SGD: 24 + 12 share). The notes of a case hold, for each variant, what is kept for a parameter in bytes, what a step
moves in bytes (ours: as computed, others: what torch's operations read and write), how many operations it hands out,
how often it waits for a number. On the CPU models that do not fit the free memory are left out, and it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cl_kernels.benchmarks.counting import Counter, count
from cl_kernels.benchmarks.ftp_variants import (
    State,
    Step,
    layers,
    torch_optimizer,
    total,
    vectorised,
)
from cl_kernels.benchmarks.harness import Case, NotHereError, Plan, can_compile, main, planned
from cl_kernels.benchmarks.official_ftp import BETA1, BETA2, EPS, MOMENTUM, Released

from cl_kernels.ops import weight_projection as wp

TABLE = (
    "FTPAdamW step, 4 blocks of ViT-B/16",
    "FTPAdamW step, ViT-B/16, 30% projected",
    "FTPAdamW step, ResNet-50, 30% projected",
    "FTPSGD step, 4 blocks of ViT-B/16, 30% projected",
)
SHARES = (0.0, 0.3, 1.0)
SMALL, GOAL = "2 blocks of width 128", "4 blocks of ViT-B/16"
NEEDED = {"ViT-B/16": 86e6, "ViT-L/16": 303e6}  # parameters of what may not fit
BYTES_EACH = 60  # of memory for a parameter while a case runs: state 26, expected 8, temporaries of the foreach form 24


class Ours:
    """The fused step on the state, with float32 or bfloat16 anchors."""

    def __init__(self, s: State, *, narrow: bool = False) -> None:
        self.s = s
        self.anchors = [a.bfloat16() for a in s.anchors] if narrow else s.anchors
        self.radii = [torch.zeros(8, device=s.device) for _ in s.params]
        s.resets.append(self.reset)

    def reset(self) -> None:
        for radius, gamma in zip(self.radii, self.s.gammas, strict=True):
            radius.zero_()
            radius[wp.GAMMA] = gamma
            radius[wp.LARGEST] = gamma

    def step(self) -> None:
        s = self.s
        if s.base == "sgd":
            wp.ftp_sgd_step_(
                s.params, s.grads, s.first, s.steps, self.anchors, self.radii, lr=s.lr, momentum=MOMENTUM,
                dampening=0.0, weight_decay=0.0, nesterov=True, radius_lr=0.0,
            )  # fmt: skip
        else:
            wp.ftp_adam_step_(
                s.params, s.grads, s.first, s.second, s.steps, self.anchors, self.radii, lr=s.lr, beta1=BETA1,
                beta2=BETA2, eps=EPS, weight_decay=0.0, radius_lr=0.0,
            )  # fmt: skip

    def share(self) -> float:
        """Of the elements, how many were in rows that the last step projected."""
        found = [float(r[wp.PROJECTED]) * p.numel() for r, p in zip(self.radii, self.s.params, strict=True)]
        return sum(found) / self.s.elements


def variants(s: State, *, compile_too: bool) -> tuple[dict[str, Step], dict[str, int]]:
    """Every way of stepping the state, and the bytes that each keeps between steps."""
    shared = total([*s.params, *s.grads, *s.first, *s.second])
    narrow, wide = Ours(s, narrow=True), Ours(s)
    steps = {"ours": s.fresh(wide.step), "ours, bf16 anchors": s.fresh(narrow.step)}
    kept = {"ours": total(s.anchors), "ours, bf16 anchors": total(narrow.anchors)}
    loop = Released(s)
    steps["official loop"], kept["official loop"] = s.fresh(loop.step), total([*s.anchors, *loop.cached])
    steps["foreach"] = vectorised(s, fused=False)
    if s.base == "adam":
        steps["foreach, fused base step"] = vectorised(s, fused=True)
        if compile_too:
            steps["compiled, fused base step"] = vectorised(s, fused=True, compiled=True)
    for name in ("foreach", "foreach, fused base step", "compiled, fused base step"):
        kept[name] = total(s.anchors)
    kind = "AdamW" if s.base == "adam" else "SGD"
    steps[f"{kind} fused"] = torch_optimizer(s, fused=True)
    if s.base == "adam":  # torch's foreach SGD adds momentum to the gradients themselves
        steps["AdamW foreach"] = torch_optimizer(s, foreach=True)
    return steps, {name: shared + kept.get(name, 0) for name in steps}


def title(model: str, share: float, base: str, **_: Any) -> str:
    return f"{'FTPAdamW' if base == 'adam' else 'FTPSGD'} step, {model}, {share:.0%} projected"


@planned(title)
def step_case(model: str, share: float, device: str, *, base: str = "adam", compile_too: bool = False) -> Case:
    """`expected` is one step of the official recurrence in float64; `read` gives what moved since the anchor."""
    refuse_what_does_not_fit(model, device)
    s = layers(model, share, device, base)
    expected = s.expected()
    steps, kept = variants(s, compile_too=compile_too and can_compile())
    found = projected_share(s)
    passes = (32 if base == "adam" else 24) + 12 * found
    moves = {"ours": passes, "ours, bf16 anchors": passes - 2 - 2 * found}
    notes: dict[str, Any] = {"parameters": s.elements, "tensors": len(s.params), "per parameter and step": {}}
    for name, step in steps.items():
        if "compiled" in name:
            continue
        counted = Counter.of(step)
        notes["per parameter and step"][name] = {
            "kept bytes": round(kept[name] / s.elements, 2),
            "moved bytes": round(moves.get(name, counted.moved / s.elements), 1),
            "operations": counted.operations,
            "waits": counted.waits,
        } | ({"launches": count(step, device)} if device == "cuda" else {})
    notes["share projected"] = round(found, 4)
    bare = {name: name.startswith(("AdamW", "SGD")) for name in steps}
    return Case(
        {name: s.fresh(step) for name, step in steps.items()},
        expected,
        {name: float("inf") if bare[name] else 1e-5 for name in steps},
        bytes_moved=passes * s.elements,
        notes=notes,
        read=lambda _: s.moved(),
        yardsticks=tuple(name for name in steps if bare[name]),
    )


def projected_share(s: State) -> float:
    """Of the elements, how many lie in rows that a step of ours projects."""
    ours = Ours(s)
    s.reset()
    ours.step()
    return ours.share()


def refuse_what_does_not_fit(model: str, device: str) -> None:
    """Raise where half the free memory is not enough for a case on the CPU. A GPU has it, or fails."""
    if device == "cuda" or model not in NEEDED:
        return
    needed, free = NEEDED[model] * BYTES_EACH, free_memory() / 2
    if needed > free:
        raise NotHereError(f"needs {needed / 1e9:.0f} GB, half of what is free is {free / 1e9:.0f} GB")


def free_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    if quick:
        yield step_case(SMALL, 0.3, device)
        yield step_case(SMALL, 0.3, device, base="sgd")
        return
    for model in (GOAL, "ViT-B/16", "ResNet-50", "ViT-L/16"):
        for share in SHARES:
            yield step_case(model, share, device, compile_too=model == GOAL or device == "cuda")
    for model in (GOAL, "ResNet-50"):
        yield step_case(model, 0.3, device, base="sgd")


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
