"""The steps of fast trainable projection (FTP): a base step, a learned radius, rows scaled back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._registry import define
from cl_kernels.ops.weight_projection import checks, cuda, native, reference
from cl_kernels.ops.weight_projection.arguments import present

__all__ = ["ftp_adam_", "ftp_adam_step_", "ftp_sgd_", "ftp_sgd_step_", "rule_of"]

_RULE = "float kappa, float[] radius_lrs, bool masked, float radius_floor, float[] fixed_radii, int norm"
_LISTS = "Tensor(e!)[] steps, Tensor(f!)[] anchors, Tensor(g!)[] radii"
_RATES = "float lr, Tensor? lr_tensor, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf"

_adam = define(
    "ftp_adam_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    f" Tensor(d!)[] max_exp_avg_sqs, {_LISTS}, {_RATES}, float beta1, float beta2, float eps,"
    f" bool decoupled_weight_decay, {_RULE}) -> ()",
    reference=reference.ftp_adam_step_,
    fake=lambda *_: None,
    native_cpu=native.ftp_adam_cpu,
    native_cuda=cuda.ftp_adam_cuda,
)
_sgd = define(
    "ftp_sgd_step_",
    f"(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, {_LISTS}, {_RATES},"
    f" float momentum, float dampening, bool nesterov, {_RULE}) -> ()",
    reference=reference.ftp_sgd_step_,
    fake=lambda *_: None,
    native_cpu=native.ftp_sgd_cpu,
    native_cuda=cuda.ftp_sgd_cuda,
)


def ftp_adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    radii: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    kappa: float = 1.0,
    radius_lr: float | Sequence[float] = 1e-2,
    masked: bool = False,
    radius_floor: float = 1e-8,
    fixed_radius: float | Sequence[float] | None = None,
    norm: str = "row_l1",
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    decoupled_weight_decay: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One FTP step of many parameters on AdamW: rows of W - W_0 longer than a learned radius are scaled back to it.

    W <- W_0 + min(gamma / n_i, 1) c_i with c = (W - u) - W_0, u the complete AdamW update, n_i = ||c_i|| + 1e-8; gamma
    moves by its own Adam along h = sum_i <G_i, d_i> / min(gamma, ||d_i|| + 1e-8), d = W - W_0 before the step. Rows are
    the entries of the first dimension; a vector is one row. Writes params, moments, steps (0-d, counted up), radii, and
    anchors (in a step that ends at the floor of the radius the buffer holds c; FLOORED says so).

    Lists have one entry for each parameter. `anchors[i]`: the parameter's shape; its dtype, or bfloat16 or float16
    where those hold it exactly; None is zero. `radii[i]`: [8], float32 (or float64), all zero at the start; entries are
    named GAMMA ... FIRED. `kappa` in [0, 1] multiplies positive h; `radius_lr` is gamma's step (one, or one each);
    `masked` leaves rows inside the ball out of h; `fixed_radius` (one, or one each) ends the learning: MARS-PGM,
    and the base step where it is infinite. `norm`: "row_l1", "row_l2", or "l2" for the whole tensor. `grad_scale`
    divides the gradients; where `found_inf` is not 0 nothing is written. Both are read on the device.

    Rows whose term of h or norm is NaN or infinite are left out of the radius and not scaled; at the floor they return
    to the anchor. A tensor whose gradient is all 0 while lr is 0 keeps its weights and radius bit for bit.

    16-bit parameters are computed in float32. Raises `ValueError` for numbers, shapes, dtypes and overlapping outputs,
    `TypeError`, and `RuntimeError` for devices, before the first write. Cost: 32 + 12 f bytes a parameter, f the share
    in projected rows, against AdamW's 28. Source: FTP, Tian et al. 2023; Gouk et al. 2021 (fixed radius).
    """
    largest = None if max_exp_avg_sqs is None else list(max_exp_avg_sqs)
    checks.lengths(
        len(params), grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps, anchors=anchors, radii=radii,
        max_exp_avg_sqs=largest,
    )  # fmt: skip
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        _checks.number(name, value, 0.0, 1.0, closed=False)
    _checks.number("eps", eps, 0.0)
    rule = rule_of(len(params), kappa, radius_lr, masked, radius_floor, fixed_radius, norm)
    _rates(lr, weight_decay, grad_scale, found_inf)
    for i, param in enumerate(params):
        state = [exp_avgs[i], exp_avg_sqs[i], *([] if largest is None else [largest[i]])]
        checks.entry(i, param, grads[i], state, steps[i], anchors[i], radii[i])
    ftp_adam_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), largest or [], list(steps), list(anchors),
        list(radii), lr, weight_decay, maximize, grad_scale, found_inf,
        (beta1, beta2, eps, decoupled_weight_decay), rule,
    )  # fmt: skip


def ftp_sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    radii: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    kappa: float = 1.0,
    radius_lr: float | Sequence[float] = 1e-2,
    masked: bool = False,
    radius_floor: float = 1e-8,
    fixed_radius: float | Sequence[float] | None = None,
    norm: str = "row_l1",
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One FTP step of many parameters on SGD; everything but the base step is as in `ftp_adam_step_`.

    `momentum_buffers` is None where momentum is 0; else a buffer for each parameter, which its first step (by `steps`)
    fills with the gradient. Weight decay is added to the gradient. Cost: 24 + 12 f bytes a parameter with momentum,
    against SGD's 20.
    """
    if momentum_buffers is None and momentum != 0:
        raise ValueError(f"momentum_buffers: expected {len(params)} buffers where momentum is {momentum}, got None")
    checks.lengths(
        len(params), grads=grads, momentum_buffers=momentum_buffers, steps=steps, anchors=anchors, radii=radii
    )
    _checks.number("momentum", momentum, 0.0)
    _checks.number("dampening", dampening)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov: expected a momentum and no dampening, got momentum {momentum} and dampening {dampening}"
        )
    rule = rule_of(len(params), kappa, radius_lr, masked, radius_floor, fixed_radius, norm)
    _rates(lr, weight_decay, grad_scale, found_inf)
    buffers = [] if momentum_buffers is None or momentum == 0 else list(momentum_buffers)
    for i, param in enumerate(params):
        checks.entry(i, param, grads[i], buffers[i : i + 1], steps[i], anchors[i], radii[i])
    ftp_sgd_(
        list(params), list(grads), buffers, list(steps), list(anchors), list(radii), lr, weight_decay, maximize,
        grad_scale, found_inf, (momentum, dampening, nesterov), rule,
    )  # fmt: skip


def ftp_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor | None],
    radii: list[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    base: tuple[float, float, float, bool],
    rule: tuple[Any, ...],
) -> None:
    """`ftp_adam_step_` for a caller that has checked; `base`: beta1, beta2, eps, decoupled; `rule`: of `rule_of`."""
    if not params:
        return
    held = present(params, anchors)
    with torch.no_grad():
        _adam(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, held, radii, *_lr(lr), weight_decay, maximize,
            grad_scale, found_inf, *base, *rule,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps, *held, *radii])


def ftp_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor | None],
    radii: list[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    base: tuple[float, float, bool],
    rule: tuple[Any, ...],
) -> None:
    """`ftp_sgd_step_` for a caller that has checked; `base`: momentum, dampening, nesterov; `rule`: of `rule_of`."""
    if not params:
        return
    held = present(params, anchors)
    with torch.no_grad():
        _sgd(
            params, grads, momentum_buffers, steps, held, radii, *_lr(lr), weight_decay, maximize, grad_scale,
            found_inf, *base, *rule,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momentum_buffers, *steps, *held, *radii])


def rule_of(
    count: int,
    kappa: float,
    radius_lr: float | Sequence[float],
    masked: bool,
    radius_floor: float,
    fixed_radius: float | Sequence[float] | None,
    norm: str,
) -> tuple[Any, ...]:
    """The checked numbers of the radius, as `ftp_adam_` and `ftp_sgd_` take them; count is that of the parameters."""
    checks.rule_numbers(kappa, radius_floor)
    speeds = checks.per_parameter("radius_lr", radius_lr, count, 0.0)
    fixed = checks.per_parameter("fixed_radius", fixed_radius, count, 0.0)
    return kappa, speeds, masked, radius_floor, fixed, checks.norm_code(norm)


def _rates(lr: float | Tensor, weight_decay: float, grad_scale: Any, found_inf: Any) -> None:
    if not isinstance(lr, Tensor):
        _checks.number("lr", lr, 0.0)
    _checks.number("weight_decay", weight_decay, 0.0)
    checks.one_number(lr=lr, grad_scale=grad_scale, found_inf=found_inf)


def _lr(lr: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
