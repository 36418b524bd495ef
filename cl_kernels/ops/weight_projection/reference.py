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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import base
from cl_kernels.ops.weight_projection.arguments import (
    Rule,
    Step,
    adam_step,
    apart,
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
    "Decision",
    "Parts",
    "as_rows",
    "decided",
    "displacement_products",
    "ftp_adam_step_",
    "ftp_sgd_step_",
    "hit_rows",
    "measured",
    "project_to_anchor",
    "raised",
    "rescale_",
    "row_norms",
    "settled",
    "summed",
    "write",
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
    if not apart(params):
        raise ValueError("params: the same memory appears twice")
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
        weight, grad = raised(s, i)
        step = s.steps[i] + 1
        update, state = base_step(s, i, weight, grad, step)
        made += [*state, (s.steps[i], step)]
        if param.numel():
            made += _projected(s, i, weight, grad, update, step)
    write(made, s.found_inf)


def raised(s: Step, i: int) -> tuple[Tensor, Tensor]:
    """Weight and gradient in the type of the arithmetic, the gradient as the base step sees it."""
    work = compute_dtype(s, i)
    grad = s.grads[i].to(work)
    if s.grad_scale is not None:
        grad = grad / s.grad_scale.to(work)
    return s.params[i].to(work), -grad if s.maximize else grad


def write(made: list[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    """Each value to its target, unless an infinity was found."""
    if found_inf is not None:
        made = [(t, torch.where(found_inf.to(t.device).reshape(()) != 0, t, value)) for t, value in made]
    for target, value in made:
        target.copy_(value)


def _projected(
    s: Step, i: int, weight: Tensor, grad: Tensor, update: Tensor, step: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """New values of the weight, of the anchor's buffer and of the radius."""
    parts = measured(s, i, weight, grad, update)
    decision = decided(s, i, summed(s, i, parts), step)
    return settled(s, i, parts, decision, hit_rows(parts, decision).sum())


class Parts(NamedTuple):
    """One tensor between its base step and its radius: [R, M], and what its rows add up to, [R]."""

    norm: int
    weight: Tensor  # before the step
    moved: Tensor  # after the base step
    slot: Tensor  # the anchor's buffer
    anchor: Tensor
    c: Tensor
    products: Tensor  # <G_i, d_i>
    before: Tensor  # of d: sums of absolute values, or of squares
    after: Tensor  # of c, likewise
    pushed: Tensor  # how many elements of the gradient are not 0


class Decision(NamedTuple):
    """What the policy makes of the sums over all rows; numbers on the device."""

    wanted: Tensor
    record: Tensor  # the new record, but for what it says of the rows that were projected
    rows: Tensor
    collapsed: Tensor
    still: Tensor


def measured(s: Step, i: int, weight: Tensor, grad: Tensor, update: Tensor) -> Parts:
    """What of a step is known row by row; `update` is -u."""
    norm, param, buffer = s.rule.norm, s.params[i], s.anchors[i]
    floored = s.radii[i][FLOORED] != 0
    w, g, u = (as_rows(x, norm) for x in (weight, grad, update))
    slot = torch.zeros_like(w) if is_absent(buffer, param) else as_rows(buffer.to(w.dtype), norm)
    anchor = torch.where(floored, w, slot)
    d = torch.where(floored, slot, w - slot)
    moved = torch.where(u == 0, w, w + u)  # -0.0 + 0.0 would lose the sign
    c = moved - anchor
    before, after = (x.abs().sum(1) if norm == NORMS["row_l1"] else (x * x).sum(1) for x in (d, c))
    return Parts(norm, w, moved, slot, anchor, c, (g * d).sum(1), before, after, (g != 0).sum())


def _lengths(powers: Tensor, norm: int) -> Tensor:
    return (powers if norm == NORMS["row_l1"] else powers.sqrt()) + TINY


def summed(s: Step, i: int, parts: Parts) -> Tensor:
    """Float64 [6]: h, rows with a finite term, rows with a finite norm, rows, elements pushed, the largest norm.

    All but the last add up over processes that hold shards of whole rows; of the last they take the largest.
    """
    radius = s.radii[i]
    floored, gamma = radius[FLOORED] != 0, radius[GAMMA].to(parts.weight.dtype)
    nd = _lengths(parts.before, parts.norm)
    terms = parts.products / torch.where(floored, nd, torch.minimum(gamma, nd))
    if s.rule.masked:
        terms = torch.where(floored | (nd >= gamma * (1 - MASK_SLACK)), terms, 0.0)
    sound = torch.isfinite(terms)
    n = _lengths(parts.after, parts.norm)
    finite = torch.isfinite(n)
    top = torch.where(finite, n, -torch.inf)
    top = top.max() if top.numel() else n.new_full((), -torch.inf)
    h = torch.where(sound, terms, 0.0).double().sum()
    counts = (sound.sum(), finite.sum(), torch.full_like(parts.pushed, n.numel()), parts.pushed)
    return torch.stack([h, *(x.double() for x in counts), top.double()])


def decided(s: Step, i: int, sums: Tensor, step: Tensor) -> Decision:
    """The policy's answer to `summed` of all rows of a tensor."""
    rule, radius = s.rule, s.radii[i].double()
    h, heard, finite, rows, pushed, top = sums.unbind()
    h = h.clamp(-STEEPEST, STEEPEST)
    wanted, first, second, collapsed = _policy(rule, i, radius, h, heard > 0, step.double(), s.radii[i].dtype)
    if is_absent(s.anchors[i], s.params[i]):
        collapsed = torch.zeros_like(collapsed)
    clipped = torch.where(finite > 0, torch.minimum(wanted, top), wanted)
    clipped = clipped if rule.fixed_radius(i) is None else wanted
    largest = torch.where(finite > 0, top, radius[LARGEST])
    record = torch.stack([clipped, first, second, largest, collapsed.double(), h, torch.zeros_like(h), radius[FIRED]])
    lr = s.lr if s.lr_tensor is None else s.lr_tensor.to(radius.device).reshape(())
    still = (pushed == 0) & torch.as_tensor(lr == 0, device=radius.device)
    return Decision(wanted, record, rows, collapsed, still)


def hit_rows(parts: Parts, decision: Decision) -> Tensor:
    """Which rows are longer than the radius; those that are not finite are not scaled."""
    n = _lengths(parts.after, parts.norm)
    return torch.isfinite(n) & (n > decision.wanted)


def settled(s: Step, i: int, parts: Parts, decision: Decision, hits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """New values of the weight, the radius and the anchor's buffer; `hits`: how many of all rows are projected."""
    param, radius, collapsed, still = s.params[i], s.radii[i].double(), decision.collapsed, decision.still
    n = _lengths(parts.after, parts.norm)
    limit, hit = decision.wanted.to(n.dtype), hit_rows(parts, decision)
    new = torch.where(hit[:, None], parts.anchor + (limit / n)[:, None] * parts.c, parts.moved)
    new = torch.where(collapsed, parts.anchor, new)
    kept = torch.where(collapsed, torch.where(torch.isfinite(n)[:, None], parts.c, 0.0), parts.anchor)
    record = torch.cat([decision.record[:PROJECTED], torch.stack([hits / decision.rows, radius[FIRED] + (hits > 0)])])
    results = [
        (param, torch.where(still, parts.weight, new).reshape(param.shape)),
        (s.radii[i], torch.where(still, radius, record)),
    ]
    if not is_absent(s.anchors[i], param):
        results.append((s.anchors[i], torch.where(still, parts.slot, kept).reshape(param.shape)))
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
