"""SGD whose weights stay in learned balls around their anchor."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import ftp_sgd_
from cl_kernels.ops.weight_projection.arguments import SGD
from cl_kernels.optim import _gradients, _sgd, _shards
from cl_kernels.optim._radii import Lists, RadiusOptimizer, RadiusOptions
from cl_kernels.optim._sgd import SGDTwin

__all__ = ["FTPSGD"]


class FTPSGD(RadiusOptimizer, SGDTwin):
    """`torch.optim.SGD` whose weights stay near an anchor; everything but the base step is as in `FTPAdamW`.

    Weight decay is added to the gradient, as in SGD. Memory: 4 bytes a parameter beside SGD's. Cost: 24 + 12 f bytes a
    parameter with momentum, f the share in projected rows, against 20. Source: FTP, Tian et al. 2023.
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
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **options: Unpack[RadiusOptions],
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in _sgd.SGD}, **options)

    def _moments(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Tensor], ...]:
        moments = ("momentum_buffer",) if group["momentum"] else ()
        self._masters(group, params, *moments)
        for p in params:
            state = self.state[p]
            kept = [state[key] for key in moments if state.get(key) is not None]
            _gradients.check_memory(self._names.get(p, ""), p, (p.grad, *kept))  # type: ignore[arg-type]  # has one
            device = _shards.local(p).device
            if "step" not in state:  # momentum of torch's SGD comes without a count: its first step is over
                fresh = torch.zeros_like if not kept else torch.ones_like
                state["step"] = fresh(torch.empty((), dtype=torch.float32, device=device))
            elif state["step"].device != device:
                state["step"] = state["step"].to(device)
            if moments and not kept:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # those without are left out
        buffers = [self.state[p]["momentum_buffer"] for p in params] if moments else []
        return grads, buffers, [], [], [self.state[p]["step"] for p in params]

    def _base(self, group: dict[str, Any]) -> SGD:
        return SGD(group["momentum"], group["dampening"], group["nesterov"])

    def _fused(
        self, group: dict[str, Any], lists: Lists, rule: tuple[Any, ...], scale: Tensor | None, found: Tensor | None
    ) -> None:
        momentum, dampening, nesterov = self._base(group)
        ftp_sgd_(
            lists.weights, lists.grads, lists.firsts, lists.steps, lists.slots, lists.records,
            _shards.local(group["lr"]), group["weight_decay"], group["maximize"], scale, found,
            (momentum, dampening, nesterov), rule,
        )  # fmt: skip
