"""What the implementations of the steps are called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SGD",
    "Adam",
    "Rule",
    "Step",
    "adam_step",
    "apart",
    "compute_dtype",
    "distinct",
    "is_absent",
    "present",
    "sgd_step",
    "written",
]


class Adam(NamedTuple):
    """The base step of AdamW (decoupled decay) or Adam."""

    beta1: float
    beta2: float
    eps: float
    decoupled: bool


class SGD(NamedTuple):
    """The base step of SGD; there are no buffers where momentum is 0."""

    momentum: float
    dampening: float
    nesterov: bool


class Rule(NamedTuple):
    """How the radius moves; `radius_lrs` and `fixed` hold one number, or one a parameter (`fixed` may be empty)."""

    kappa: float
    radius_lrs: list[float]
    masked: bool
    floor: float
    fixed: list[float]
    norm: int

    def radius_lr(self, i: int) -> float:
        return self.radius_lrs[i if len(self.radius_lrs) > 1 else 0]

    def fixed_radius(self, i: int) -> float | None:
        return self.fixed[i if len(self.fixed) > 1 else 0] if self.fixed else None


class Step(NamedTuple):
    """One call; what the fields mean stands at the public functions.

    `firsts` are Adam's first moments or SGD's momentum buffers (empty without momentum), `seconds` and `largests` are
    Adam's alone (`largests` empty without amsgrad). A zero anchor is a tensor without elements: `is_absent`.
    """

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    largests: list[Tensor]
    steps: list[Tensor]
    anchors: list[Tensor]
    radii: list[Tensor]
    lr: float
    lr_tensor: Tensor | None
    weight_decay: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    base: Adam | SGD
    rule: Rule


def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor],
    radii: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    *rule: Any,
) -> Step:
    """The arguments of `ftp_adam_step_` in the order of its schema."""
    return Step(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, anchors, radii, lr, lr_tensor, weight_decay,
        maximize, grad_scale, found_inf, Adam(beta1, beta2, eps, decoupled), Rule(*rule),
    )  # fmt: skip


def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor],
    radii: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    dampening: float,
    nesterov: bool,
    *rule: Any,
) -> Step:
    """The arguments of `ftp_sgd_step_` in the order of its schema."""
    return Step(
        params, grads, momentum_buffers, [], [], steps, anchors, radii, lr, lr_tensor, weight_decay, maximize,
        grad_scale, found_inf, SGD(momentum, dampening, nesterov), Rule(*rule),
    )  # fmt: skip


def is_absent(anchor: Tensor, param: Tensor) -> bool:
    """Whether this stands for a zero anchor: schemas have no list of tensors that is both optional and written."""
    return anchor.numel() == 0 and param.numel() > 0


def present(params: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> list[Tensor]:
    """Zero anchors as tensors without elements."""
    return [param.new_empty(0) if base is None else base for param, base in zip(params, anchors, strict=True)]


def written(s: Step) -> list[Tensor]:
    """All tensors that a step writes."""
    return [*s.params, *s.firsts, *s.seconds, *s.largests, *s.steps, *s.anchors, *s.radii]


def distinct(s: Step) -> None:
    """Raise `ValueError` if a tensor is written twice or a gradient is written: parameters may run side by side."""
    if not apart(written(s), s.grads):
        raise ValueError("params, moments, anchors, steps, radii and gradients: the same memory appears twice")


def apart(outputs: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> bool:
    """Whether no tensor is written twice, and none of the inputs is written."""
    addresses = list(map(Tensor.data_ptr, outputs))
    once = set(addresses)
    if len(once) == len(addresses) and once.isdisjoint(map(Tensor.data_ptr, inputs)):
        return True
    addresses = [t.data_ptr() for t in outputs if t.numel()]  # tensors without elements share the address 0
    once = set(addresses)
    return len(once) == len(addresses) and once.isdisjoint([t.data_ptr() for t in inputs if t.numel()])


def compute_dtype(s: Step, i: int) -> torch.dtype:
    """The type that a parameter's step is computed in: float32, or float64 where it or its moments are."""
    kinds = [s.params[i].dtype, *(values[i].dtype for values in (s.firsts, s.seconds) if values)]
    work = torch.float32
    for kind in kinds:
        work = torch.promote_types(work, kind)
    return work
