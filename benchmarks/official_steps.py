"""The official repositories' optimizers, terms and layers in the middle of a stream, written anew from their formulas.

Kept are the steps that cost: what is looped over, formed again, or multiplied dense. eps stands where torch has it, so
that results can be compared with ours. `task_ways` uses them; every result is compared before its time is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.official_ftp import MU, Released
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AdamLoop", "FTPLoop", "SGDLoop", "Trained", "drift", "inf_lora_layer", "lorac_layer"]

Dense = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""By parameter, the dense factors of its update: left and right."""


class Trained(NamedTuple):
    """Copies of the parameters that a task trains, with the settings of their groups."""

    names: list[str]
    values: list[Tensor]
    rates: list[float]
    decays: list[float]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Trained:
        """From an optimizer's groups, in their order."""
        pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        return cls(
            [names[p] for p, _ in pairs],
            [p.detach().clone() for p, _ in pairs],
            [float(group["lr"]) for _, group in pairs],
            [float(group["weight_decay"]) for _, group in pairs],
        )


class AdamLoop:
    """Adam with L2 decay, then dense factors: NSP2's optimizer after foreach operations, Adam-NSCL's in one loop."""

    def __init__(self, own: Trained, dense: Dense, betas: tuple[float, float], eps: float, *, foreach: bool) -> None:
        self.own, self.betas, self.eps, self.foreach = own, betas, eps, foreach
        none = (None, None)
        self.left = [dense.get(name, none)[0] for name in own.names]
        self.right = [dense.get(name, none)[1] for name in own.names]
        self.first, self.second = ([torch.zeros_like(p) for p in own.values] for _ in range(2))
        self.taken = 0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        self.taken += 1
        updates = self._together(grads) if self.foreach else self._apart(grads)
        official.nsp2_apply(self.own.values, updates, self.left, self.right)

    def _corrections(self) -> tuple[float, float]:
        return 1 - self.betas[0] ** self.taken, 1 - self.betas[1] ** self.taken

    def _together(self, grads: Sequence[Tensor]) -> list[Tensor]:
        (one, two), own = self._corrections(), self.own
        decayed = torch._foreach_add(list(grads), torch._foreach_mul(own.values, own.decays))
        torch._foreach_lerp_(self.first, decayed, 1 - self.betas[0])
        torch._foreach_mul_(self.second, self.betas[1])
        torch._foreach_addcmul_(self.second, decayed, decayed, 1 - self.betas[1])
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_div_(roots, math.sqrt(two))
        torch._foreach_add_(roots, self.eps)
        updates = torch._foreach_div(self.first, roots)
        torch._foreach_mul_(updates, [-rate / one for rate in own.rates])
        return list(updates)

    def _apart(self, grads: Sequence[Tensor]) -> Iterator[Tensor]:
        one, two = self._corrections()
        for p, g, m, v, rate, decay in zip(
            self.own.values, grads, self.first, self.second, self.own.rates, self.own.decays, strict=True
        ):
            g = g + decay * p if decay else g
            m.mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
            v.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
            yield -rate / one * m / (v.sqrt() / math.sqrt(two)).add_(self.eps)


class SGDLoop:
    """GPM: each gradient minus its product with a dense M M^T, then plain SGD."""

    def __init__(self, own: Trained, dense: Mapping[str, Tensor]) -> None:
        self.own = own
        self.dense = [dense.get(name) for name in own.names]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        projected = [
            g if m is None else (g.view(len(g), -1) - g.view(len(g), -1) @ m).view_as(g)
            for g, m in zip(grads, self.dense, strict=True)
        ]
        torch._foreach_add_(self.own.values, torch._foreach_mul(projected, [-rate for rate in self.own.rates]))


class FTPLoop:
    """FTP from its beginning: a loop over the body's tensors, each with an anchor and a cached displacement; the other
    parameters through torch's AdamW."""

    def __init__(self, own: Trained, body: Sequence[str]) -> None:
        self.own = own
        self.inside = [index for index, name in enumerate(own.names) if name in set(body)]
        self.outside = [index for index in range(len(own.names)) if index not in set(self.inside)]
        params = [own.values[index] for index in self.inside]
        rates = {own.rates[index] for index in self.inside}
        self.state = SimpleNamespace(
            params=params, grads=[], anchors=[p.clone() for p in params], resets=[], base="adam", lr=rates.pop(),
            first=[torch.zeros_like(p) for p in params], second=[torch.zeros_like(p) for p in params],
            steps=[torch.zeros(()) for _ in params], gammas=[1e-8] * len(params),
        )  # fmt: skip
        self.loop = Released(self.state, MU, 0)
        self.free = [nn.Parameter(own.values[index]) for index in self.outside]
        groups = [
            {"params": [p], "lr": own.rates[i], "weight_decay": own.decays[i]} for p, i in zip(self.free, self.outside)
        ]
        self.adam = torch.optim.AdamW(groups, foreach=True) if groups else None

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        self.state.grads = [grads[index] for index in self.inside]
        self.loop.step()
        for p, index in zip(self.free, self.outside, strict=True):
            p.grad = grads[index]
        if self.adam is not None:
            self.adam.step()

    def tensors(self) -> list[Tensor]:
        """What it holds beside the weights and Adam's moments."""
        return [*self.state.anchors, *self.loop.tensors()]


def drift(prompts: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """NSP2's term of the loss, layer by layer, with the moments of the previous prompts formed again every time."""
    total = prompts[0].new_zeros(())
    for now, old in zip(prompts, previous, strict=True):
        mean = (now.mean(-1) - old.mean(-1)).abs()
        std = (now.std(-1, correction=0) - old.std(-1, correction=0)).abs()
        total = total + (mean + std).sum() / now.shape[-2]
    return total


def lorac_layer(layer: Any, rank: int, scale: float, x: Tensor) -> Tensor:
    """LoRAC: a layer of a `LoRAStack` through W_0 and one dense product for each task, q, k and v apart."""
    parts, done = [], 0
    for part, adapters in layer.named_adapters():
        past = None
        if adapters.ranks:
            old_a = adapters.past_a.unflatten(1, (-1, rank)).permute(1, 0, 2)
            past = (old_a, adapters.past_b.unflatten(0, (-1, rank)), adapters.omega)
        base = layer.base.weight[layer.slices[part]]
        parts.append(official.lorac_weight(base, adapters.lora_a, adapters.lora_b, past, scale))
        done += len(base)
    if done != layer.out_features:
        raise ValueError(f"layer: expected adapters on the whole output of {layer.out_features}, got {done}")
    return F.linear(x, parts[0] if len(parts) == 1 else torch.cat(parts), layer.base.bias)


def inf_lora_layer(layer: Any, rank: int, scale: float, x: Tensor) -> Tensor:
    """InfLoRA: the frozen layer, and for k and for v a second product with the sum of all tasks' dense updates."""
    y = list(layer.base(x).chunk(3, dim=-1))
    for part, adapters in layer.named_adapters():
        pairs = [(adapters.lora_a, adapters.lora_b)]
        if adapters.ranks:
            pairs = [*zip(adapters.past_a.split(rank, dim=1), adapters.past_b.split(rank), strict=True), *pairs]
        weight = torch.stack([b.mT @ a.mT for a, b in pairs]).sum(dim=0)
        index = "qkv".index(part)
        y[index] = y[index] + F.linear(x, scale * weight)
    return torch.cat(y, dim=-1)
