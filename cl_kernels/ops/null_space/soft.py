"""The soft edge: a dense projector f(C / tau) whose threshold meets a rank rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_kernels.ops.null_space import notes
from cl_kernels.ops.null_space.curves import Products, Spectrum
from cl_kernels.ops.null_space.log_odds import Filter
from cl_kernels.ops.null_space.thresholds import Chosen, Curves, choose_tau
from cl_kernels.ops.rules import Energy, Rule

__all__ = ["soft_projector"]

NOTHING = 0.5  # a trace below this: not one direction is free


def soft_projector(
    cov: Tensor, rule: Rule, steps: int, mix: float, normalize: str | None, apply: Filter | None
) -> Tensor:
    """B = mix P / (|P|_F if normalize == "fro" else 1) + (1 - mix) I for a batch [L, d, d].

    `apply` is the filter to measure with; without one an eigen-decomposition answers everything.
    """
    curves: Curves = Spectrum(cov, steps) if apply is None else Products(cov, steps, apply)
    chosen = choose_tau(curves, rule, steps)
    alive = curves.trace > 0
    inside = alive & torch.isfinite(chosen.tau) & (chosen.tau > 0)
    plain = curves.projector(torch.where(inside, chosen.tau, 1.0))
    eye = torch.eye(curves.size, dtype=plain.dtype, device=plain.device)
    constant = torch.where((chosen.tau > 0) | ~alive, 1.0, 0.0).to(plain)[:, None, None] * eye
    plain = torch.where(inside[:, None, None], plain, constant)
    count = plain.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    frozen = count < NOTHING
    facts = _facts(curves, chosen, alive, frozen, count)
    if apply is not None and any(fact.indefinite for fact in facts):  # the search may have met thresholds that fail
        return soft_projector(cov, rule, steps, mix, normalize, None)
    _tell(rule, chosen, facts, mix)
    scale = plain.norm(dim=(1, 2)) if normalize == "fro" else torch.ones_like(plain[:, 0, 0])
    gain = torch.where(frozen, 0.0, mix / torch.where(frozen, 1.0, scale)).to(plain)
    return gain[:, None, None] * plain + (1 - mix) * eye


class _Fact(NamedTuple):
    """What is known of one matrix."""

    alive: bool
    indefinite: bool
    missed: bool
    frozen: bool
    reached: float


def _facts(curves: Curves, chosen: Chosen, alive: Tensor, frozen: Tensor, count: Tensor) -> list[_Fact]:
    """In one read from the device."""
    value = count if chosen.value is None else chosen.value
    table = torch.stack([alive, curves.indefinite, chosen.missed, frozen & alive, value]).T.tolist()
    return [_Fact(bool(a), bool(b), bool(c), bool(d), reached) for a, b, c, d, reached in table]


def _tell(rule: Rule, chosen: Chosen, facts: list[_Fact], mix: float) -> None:
    for at, fact in enumerate(facts):
        if not fact.alive:
            notes.zero()
        if fact.indefinite:
            notes.indefinite_somewhere(at)
        if fact.missed:
            notes.missed(rule, at, fact.reached, isinstance(rule, Energy), chosen.evaluations)
    if any(fact.frozen for fact in facts):
        notes.frozen(rule, mix)
