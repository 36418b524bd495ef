"""What the implementations of `projected_adam_step_` are called with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Step", "distinct"]


class Step(NamedTuple):
    """The arguments of the operation in the order of its schema; what they mean stands at the public function.

    Two `forms` and four `scales` (identity and span, left and right) belong to each parameter. Scales that live on a
    device come as `device_scales` [n, 4], and `scales` is empty then; so does a learning rate, as `lr_tensor`.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    left: list[Tensor | None]
    right: list[Tensor | None]
    forms: list[int]
    scales: list[float]
    device_scales: Tensor | None
    lr: float
    lr_tensor: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    project_decay: bool
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None


def distinct(s: Step) -> None:
    """Raise `ValueError` if a tensor is written twice or a gradient is written: parameters may run side by side."""
    written = [*s.params, *s.exp_avgs, *s.exp_avg_sqs, *s.max_exp_avg_sqs, *s.steps]
    addresses = list(map(Tensor.data_ptr, written))
    once = set(addresses)
    if len(once) == len(addresses) and once.isdisjoint(map(Tensor.data_ptr, s.grads)):
        return
    outputs = [t.data_ptr() for t in written if t.numel()]  # tensors without elements share the address 0
    once = set(outputs)
    if len(once) != len(outputs) or not once.isdisjoint([t.data_ptr() for t in s.grads if t.numel()]):
        raise ValueError("params, moments, steps and gradients: the same memory appears twice")
