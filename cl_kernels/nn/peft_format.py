"""LoRA stacks in PEFT's names and shapes, both ways, without importing PEFT; and OLoRA's initialisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.nn._lora_linear import LoRALinear
from cl_kernels.nn.lora_stack import LoRAStack

__all__ = ["from_peft", "olora_init", "peft_config", "to_peft_state_dict"]

PREFIX = "base_model.model."


@torch.no_grad()
def to_peft_state_dict(stack: LoRAStack, task: int | None = None, *, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The update of all tasks (of the snapshot `task`, if given) as one PEFT adapter: `adapter_model.safetensors`.

    ``<prefix><layer>.lora_A.weight`` [K, in] and ``.lora_B.weight`` [out, K], the transposes of A and B here; K is the
    sum of the ranks. Coefficients and scale are in lora_B, so PEFT's scaling is 1 (`peft_config`). q, k and v of a
    fused projection become one adapter of rank K_q + K_k + K_v whose lora_B is zero outside their slices. Exact to
    rounding. Layers without an adapter are left out.
    """
    state: dict[str, Tensor] = {}
    stack.orthogonality.refresh(stack.places())  # a step may have come after the last forward pass
    with stack.at(task) if task is not None else nullcontext():
        for name, layer in stack.layers():
            downs, ups = [], []
            for part, adapters in layer.named_adapters():
                a, b = adapters.factors()
                up = b.new_zeros(layer.out_features, b.shape[0])
                up[layer.slices[part]] = b.mT
                downs.append(a.mT)
                ups.append(up)
            down, up = torch.cat(downs), torch.cat(ups, dim=1)
            if down.shape[0]:
                state[f"{prefix}{name}.lora_A.weight"] = down.contiguous()
                state[f"{prefix}{name}.lora_B.weight"] = up.contiguous()
    return state


def peft_config(state: Mapping[str, Tensor], *, prefix: str = PREFIX) -> dict[str, Any]:
    """The `adapter_config.json` that belongs to `to_peft_state_dict`: a rank for each layer, alpha equal to it."""
    ranks = {
        key.removeprefix(prefix).removesuffix(".lora_A.weight"): int(value.shape[0])
        for key, value in state.items()
        if key.endswith(".lora_A.weight")
    }
    common = max(ranks.values(), default=1)
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@torch.no_grad()
def from_peft(
    stack: LoRAStack, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, prefix: str = PREFIX
) -> None:
    """Add a PEFT LoRA adapter to the history of `stack` as one more task, with coefficient 1.

    `config` gives `lora_alpha`, `r` and their patterns (default: scaling 1). A fused qkv adapter is divided over the
    slices, each keeping only the columns that reach it. Raises `ValueError` for keys of other layers, shapes that do
    not fit, or an adapter that touches a slice the stack does not adapt; `RuntimeError` while a task is open. Nothing
    is changed then.
    """
    if stack.training_task:
        raise RuntimeError("from_peft: end the task first")
    layers = dict(stack.layers())
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.removeprefix(prefix).removesuffix(".weight").rpartition(".lora_")
        name, kind = (name, kind.partition(".")[0]) if name else (key, "")
        if name not in layers or kind not in ("A", "B") or not key.endswith(".weight"):
            raise ValueError(f"state: {key!r} is not lora_A or lora_B of a layer that the stack adapts")
        pairs.setdefault(name, {})[kind] = value
    parts = [piece for name, pair in pairs.items() for piece in _pieces(name, layers[name], pair, config)]
    stack.task += 1
    for adapters, a, b in parts:
        adapters.append(a.to(adapters.past_a), b.to(adapters.past_b) / stack.scale, a.new_ones(()), stack.task)
    for adapters in stack.places().values():
        adapters.snapshot()


def _pieces(
    name: str, layer: LoRALinear, pair: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> list[tuple[Any, Tensor, Tensor]]:
    """(adapters, A [in, r], B [r, out]) of every slice that the pair reaches."""
    down, up = pair.get("A"), pair.get("B")
    fits = down is not None and up is not None and down.ndim == up.ndim == 2
    if (
        not fits
        or down is None
        or up is None
        or (down.shape[1], up.shape)
        != (
            layer.in_features,
            (layer.out_features, down.shape[0]),
        )
    ):
        got = [None if t is None else tuple(t.shape) for t in (down, up)]
        raise ValueError(f"state: {name} expected [r, {layer.in_features}] and [{layer.out_features}, r], got {got}")
    scaling = _scaling(name, down.shape[0], config)
    covered = torch.zeros(layer.out_features, dtype=torch.bool)
    pieces = []
    for part, adapters in layer.named_adapters():
        where = layer.slices[part]
        covered[where] = True
        reached = (up[where] != 0).any(dim=0)
        if bool(reached.any()):
            pieces.append((adapters, down[reached].mT, scaling * up[where][:, reached].mT))
    if bool((up[~covered.to(up.device)] != 0).any()):
        raise ValueError(f"state: {name} changes outputs that the stack does not adapt; give it all of q, k and v")
    return pieces


def _scaling(name: str, rank: int, config: Mapping[str, Any] | None) -> float:
    if config is None:
        return 1.0
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    declared = _by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    if declared != rank:
        raise ValueError(f"config: {name} has rank {rank}, but the configuration says {declared}")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that is the end of `name`, read as PEFT does: a regular expression."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


@torch.no_grad()
def olora_init(stack: LoRAStack) -> None:
    """Start the open task's adapters from a thin QR of the frozen weights (OLoRA), without changing the function.

    With W = Q R of a weight [out, in], B = Q[:, :r]^T and A = R[:r]^T. Only r columns are factored and R[:r] = Q^T W:
    the same result as a QR of all of W, at out r^2 + 2 out in r operations. PEFT subtracts s Q_r R_r from the base
    weights; here a frozen adapter with coefficient -1 does, so they stay as they were. Raises `RuntimeError` when no
    task is open, `ValueError` for compositions whose history may not hold such an adapter (SD-LoRA).
    """
    if not stack.training_task:
        raise RuntimeError("olora_init: begin a task first")
    if stack.composition.normalized or stack.composition.omega or stack.orthogonality.enforcement == "qr":
        raise ValueError("stack: OLoRA's starting adapter needs fixed coefficients and a free A (composition 'sum')")
    for _, layer in stack.layers():
        for part, adapters in layer.named_adapters():
            current = adapters.current
            if current is None:
                continue
            weight = layer.base.weight[layer.slices[part]].detach()
            rank = current.a.shape[1]
            q = ops.qr(weight[:, :rank]).q
            a, b = (q.mT @ weight).mT, q.mT
            current.a.copy_(a)
            current.b.copy_(b)
            adapters.append(a.contiguous(), b.contiguous(), -a.new_ones(()), stack.task)
    stack.orthogonality.forget()
