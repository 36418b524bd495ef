"""SGD whose updates are projected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from cl_kernels.ops.projection import Side, project_sides
from cl_kernels.optim import _gradients, _shards
from cl_kernels.optim._base import ProjectedOptimizer

__all__ = ["ProjectedSGD"]


class ProjectedSGD(ProjectedOptimizer):
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, subspace, nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` recomputes the loss with gradients enabled. A parameter without gradient is left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh()
        plans = []
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            prepared = [(p, self._prepared(p)) for p in present]
            for p, sides in prepared:
                if sides is not None:
                    self._check(p)
            plans.append((group, prepared))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._nonfinite == "skip":
            grads = [p.grad for _, prepared in plans for p, _ in prepared]
            found_inf, self._skipped = _gradients.found_nonfinite(grads, found_inf, self._skipped)
            if _gradients.known_bad(found_inf):
                return loss
        buffers = {  # all memory that stays is taken before anything is written
            p: torch.zeros_like(p)
            for group, prepared in plans
            for p, sides in prepared
            if sides is not None and group["momentum"] and self.state[p].get("momentum_buffer") is None
        }
        for group, prepared in plans:
            free = [p for p, sides in prepared if sides is None]
            if free:
                self._free(group, free, scale, found_inf)
        for group, prepared in plans:
            for p, sides in prepared:
                if sides is not None:
                    self._bound(group, p, sides, buffers.get(p), scale, found_inf)
        return loss

    def _check(self, p: Tensor) -> None:
        """Raise, before anything is written, where a projected parameter cannot be stepped."""
        grad: Tensor = p.grad  # type: ignore[assignment]  # those without gradient are left out
        if grad.layout is not torch.strided:
            raise RuntimeError("ProjectedSGD does not support sparse gradients of projected parameters")
        buffer = self.state[p].get("momentum_buffer") if p in self.state else None
        _gradients.check_memory(self._names.get(p, ""), p, (grad,) if buffer is None else (grad, buffer))

    def _free(self, group: dict[str, Any], params: list[Tensor], scale: Tensor | None, found: Tensor | None) -> None:
        momentum = group["momentum"]
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        fused = True if found is not None and params[0].is_cuda else group["fused"]
        sgd(
            params, [p.grad for p in params], buffers,  # type: ignore[misc]  # those without gradient are left out
            has_sparse_grad=any(p.grad is not None and p.grad.is_sparse for p in params),
            foreach=None if fused else group["foreach"], fused=fused,
            grad_scale=scale if fused else None, found_inf=found if fused else None,
            weight_decay=group["weight_decay"], momentum=momentum, lr=group["lr"], dampening=group["dampening"],
            nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
        if momentum:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _bound(
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
