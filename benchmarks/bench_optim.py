"""Whole optimizers: `ProjectedAdamW.step()` on models' parameter sets, against torch's and the official loop.

Host time is part of every number: names, groups, state and lists as users have them. `AdamW fused` without projection
is the bandwidth yardstick.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cl_kernels.benchmarks import official, peers
from cl_kernels.benchmarks.bench_projection import EMBEDDED_RANKS, EMBEDDED_SHAPES, MODELS
from cl_kernels.benchmarks.counting import count
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from cl_kernels.benchmarks.step_variants import Step, basis
from torch import Tensor, nn

from cl_kernels.ops import Projector
from cl_kernels.optim import ProjectedAdamW, project_updates

TABLE = (
    "optimizer step, embedded model",
    "optimizer step, ViT-B/16 prompts M=4, rank 64",
    "optimizer step, 2 blocks of ViT-B/16, rank 64",
)
Store = dict[str, Any]
_LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}  # output and input in units of the width


class Embedded(nn.Module):
    """The trained parameters of the embedded model: four blocks of width 128, prompts, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(s) * 0.05 for s in EMBEDDED_SHAPES)
        self.biases = nn.ParameterList(torch.randn(s[0]) for s in EMBEDDED_SHAPES)
        self.norms = nn.ParameterList(torch.randn(128) for _ in range(18))
        self.prompts = nn.ParameterList(torch.randn(1, 4, 128) for _ in range(4))
        self.head = nn.Linear(128, 10)


def embedded() -> tuple[nn.Module, Store]:
    store: Store = {
        f"weights.{i}": Projector(basis(s[1], r))
        for i, (s, r) in enumerate(zip(EMBEDDED_SHAPES, EMBEDDED_RANKS, strict=True))
    }
    store |= {f"prompts.{i}": (Projector(basis(4, 1)), Projector(basis(128, 10))) for i in range(4)}
    return Embedded(), store


def prompt_set(layers: int, m: int, d: int, r: int) -> tuple[nn.Module, Store]:
    """Prompts of every block and a head that trains freely."""
    model = nn.Module()
    model.prompts = nn.ParameterList(torch.randn(1, m, d) * 0.05 for _ in range(layers))
    model.head = nn.Linear(d, 10)
    return model, {f"prompts.{i}": (Projector(basis(m, 1)), Projector(basis(d, r))) for i in range(layers)}


def lora_set(layers: int, d: int, r: int) -> tuple[nn.Module, Store]:
    """Rank-16 factors A [16, in], projected, and B [out, 16], free, of every linear layer of every block."""
    model, store = nn.Module(), {}
    model.a, model.b = nn.ParameterList(), nn.ParameterList()
    for i in range(layers):
        for k, (out, inner) in enumerate(_LAYERS.values()):
            model.a.append(nn.Parameter(torch.randn(16, inner * d) * 0.05))
            model.b.append(nn.Parameter(torch.zeros(out * d, 16)))
            store[f"a.{4 * i + k}"] = Projector(basis(inner * d, r))
    return model, store


def weight_set(layers: int, d: int, r: int) -> tuple[nn.Module, Store]:
    """All linear layers of some blocks, with biases."""
    model, store = nn.Module(), {}
    model.blocks = nn.ModuleList()
    for i in range(layers):
        block = nn.ModuleDict({name: nn.Linear(b * d, a * d) for name, (a, b) in _LAYERS.items()})
        model.blocks.append(block)
        store |= {f"blocks.{i}.{name}.weight": Projector(basis(b * d, r)) for name, (_, b) in _LAYERS.items()}
    return model, store


def stepper(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    values = [p.detach() for p in net.parameters()]

    def step() -> list[Tensor]:
        optimizer.step()
        return values

    return step


def official_loop(net: nn.Module, store: Store) -> Step:
    """Plain AdamW, then each projected parameter's movement multiplied by dense factors, as released codes do."""
    optimizer = torch.optim.AdamW(net.parameters())
    named = dict(net.named_parameters())
    dense = {
        name: [_factor(s, named[name].dtype) for s in ((None, sides) if isinstance(sides, Projector) else sides)]
        for name, sides in store.items()
    }

    def step() -> list[Tensor]:
        official.frozen_movement(net, optimizer, dense)
        return [p.detach() for p in net.parameters()]

    return step


def _factor(side: Projector | None, dtype: torch.dtype) -> Tensor | None:
    """I - V V^T, formed in this dtype."""
    if side is None:
        return None
    basis = side.basis.to(dtype)
    return torch.eye(len(basis), dtype=dtype, device=basis.device) - basis @ basis.mT


def any_optimizer(net: nn.Module, store: Store) -> Step:
    optimizer = torch.optim.AdamW(net.named_parameters(), fused=True)
    project_updates(optimizer, store)
    return stepper(net, optimizer)


def galore(net: nn.Module) -> Step:
    """Matrices in GaLore's low-rank space, an SVD every 200 steps; everything else by its AdamW."""
    make = peers.galore_adamw()
    if make is None:
        raise RuntimeError("galore_torch is not installed")
    every = list(net.parameters())
    matrices = {"rank": 64, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": [p for p in every if p.ndim != 2]}]
    groups.append({"params": [p for p in every if p.ndim == 2], **matrices})
    return stepper(net, make(groups, lr=1e-3))


@planned("optimizer step, {name}")
def optimizer_case(name: str, make: Callable[[], tuple[nn.Module, Store]], device: str, *, loops: bool = True) -> Case:
    model, store = make()
    model, store = model.to(device), _on(store, device)
    grads = [torch.randn_like(p) for p in model.parameters()]

    def variant(make: Callable[[nn.Module], Step]) -> Step:
        net = copy.deepcopy(model)
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g
        return make(net)

    torchs = torch.optim.AdamW
    makers: dict[str, Callable[[nn.Module], Step]] = {
        "ours": lambda net: stepper(net, ProjectedAdamW(net.named_parameters(), subspace=store)),
        "ours, empty subspace": lambda net: stepper(net, ProjectedAdamW(net.named_parameters(), subspace={})),
        "project_updates(AdamW fused)": lambda net: any_optimizer(net, store),
        "AdamW foreach": lambda net: stepper(net, torchs(net.parameters(), foreach=True)),
        "AdamW fused": lambda net: stepper(net, torchs(net.parameters(), fused=True)),
    }
    if peers.galore_adamw():
        makers["GaLore AdamW, rank 64"] = galore
    if loops:
        makers["official loop"] = lambda net: official_loop(net, store)
    counted = {kind: count(variant(make), device) for kind, make in makers.items()}
    wide = copy.deepcopy(model).double()
    for p, g in zip(wide.parameters(), grads, strict=True):
        p.grad = g.double()
    exact = official_loop(wide, store)()
    close = {"ours", "project_updates(AdamW fused)", "official loop"}
    tolerance = {kind: 1e-5 if kind in close else float("inf") for kind in makers}
    elements = sum(p.numel() for p in model.parameters())
    notes = {"parameters": elements, "tensors": len(grads), "launches" if device == "cuda" else "dispatched": counted}
    return Case(
        {kind: variant(make) for kind, make in makers.items()}, exact, tolerance, bytes_moved=28.0 * elements,
        notes=notes, yardsticks=tuple(kind for kind in makers if kind not in close),
    )  # fmt: skip


def _on(store: Store, device: str) -> Store:
    moved: Store = {}
    for name, sides in store.items():
        moved[name] = sides.to(device) if isinstance(sides, Projector) else tuple(s.to(device) for s in sides)
    return moved


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    yield optimizer_case("embedded model", embedded, device)
    if quick:
        return
    for model, (layers, d) in MODELS.items():
        for m in (4, 10, 100):
            make = functools.partial(prompt_set, layers, m, d, 64)
            yield optimizer_case(f"{model} prompts M={m}, rank 64", make, device)
        make = functools.partial(lora_set, layers, d, 64)
        yield optimizer_case(f"LoRA of {model}, rank 64", make, device, loops=False)
        many = layers if device == "cuda" else 2
        make = functools.partial(weight_set, many, d, 64)
        yield optimizer_case(f"{many} blocks of {model}, rank 64", make, device, loops=False)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
