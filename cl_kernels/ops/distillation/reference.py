"""The formulas of the room in plain torch: losses of rows, and their gradients in closed form (no autograd in here).

    p_T = softmax(t / T),  p_S = softmax(s / T), over the columns of the class slice         (method-distillation 4, F3)
    KL  = T^2 sum p_T (log p_T - log p_S)                      dKL/ds  = T (p_S - p_T)
    CE  = -log softmax(z)_y                                    dCE/dz  = softmax(z) - onehot_y
    DKD = T^2 (a KL of (target, rest) + b KL of the rest), with r_S, r_T the softmax of the rest alone and
          d = p_S,y - p_T,y:   dDKD/ds_y = T a d               dDKD/ds_j = T (b (r_S - r_T) - a d r_S)_j
    JSD = T^2 (b KL(p_T || m) + (1 - b) KL(p_S || m)), m = b p_T + (1 - b) p_S, with u = (1 - b)(log p_S - log m):
          dJSD/ds_j = T p_S,j (u_j - <p_S, u>);                b = 0 is KL(p_T || p_S), b = 1 is KL(p_S || p_T)

A column of -inf has probability 0 and contributes nothing where the teacher has none. NaN, +inf, a row without a finite
column, and a target outside of the slice make the loss NaN; on the CPU that is then an error (`arguments.complain`).
A row of weight 0 contributes nothing whatever it holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_kernels.ops.distillation import arguments

__all__ = [
    "distillation_gradients",
    "distillation_loss",
    "dkd_gradient",
    "dkd_loss",
    "jsd_gradient",
    "jsd_loss",
    "kl_gradient",
    "kl_loss",
]


def distillation_loss(
    class_logits: Tensor,
    kd_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    temperature: float,
    reduction: int,
    class_grad: bool,
    kd_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) CE + alpha KL, and the gradients that are asked for (else empty tensors)."""
    z, s, t = _slices(first, last, class_logits, kd_logits, teacher_logits)
    rows = z.new_zeros(len(z))
    if alpha < 1:
        rows = rows + (1 - alpha) * _cross_entropy(z, target - first)
    if alpha > 0:
        rows = rows + alpha * _kl(s, t, temperature)
    loss = arguments.reduced(rows, weight, reduction)
    named = {"class_logits": class_logits if alpha < 1 else None, "kd_logits": kd_logits if alpha > 0 else None}
    named["teacher_logits"] = teacher_logits if alpha > 0 else None
    arguments.complain(loss, named, target if alpha < 1 else None, weight, first, last)
    grads = distillation_gradients(
        class_logits, kd_logits, teacher_logits, target, weight, first, last, alpha, temperature, reduction,
        class_grad, kd_grad,
    )  # fmt: skip
    return loss, *grads


def distillation_gradients(
    class_logits: Tensor,
    kd_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    temperature: float,
    reduction: int,
    class_grad: bool,
    kd_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of the row losses, as scaled by the reduction; differentiable in both student logits."""
    z, s, t = _slices(first, last, class_logits, kd_logits, teacher_logits)
    for_class, for_kd = class_logits.new_empty(0), kd_logits.new_empty(0)
    if class_grad:
        g = (1 - alpha) * _cross_entropy_gradient(z, target - first) if alpha < 1 else torch.zeros_like(z)
        for_class = _widened(arguments.scaled(g, weight, reduction), class_logits, first)
    if kd_grad:
        g = alpha * _kl_gradient(s, t, temperature) if alpha > 0 else torch.zeros_like(s)
        for_kd = _widened(arguments.scaled(g, weight, reduction), kd_logits, first)
    return for_class, for_kd


def kl_loss(
    student: Tensor, teacher: Tensor, first: int, last: int, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, ...]:
    s, t = _slices(first, last, student, teacher)
    loss = arguments.reduced(_kl(s, t, temperature), None, reduction)
    arguments.complain(loss, {"student": student, "teacher": teacher}, None, None, first, last)
    return loss, *kl_gradient(student, teacher, first, last, temperature, reduction, grad)


def kl_gradient(
    student: Tensor, teacher: Tensor, first: int, last: int, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, ...]:
    if not grad:
        return (student.new_empty(0),)
    s, t = _slices(first, last, student, teacher)
    return (_widened(arguments.scaled(_kl_gradient(s, t, temperature), None, reduction), student, first),)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    grad: bool,
) -> tuple[Tensor, ...]:
    """alpha times the KL of (target, rest) plus beta times the KL within the rest."""
    s, t = _slices(first, last, student, teacher)
    index, fits, hot = _chosen(s, target - first)
    rest_s, rest_t = (x.masked_fill(hot, -math.inf) for x in (s, t))
    odds_s, odds_t = (_log_odds(x, r, index, temperature) for x, r in ((s, rest_s), (t, rest_t)))
    two_way = torch.zeros_like(odds_s)
    for sign in (1, -1):
        of_t, of_s = (torch.nn.functional.logsigmoid(sign * odds) for odds in (odds_t, odds_s))
        two_way = two_way + _times(of_t.exp(), of_t - of_s)
    rows = alpha * temperature**2 * two_way + beta * _kl(rest_s, rest_t, temperature)
    loss = arguments.reduced(torch.where(fits, rows, math.nan), weight, reduction)
    arguments.complain(loss, {"student": student, "teacher": teacher}, target, weight, first, last, rest=True)
    return loss, *dkd_gradient(student, teacher, target, weight, first, last, alpha, beta, temperature, reduction, grad)


def dkd_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    last: int,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    grad: bool,
) -> tuple[Tensor, ...]:
    if not grad:
        return (student.new_empty(0),)
    s, t = _slices(first, last, student, teacher)
    index, fits, hot = _chosen(s, target - first)
    rest_s, rest_t = (x.masked_fill(hot, -math.inf) for x in (s, t))
    odds_s, odds_t = (_log_odds(x, r, index, temperature) for x, r in ((s, rest_s), (t, rest_t)))
    difference = (odds_s.sigmoid() - odds_t.sigmoid())[:, None]
    of_s, of_t = (torch.softmax(x / temperature, -1) for x in (rest_s, rest_t))
    g = temperature * (beta * (of_s - of_t) + alpha * difference * (hot.to(s.dtype) - of_s))
    g = torch.where(fits[:, None], g, math.nan)
    return (_widened(arguments.scaled(g, weight, reduction), student, first),)


def jsd_loss(
    student: Tensor, teacher: Tensor, first: int, last: int, beta: float, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, ...]:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S."""
    s, t = _slices(first, last, student, teacher)
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    mixed = _log_mixture(log_s, log_t, beta)
    rows = log_s.new_zeros(len(s))
    if beta > 0:  # at 1 the mixture is the teacher itself: this part vanishes and the other is the reverse KL
        rows = rows + beta * _times(log_t.exp(), log_t - mixed).sum(-1)
    if beta < 1:
        rows = rows + (1 - beta) * _times(log_s.exp(), log_s - mixed).sum(-1)
    if beta == 0:
        rows = _times(log_t.exp(), log_t - log_s).sum(-1)
    if beta == 1:
        rows = _times(log_s.exp(), log_s - log_t).sum(-1)
    loss = arguments.reduced(temperature**2 * rows, None, reduction)
    arguments.complain(loss, {"student": student, "teacher": teacher}, None, None, first, last)
    return loss, *jsd_gradient(student, teacher, first, last, beta, temperature, reduction, grad)


def jsd_gradient(
    student: Tensor, teacher: Tensor, first: int, last: int, beta: float, temperature: float, reduction: int, grad: bool
) -> tuple[Tensor, ...]:
    if not grad:
        return (student.new_empty(0),)
    if beta == 0:
        return kl_gradient(student, teacher, first, last, temperature, reduction, grad)
    s, t = _slices(first, last, student, teacher)
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    p = log_s.exp()
    mixed = _log_mixture(log_s, log_t, beta)
    part = _times(p, (log_s - mixed) * (1.0 if beta == 1 else 1 - beta))
    g = temperature * (part - p * part.sum(-1, keepdim=True))
    return (_widened(arguments.scaled(g, None, reduction), student, first),)


def _slices(first: int, last: int, *logits: Tensor) -> list[Tensor]:
    """The columns of the slice in the dtype that is computed in: float64 where any is, else float32."""
    work = arguments.work_dtype(*logits)
    return [x[:, first : None if last < 0 else last].to(work) for x in logits]


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """probability * value, 0 where the probability is 0 whatever the value is; NaN stays."""
    return torch.where(probability == 0, 0.0, probability * torch.where(probability == 0, 0.0, value))


def _kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    return temperature**2 * _times(log_t.exp(), log_t - log_s).sum(-1)


def _kl_gradient(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    return temperature * (torch.softmax(s / temperature, -1) - torch.softmax(t / temperature, -1))


def _cross_entropy(z: Tensor, index: Tensor) -> Tensor:
    safe, fits, _ = _chosen(z, index)
    return torch.where(fits, -torch.log_softmax(z, -1).gather(1, safe[:, None])[:, 0], math.nan)


def _cross_entropy_gradient(z: Tensor, index: Tensor) -> Tensor:
    _, fits, hot = _chosen(z, index)
    return torch.where(fits[:, None], torch.softmax(z, -1) - hot.to(z.dtype), math.nan)


def _chosen(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets moved into the slice, which of them lay there, and the mask of their columns."""
    fits = (index >= 0) & (index < x.shape[1])
    safe = torch.where(fits, index, 0)
    return safe, fits, torch.arange(x.shape[1], device=x.device) == safe[:, None]


def _log_odds(x: Tensor, rest: Tensor, index: Tensor, temperature: float) -> Tensor:
    """log p_y / (1 - p_y) of the softmax of x / T."""
    return x.gather(1, index[:, None])[:, 0] / temperature - torch.logsumexp(rest / temperature, -1)


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return log_t if beta else log_s
    return torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))


def _widened(gradient: Tensor, like: Tensor, first: int) -> Tensor:
    """The gradient of the slice among exact zeros, in the logits' own shape and dtype."""
    after = like.shape[1] - first - gradient.shape[1]
    return torch.nn.functional.pad(gradient.to(like.dtype), (first, after)).contiguous()
