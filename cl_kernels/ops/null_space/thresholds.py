"""From a rank rule to the threshold tau of a soft projector, for all matrices of a batch together.

`Rank` and `Energy` are met by their own measure: the trace of P, or the energy <P, C> that P lets through, grows with
log(tau), and its slope comes free of charge, so a bracketed Newton search needs 3 to 8 projectors from nowhere. The two
ratio rules need one end of the spectrum, `Threshold` nothing, and any other rule (the knees) all eigenvalues.
Source: performance.md 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from cl_kernels.ops.null_space.spectral import GUARD, QUINTICS
from cl_kernels.ops.rules import Energy, Rank, RatioToLargest, RatioToSmallest, Rule, Threshold

__all__ = ["Chosen", "Curves", "choose_tau", "floor_of", "steepness"]

EVALUATIONS: Final = 10
LONGEST_STEP: Final = 3.0  # in log(tau): farther away a slope says nothing
DIRECTIONS: Final = 0.5  # to which the trace is met; within 2 % of the smaller side where that is less
ENERGY: Final = 0.02  # of the energy to let through


class Curves(Protocol):
    """What a search asks of a batch of matrices; shapes are [L], everything in float64."""

    size: int
    dtype: torch.dtype
    trace: Tensor
    indefinite: Tensor  # known once `projector` has run

    def count(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """trace P, and trace P - |P|_F^2: how many directions lie within the edge."""

    def energy(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """<P, C> / trace C, and <P - P^2, C> / trace C."""

    def largest(self) -> Tensor:
        """The largest eigenvalue."""

    def smallest(self) -> Tensor:
        """The smallest eigenvalue, at least 0."""

    def spectrum(self) -> Tensor:
        """All eigenvalues [L, d], descending, at least 0."""

    def projector(self, tau: Tensor) -> Tensor:
        """P [L, d, d] of finite thresholds > 0; verified, and of the float dtype that it was computed in."""


class Chosen(NamedTuple):
    """tau [L], infinite where everything stays free and 0 where nothing does; where a search failed, and its count."""

    tau: Tensor
    missed: Tensor
    evaluations: int = 0
    value: Tensor | None = None


def choose_tau(curves: Curves, rule: Rule, steps: int, start: Tensor | None = None) -> Chosen:
    """The threshold of every matrix. `start`: thresholds to begin a search at, such as those of the last task."""
    alive = curves.trace > 0
    if isinstance(rule, Rank):
        side = min(rule.count, curves.size - rule.count)
        if side <= 0:
            return _constant(curves, 0.0 if rule.count else math.inf)
        allowed = min(DIRECTIONS, max(0.02 * side, 0.05))
        return _search(curves, curves.count, float(curves.size - rule.count), allowed, steps, start)
    if isinstance(rule, Energy):
        if rule.keep <= 0:
            return _constant(curves, math.inf)
        return _search(curves, curves.energy, 1 - rule.keep, ENERGY * (1 - rule.keep), steps, start)
    if isinstance(rule, Threshold):
        tau = torch.full_like(curves.trace, rule.tau)
    elif isinstance(rule, RatioToLargest):
        tau = rule.ratio * curves.largest()
    elif isinstance(rule, RatioToSmallest):
        rounding = max(rule.floor, torch.finfo(curves.dtype).eps * curves.size)
        tau = rule.ratio * torch.maximum(curves.smallest(), rounding * curves.largest())
    else:
        return Chosen(_between(curves, rule), torch.zeros_like(alive))
    tau = torch.where(tau > 0, tau, floor_of(curves.dtype) * curves.trace)
    return Chosen(torch.where(alive, tau, 1.0), torch.zeros_like(alive))


def floor_of(dtype: torch.dtype) -> float:
    """The smallest tau that a search tries, as a share of the trace: ten times the rounding errors of C."""
    return max(1e-9, 10 * torch.finfo(dtype).eps)


def steepness(steps: int) -> float:
    """m with df/dlog(tau) = m f (1 - f) at lambda = tau; 13.4 for three steps."""
    return (1 - GUARD) * math.prod(row[0] for row in QUINTICS[steps])


def _constant(curves: Curves, tau: float) -> Chosen:
    missed = torch.zeros_like(curves.trace, dtype=torch.bool)
    return Chosen(torch.full_like(curves.trace, tau), missed)


def _search(
    curves: Curves,
    measure: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: float,
    allowed: float,
    steps: int,
    start: Tensor | None,
) -> Chosen:
    """A bracketed Newton search in log(tau). In eager mode it reads once an evaluation whether all are done."""
    done = ~(curves.trace > 0)
    scale = torch.where(done, 1.0, curves.trace)
    low = torch.log(floor_of(curves.dtype) * scale)
    high = torch.log(4 * scale)
    x = (low + high) / 2 if start is None else torch.log(start.to(scale)).clamp(low, high)
    value, count = torch.zeros_like(x), 0
    while True:
        value, inside = measure(torch.where(curves.trace > 0, x.exp(), 1.0))
        count += 1
        done = done | ((value - target).abs() <= allowed)
        if count == EVALUATIONS or bool(done.all()):
            break
        above = value > target
        high, low = torch.where(above, x, high), torch.where(above, low, x)
        new = x + (target - value) / (steepness(steps) * inside)
        fits = (low < new) & (new < high) & ((new - x).abs() <= LONGEST_STEP)  # NaN does not
        x = torch.where(done, x, torch.where(fits, new, (low + high) / 2))
    return Chosen(torch.where(curves.trace > 0, x.exp(), 1.0), ~done, count, value)


def _between(curves: Curves, rule: Rule) -> Tensor:
    """Half-way in log(lambda) between the last protected eigenvalue and the first free one."""
    rows = []
    floor = floor_of(curves.dtype)
    spectra = curves.spectrum()
    for values in spectra.cpu():
        total = float(values.sum())
        count = rule.protected(values.to(curves.dtype)) if total > 0 else 0
        if not 0 <= count <= len(values):
            raise ValueError(f"rule: {rule} protects {count} of {len(values)} directions")
        if count in (0, len(values)):
            rows.append(0.0 if count and total > 0 else math.inf)
            continue
        last, first = float(values[count - 1]), float(values[count])
        rows.append(max(math.sqrt(last) * math.sqrt(first) or last / 100, floor * total))
    return spectra.new_tensor(rows)
