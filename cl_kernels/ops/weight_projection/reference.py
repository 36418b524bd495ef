"""The formulas of the room in plain torch: short, slow on purpose, right in float64.

    c = (W - u) - W_0,   n_i = ||c_i|| + 1e-8,   W <- W_0 + min(gamma / n_i, 1) c_i       (rows i, method page 3)
    h = sum_i <G_i, d_i> / r_i,   d = W - W_0 before the step,   r_i = min(gamma, ||d_i|| + 1e-8)      (9.1)

Rows are computed in float32 (float64 where the parameter is), sums over rows in float64. Nothing is read on the host,
so the reference may be captured and compiled like the kernels.

**The floor.** A radius at its floor of 1e-8 puts W on W_0, and d would be rounding noise. Then W is W_0 exactly, the
anchor's buffer holds c for the next step's h, and FLOORED says so; that step first puts the anchor back. A floor
above 1e-8 is a radius like any other, and a zero anchor needs no exchange because W itself is d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import base
from cl_kernels.ops.weight_projection.arguments import (
    Rule,
    Step,
    adam_step,
    compute_dtype,
    distinct,
    is_absent,
    sgd_step,
)

__all__ = [
    "DOT",
    "FIRED",
    "FIRST",
    "FLOORED",
    "GAMMA",
    "GRADIENT",
    "GRADIENT_SQUARES",
    "L1",
    "LARGEST",
    "LARGEST_ROW",
    "NORMS",
    "PROJECTED",
    "SECOND",
    "SQUARES",
    "TINY",
    "as_rows",
    "displacement_products",
    "ftp_adam_step_",
    "ftp_sgd_step_",
    "project_to_anchor",
    "rescale_",
    "row_norms",
]

# One parameter's radius state, [8]; all zero means fresh. GAMMA is after its clip; FIRST and SECOND are its moments;
# LARGEST the last largest row norm; FLOORED 1 while the anchor's buffer holds c; GRADIENT the last h, before kappa;
# PROJECTED the share of rows projected in the last step; FIRED the number of steps in which any row was.
GAMMA, FIRST, SECOND, LARGEST, FLOORED, GRADIENT, PROJECTED, FIRED = range(8)
DOT, L1, SQUARES, LARGEST_ROW, GRADIENT_SQUARES = range(5)  # columns of `displacement_products`
NORMS = {"row_l1": 0, "row_l2": 1, "l2": 2}
_L2 = 2

TINY = 1e-8  # added to every row norm, and the official floor of the radius
BETA1, BETA2 = 0.9, 0.999  # of the radius's own Adam
# A row that was projected has ||d|| + 1e-8 >= gamma up to rounding of W, about 1e-5 gamma at gamma = 0.01.
MASK_SLACK = 1e-4
STEEPEST = 1e19  # |h| is cut here, so that its square stays a float32: a huge gradient must not end the radius's life


def as_rows(value: Tensor, norm: int) -> Tensor:
    """[R, M]: the first dimension's entries are the rows; a vector, a scalar and `l2` are one row."""
    if norm == _L2 or value.ndim < 2:
        return value.reshape(1, -1)
    return value.reshape(value.shape[0], value[:1].numel() if value.shape[0] else 0)


def row_norms(rows: Tensor, norm: int) -> Tensor:
    """The norm of each row, [R]."""
    return rows.abs().sum(1) if norm == NORMS["row_l1"] else (rows * rows).sum(1).sqrt()


def project_to_anchor(weight: Tensor, anchor: Tensor | None, radius: Tensor, norm: int) -> Tensor:
    """W_0 + min(radius / (||c_i|| + 1e-8), 1) c_i; rows within the radius are returned bit for bit."""
    work = torch.promote_types(weight.dtype, torch.float32)
    w = as_rows(weight, norm).to(work)
    a = torch.zeros_like(w) if anchor is None else as_rows(anchor, norm).to(work)
    c = w - a
    n = row_norms(c, norm) + TINY
    gamma = radius.to(work).expand(n.shape)
    out = torch.where((gamma < n)[:, None], a + (gamma / n)[:, None] * c, w)
    return out.reshape(weight.shape).to(weight.dtype).clone(memory_format=torch.contiguous_format)


def displacement_products(grads: list[Tensor], params: list[Tensor], anchors: list[Tensor]) -> Tensor:
    """One row for each parameter: <G,d>, |d|_1, |d|_2^2, the largest row's |d|_1, |G|_2^2."""
    out = []
    for i, param in enumerate(params):
        work = torch.promote_types(param.dtype, torch.float32)
        d = as_rows(param, 0).to(work)
        if not is_absent(anchors[i], param):
            d = d - as_rows(anchors[i], 0).to(work)
        g = as_rows(grads[i], 0).to(work) if grads else torch.zeros_like(d)
        norms = row_norms(d, 0).double()
        largest = norms.amax() if norms.numel() else norms.new_zeros(())
        sums = [x.sum(1).double().sum() for x in (g * d, d * d, g * g)]
        out.append(torch.stack([sums[0], norms.sum(), sums[1], largest, sums[2]]))
    return torch.stack(out) if out else torch.empty(0, 5, dtype=torch.float64)


def rescale_(params: list[Tensor], anchors: list[Tensor], scales: list[Tensor], norm: int) -> None:
    """W <- W_0 + s_i (W - W_0); rows whose s is 1 stay bit for bit."""
    made: list[tuple[Tensor, Tensor]] = []
    for i, param in enumerate(params):
        work = torch.promote_types(param.dtype, torch.float32)
        w = as_rows(param, norm).to(work)
        a = torch.zeros_like(w) if is_absent(anchors[i], param) else as_rows(anchors[i], norm).to(work)
        s = scales[i].to(work).expand(w.shape[0])[:, None]
        scaled = torch.where(s == 0, a, a + s * (w - a))
        made.append((param, torch.where(s == 1, w, scaled).reshape(param.shape)))
    for target, value in made:
        target.copy_(value)


def ftp_adam_step_(*arguments: Any) -> None:
    """The whole step; see the public function."""
    _step(adam_step(*arguments), base.adam)


def ftp_sgd_step_(*arguments: Any) -> None:
    """The whole step; see the public function."""
    _step(sgd_step(*arguments), base.sgd)


_Base = Callable[[Step, int, Tensor, Tensor, Tensor], tuple[Tensor, list[tuple[Tensor, Tensor]]]]


def _step(s: Step, base_step: _Base) -> None:
    """All new values are made before the first is written."""
    distinct(s)
    made: list[tuple[Tensor, Tensor]] = []
    for i, param in enumerate(s.params):
        work = compute_dtype(s, i)
        weight, grad = param.to(work), s.grads[i].to(work)
        if s.grad_scale is not None:
            grad = grad / s.grad_scale.to(work)
        if s.maximize:
            grad = -grad
        step = s.steps[i] + 1
        update, state = base_step(s, i, weight, grad, step)
        new = [*state, (s.steps[i], step)]
        if param.numel():
            new += _projected(s, i, weight, grad, update, step)
        for target, value in new:
            skip = s.found_inf
            kept = value if skip is None else torch.where(skip.to(value.device).reshape(()) != 0, target, value)
            made.append((target, kept))
    for target, value in made:
        target.copy_(value)


def _projected(
    s: Step, i: int, weight: Tensor, grad: Tensor, update: Tensor, step: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """New values of the weight, of the anchor's buffer and of the radius."""
    rule, norm, param, buffer = s.rule, s.rule.norm, s.params[i], s.anchors[i]
    absent = is_absent(buffer, param)
    radius = s.radii[i].double()
    floored = radius[FLOORED] != 0
    w, g, u = (as_rows(x, norm) for x in (weight, grad, update))
    slot = torch.zeros_like(w) if absent else as_rows(buffer.to(w.dtype), norm)
    anchor = torch.where(floored, w, slot)
    d = torch.where(floored, slot, w - slot)

    gamma = radius[GAMMA].to(w.dtype)
    nd = row_norms(d, norm) + TINY
    terms = (g * d).sum(1) / torch.where(floored, nd, torch.minimum(gamma, nd))
    if rule.masked:
        terms = torch.where(floored | (nd >= gamma * (1 - MASK_SLACK)), terms, 0.0)
    sound = torch.isfinite(terms)
    h = torch.where(sound, terms, 0.0).double().sum().clamp(-STEEPEST, STEEPEST)
    wanted, first, second, collapsed = _policy(rule, i, radius, h, sound.any(), step.double(), s.radii[i].dtype)
    if absent:
        collapsed = torch.zeros_like(collapsed)

    moved = torch.where(u == 0, w, w + u)  # -0.0 + 0.0 would lose the sign
    c = moved - anchor
    n = row_norms(c, norm) + TINY
    finite = torch.isfinite(n)
    hit = finite & (n > wanted)
    limit = wanted.to(w.dtype)
    new = torch.where(hit[:, None], anchor + (limit / n)[:, None] * c, moved)
    new = torch.where(collapsed, anchor, new)
    kept = torch.where(collapsed, torch.where(finite[:, None], c, 0.0), anchor)

    largest = torch.where(finite, n, -torch.inf).max().double()
    clipped = torch.where(finite.any(), torch.minimum(wanted, largest), wanted)
    clipped = clipped if rule.fixed_radius(i) is None else wanted
    largest = torch.where(finite.any(), largest, radius[LARGEST])
    share = hit.double().mean()
    state = [clipped, first, second, largest, collapsed, h, share, radius[FIRED] + hit.any()]
    lr = s.lr if s.lr_tensor is None else s.lr_tensor.to(w.device).reshape(())
    still = (g == 0).all() & torch.as_tensor(lr == 0, device=w.device)
    results = [
        (param, torch.where(still, w, new).reshape(param.shape)),
        (s.radii[i], torch.where(still, radius, torch.stack([x.double() for x in state]))),
    ]
    if not absent:
        results.append((buffer, torch.where(still, slot, kept).reshape(param.shape)))
    return results


def _policy(
    rule: Rule, i: int, radius: Tensor, h: Tensor, heard: Tensor, t: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The radius to project with, its moments, and whether the tensor falls onto its anchor.

    The upper clip to the largest row norm comes after the projection, which it cannot change: where the radius is
    above all norms, no row is scaled (9.2). `heard`: some row's term was finite; else radius and moments are kept.
    """
    fixed = rule.fixed_radius(i)
    if fixed is not None:
        gamma = torch.full_like(h, fixed).to(dtype).double()
        return gamma, radius[FIRST], radius[SECOND], torch.zeros_like(heard)
    fresh = radius[GAMMA] == 0
    slope = torch.where(h > 0, rule.kappa * h, h)
    first = BETA1 * radius[FIRST] + (1 - BETA1) * slope
    second = BETA2 * radius[SECOND] + (1 - BETA2) * slope * slope
    direction = first / (1 - BETA1**t) / ((second / (1 - BETA2**t)).sqrt() + TINY)
    floor = torch.full_like(h, rule.floor).to(dtype).double()
    moved = torch.maximum((radius[GAMMA] - rule.radius_lr(i) * direction).to(dtype).double(), floor)
    gamma = torch.where(fresh, floor, torch.where(heard, moved, radius[GAMMA]))
    learned = heard & ~fresh
    first = torch.where(learned, first, torch.where(fresh, 0.0, radius[FIRST]))
    second = torch.where(learned, second, torch.where(fresh, 0.0, radius[SECOND]))
    return gamma, first, second, (gamma <= floor) & (rule.floor <= TINY)
