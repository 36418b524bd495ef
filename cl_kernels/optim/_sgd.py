"""The torch side of SGD: its settings, its momentum, and its own functional step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from cl_kernels.optim._named import NamedOptimizer

__all__ = ["SGD", "SGDTwin"]

SGD = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused",
)  # fmt: skip


class SGDTwin(NamedOptimizer):
    """Settings, momentum and free parameters exactly as torch's SGD has them."""

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

    def _refuse_sparse(self, bound: bool) -> None:
        if bound:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} does not support sparse gradients, but of parameters that train freely")

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
