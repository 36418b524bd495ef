"""SGD whose updates are projected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.projection import Side, project_sides
from cl_kernels.optim import _gradients, _shards
from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim._sgd import SGD, SGDTwin

__all__ = ["ProjectedSGD"]


class ProjectedSGD(SGDTwin, ProjectedOptimizer):
    """`torch.optim.SGD` with each update projected after momentum and weight decay: p <- p - lr P_left d P_right.

    Arguments, names and the subspace as in `ProjectedAdam`; with no subspace this is torch's SGD, bit for bit. For SGD
    without momentum, projecting the update and projecting the gradient agree; with momentum only the update keeps the
    promise when the subspace changes between tasks. Raises `ValueError` for hyper-parameters. Source: GPM.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        subspace: Any = None,
        nonfinite: str = "propagate",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in SGD}
        super().__init__(params, defaults, subspace, nonfinite)

    def _checked_lists(
        self, group: dict[str, Any], params: list[Tensor], bonds: list[Any], on_device: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Parameters with their new buffers, where they need one: it is not in the state before it holds something."""
        for p in params:
            buffer = self.state[p].get("momentum_buffer") if p in self.state else None
            tensors = [tensor for tensor in (p.grad, buffer) if tensor is not None]
            _gradients.check_memory(self._names.get(p, ""), p, tensors)
        return [
            (p, torch.zeros_like(p) if group["momentum"] and self.state[p].get("momentum_buffer") is None else None)
            for p in params
        ]

    def _bound(
        self,
        group: dict[str, Any],
        lists: list[tuple[Tensor, Tensor | None]],
        bonds: list[tuple[Side, Side]],
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        for (p, new_buffer), sides in zip(lists, bonds, strict=True):
            self._step(group, p, sides, new_buffer, scale, found)

    def _step(
        self,
        group: dict[str, Any],
        p: Tensor,
        sides: tuple[Side, Side],
        new_buffer: Tensor | None,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        momentum, state = group["momentum"], self.state[p]
        first = new_buffer is not None
        if first:
            state["momentum_buffer"] = new_buffer
        weight, direction, buffer = (_shards.local(t) for t in (p, p.grad, state.get("momentum_buffer")))
        found = None if found is None else _shards.local(found).to(weight.device)
        if scale is not None:
            direction = direction / _shards.local(scale)
        if group["maximize"]:
            direction = -direction
        if group["weight_decay"]:
            direction = direction.add(weight, alpha=group["weight_decay"])
        writes: list[tuple[Tensor, Tensor]] = []
        if momentum:
            new = direction if first else buffer * momentum + direction * (1 - group["dampening"])
            writes.append((buffer, new))
            direction = direction + momentum * new if group["nesterov"] else new
        writes.append((weight, weight - _shards.local(group["lr"]) * project_sides(direction, sides)))
        for target, value in writes:
            target.copy_(value if found is None else torch.where(found != 0, target, value))
