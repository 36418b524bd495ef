"""The methods' own part of a step at the shapes of a larger transformer, for one block or for all its prompts.

Weights and gradients are random; every projector is as thin as a share of its layer's directions says, so that shares
measured on a real stream can be carried over. Ours and the official way as in `task_ways`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from cl_kernels.benchmarks import official, official_steps
from cl_kernels.benchmarks.ftp_variants import vit
from cl_kernels.benchmarks.official_steps import AdamLoop, FTPLoop, SGDLoop, Trained
from cl_kernels.benchmarks.task_costs import STEP_LIMIT, Part, Steps, compared, layer_parts, step_row
from torch import nn

from cl_kernels._timm import import_timm
from cl_kernels.nn import LoRAStack
from cl_kernels.ops import Projector, Sides
from cl_kernels.optim import FTPAdamW, ProjectedAdam, ProjectedSGD

__all__ = ["VIT_B", "Shapes", "own_part", "shares"]

STEPS: Final = 5  # the first is not counted
POSITIONS: Final = {"lorac": ("q", "k", "v", "proj", "fc1", "fc2"), "inf-lora": ("k", "v")}


@dataclass(frozen=True)
class Shapes:
    """A vision transformer by its sizes, and how many images of `tokens` rows its adapted layers see."""

    name: str
    width: int
    depth: int
    tokens: int
    images: int
    prompts: int = 4
    rank: int = 8
    tasks: int = 6


VIT_B: Final = Shapes("ViT-B/16", 768, 12, 197, 32)


def shares(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Of a method's report `subspace()`, by kind of layer and side, the mean share of directions that are protected."""
    found: dict[str, list[float]] = {}
    for name, sides in report.items():
        kind = "prompts" if name.startswith("prompts") else name.removesuffix(".weight").rpartition(".")[2]
        for side, one in sides.items():
            found.setdefault(f"{kind} {side}", []).append(one["protected"] / one["dim"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def own_part(method: str, shapes: Shapes, protected: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """`step_row` of a method's own part, and of what of the model it is. `protected`: as `shares` gives it.

    Raises `ValueError` where the two ways differ by more than rounding.
    """
    torch.manual_seed(0)
    if method in POSITIONS:
        parts, what = _adapters(method, shapes, rounds), f"one of {shapes.depth} blocks, {shapes.images} images"
    else:
        parts = [_optimizer(method, shapes, protected)]
        what = f"prompts of {shapes.depth} blocks" if method == "nsp2" else f"one of {shapes.depth} blocks"
    found = step_row(parts, None)
    if not found["step_difference"] <= STEP_LIMIT:
        raise ValueError(f"{method} at {shapes.name}: the ways differ by {found['step_difference']:.1e}")
    return {"shapes": f"{shapes.name}, {what}", **found}


def _projector(size: int, share: float) -> Projector:
    """Off a random subspace of this share of all directions, or onto the rest, whichever is thinner."""
    rank = round(size * share)
    basis = torch.linalg.qr(torch.randn(size, min(rank, size - rank)))[0].mT.contiguous().mT
    return Projector(basis) if rank <= size - rank else Projector(basis, 0.0, -1.0)


def _matrices(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    d = shapes.width
    return {"qkv": (3 * d, d), "proj": (d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d)}


def _optimizer(method: str, shapes: Shapes, protected: Mapping[str, float]) -> Part:
    if method == "nsp2":
        sizes: dict[str, tuple[int, ...]] = {
            f"prompts.{i}": (1, shapes.prompts, shapes.width) for i in range(shapes.depth)
        }
    elif method == "ftp":
        sizes = {str(i): shape for i, shape in enumerate(vit(shapes.width, 1, whole=False))}
    else:
        sizes = _matrices(shapes)
    params = {name: nn.Parameter(0.05 * torch.randn(size)) for name, size in sizes.items()}
    named, names = list(params.items()), {p: name for name, p in params.items()}
    sides = {}
    for name, size in sizes.items():
        kind = name.partition(".")[0]
        left = _projector(size[-2], protected["prompts left"]) if method == "nsp2" else None
        if method != "ftp":
            sides[name] = Sides(left, _projector(size[-1], protected[f"{kind} right"]))
    optimizer: torch.optim.Optimizer
    loop: AdamLoop | SGDLoop | FTPLoop
    if method == "ftp":
        optimizer = FTPAdamW(named, lr=1e-3)
        loop = FTPLoop(Trained.of(optimizer, names), list(params))
    elif method == "gpm":
        optimizer = ProjectedSGD(named, lr=1e-2, subspace=sides)
        removed = {n: torch.eye(sizes[n][-1]) - s.right.matrix() for n, s in sides.items() if s.right is not None}
        loop = SGDLoop(Trained.of(optimizer, names), removed)
    else:
        optimizer = ProjectedAdam(named, lr=1e-3, subspace=sides)
        dense = {n: tuple(None if p is None else p.matrix() for p in both) for n, both in sides.items()}
        foreach = method == "nsp2"
        loop = AdamLoop(Trained.of(optimizer, names), dense, (0.9, 0.999), 1e-8, foreach=foreach)  # type: ignore[arg-type]
    steps = Steps(optimizer, loop)
    steady = [torch.randn_like(p) for p in params.values()]  # without a direction radii would fall to their floor
    for _ in range(STEPS):
        for p, g in zip(params.values(), steady, strict=True):
            p.grad = g + 0.1 * torch.randn_like(p)
        steps.step()
    return steps.part("optimizer step")


def _adapters(method: str, shapes: Shapes, rounds: int) -> list[Part]:
    """A stack in its last task, every B non-zero."""
    import_timm()
    made = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    side = round((shapes.tokens - 1) ** 0.5)
    backbone = made(
        img_size=16 * side, patch_size=16, embed_dim=shapes.width, depth=1, num_heads=max(1, shapes.width // 64),
        num_classes=0,
    )  # fmt: skip
    stack = LoRAStack(backbone, shapes.rank, float(shapes.rank), POSITIONS[method], method)
    for task in range(shapes.tasks):
        stack.begin_task()
        for one in stack.places().values():
            with torch.no_grad():
                one.lora_b.normal_(std=0.02)
        if task < shapes.tasks - 1:
            stack.end_task()
    images = torch.randn(shapes.images, 3, 16 * side, 16 * side)
    theirs = official_steps.lorac_layer if method == "lorac" else official_steps.inf_lora_layer
    parts = layer_parts(stack, images, theirs, rounds)
    if method == "lorac":
        pairs = [(one.past_a, one.lora_a) for one in stack.places().values()]

        def gradients(penalty: Any) -> Any:
            return lambda: list(torch.autograd.grad(penalty(), [new for _, new in pairs]))

        parts.append(
            compared("penalty", gradients(stack.penalty), gradients(lambda: official.lorac_penalty(pairs)), rounds)
        )
    optimizer = torch.optim.Adam([p for _, p in stack.trainable_parameters()], lr=1e-3, foreach=True)
    steps = Steps(optimizer, None)
    for _ in range(STEPS):
        for _, p in stack.trainable_parameters():
            p.grad = torch.randn_like(p)
        steps.step()
    return [*parts, steps.part("optimizer step")]
