"""AdamW with selective projection decay (SPD, Tian et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import DOT, SQUARES, displacement_products, rescale_
from cl_kernels.optim import _shards
from cl_kernels.optim._adam import Betas
from cl_kernels.optim._pull import PulledAdamW

__all__ = ["SPDAdamW"]


class SPDAdamW(PulledAdamW):
    """`torch.optim.AdamW`, after whose step a weight that moved off its anchor against the gradient's will is put back.

    With d and c the displacement W - W_0 of one tensor before and after AdamW's step, as published:

        where <G, d> > 0:  r = max(0, (|c|_2 - |d|_2) / |c|_2),  W <- W_0 + (1 - strength r) c;  else nothing

    <G, d> > 0 says that going on outward raises the loss. `strength` is the paper's lambda: 1 puts W back on the sphere
    on which the step found it, 0 is AdamW bit for bit. It is not multiplied by the learning rate, and replaces weight
    decay (0 here by default; what is given is torch's ordinary decay towards zero). Where strength r > 1 the weight
    stops at its anchor.

    It acts where the step has gone outward although the gradient says inward, by momentum or for another element's
    sake: often near the anchor, seldom in long runs. `fired()` and `fire_rate()` count it. Transcriptions with the
    condition inverted are in circulation.

    Arguments as `torch.optim.AdamW`; `params`, `anchors`, `exclude`, `anchor_dtype` and what they raise as in
    `FTPAdamW` (`anchors=None` is a zero anchor, for adapters that start at zero). No host synchronisation. Cost:
    AdamW's 28 bytes a parameter, two passes of 8 to 12 over weights and anchors, 12 more where it acts; 4 of memory for
    the anchor. Source: method-trainable-projection 10."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        strength: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, strength=strength, **options)

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
        before = displacement_products(grads, params, anchors)
        self._twin(group, twin, scale, found)
        after = displacement_products(None, params, anchors)
        sums = torch.stack([before[:, DOT], before[:, SQUARES], after[:, SQUARES]], dim=1)
        dot, was, now = _shards.summed(sums, whole).unbind(1)
        outward, was, now = -dot if group["maximize"] else dot, was.sqrt(), now.sqrt()
        r = torch.where((outward > 0) & (now > was), (now - was) / now, 0.0)
        rescale_(params, anchors, list((1 - group["strength"] * r).clamp(min=0.0).unbind()), norm="l2")
        torch._foreach_add_(fired, list((r > 0).float().unbind()))
