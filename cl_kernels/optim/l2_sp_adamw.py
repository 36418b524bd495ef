"""AdamW with a pull towards the starting point (L2-SP, Li, Grandvalet and Davoine, ICML 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import SQUARES, displacement_products, rescale_
from cl_kernels.optim import _shards
from cl_kernels.optim._adam import Betas
from cl_kernels.optim._pull import PulledAdamW

__all__ = ["L2SPAdamW"]


class L2SPAdamW(PulledAdamW):
    """`torch.optim.AdamW` with a pull towards the anchor, as weight decay pulls towards zero; d = W - W_0.

    coupled:    G <- G + strength d before the moments: the gradient of the penalty strength / 2 |W - W_0|^2, published
                for SGD (strength 0.1). Adam divides it by the gradient's size, so that it weighs most where gradients
                are small.
    decoupled:  W <- W - lr strength d before AdamW's step, as AdamW decays: with `anchors=None` it is weight decay.

    `strength=0` is AdamW bit for bit. The paper's beta, the decay of a new head, is the `weight_decay` of the head's
    group. `fired()` counts the steps in which a weight was off its anchor and was pulled. `p.grad` is not changed.

    Arguments as `torch.optim.AdamW`; `params`, `anchors`, `exclude`, `anchor_dtype` and what they raise as in
    `FTPAdamW`. No host synchronisation. Cost: AdamW's 28 bytes a parameter and 20 more; 4 of memory for the
    anchor, coupled 8 for a copy of the gradients during the step. Source: method-trainable-projection 10."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        strength: float = 0.1,
        coupled: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, strength=strength, coupled=coupled, **options)

    def _pulled(
        self, group: dict[str, Any], lists: Any, bonds: list[Any], scale: Tensor | None, found: Tensor | None
    ) -> None:
        whole, fired, *rest = lists
        twin = tuple(rest)
        if group["strength"] == 0:
            self._twin(group, twin, scale, found)
            return
        params, grads = twin[:2]
        anchors = [bond.slot for bond in bonds]
        squares = displacement_products(None, params, anchors)[:, SQUARES]
        acts = _shards.summed(squares, whole) > 0
        if found is not None:
            acts = acts & (_shards.local(found).to(acts.device) == 0)
        if group["coupled"]:
            twin = (params, self._coupled(group, params, grads, anchors, scale), *twin[2:])
        else:
            kept = 1 - torch.as_tensor(_shards.local(group["lr"]), dtype=torch.float64) * group["strength"]
            rescale_(params, anchors, list(torch.where(acts, kept.to(acts.device), 1.0).unbind()), norm="l2")
        self._twin(group, twin, scale, found)
        torch._foreach_add_(fired, list(acts.float().unbind()))

    def _coupled(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        anchors: list[Tensor | None],
        scale: Tensor | None,
    ) -> list[Tensor]:
        """The gradients with the pull, times the scale that they carry."""
        alpha = -group["strength"] if group["maximize"] else group["strength"]
        made = []
        for p, grad, anchor in zip(params, grads, anchors, strict=True):
            pull = alpha * (p if anchor is None else p - anchor)
            made.append(grad + (pull if scale is None else pull * _shards.local(scale).to(p.device)))
        return made
