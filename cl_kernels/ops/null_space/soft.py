"""The soft edge: a dense projector f(C / tau) whose threshold meets a rank rule."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels.ops.null_space import notes
from cl_kernels.ops.null_space.thresholds import Chosen, Curves, choose_tau
from cl_kernels.ops.rules import Energy, Rule

__all__ = ["soft_projector"]

NOTHING = 0.5  # a trace below this: not one direction is free


def soft_projector(curves: Curves, rule: Rule, steps: int, mix: float, normalize: str | None) -> Tensor:
    """B = mix P / (|P|_F if normalize == "fro" else 1) + (1 - mix) I for a batch, [L, d, d]."""
    chosen = choose_tau(curves, rule, steps)
    alive = curves.trace > 0
    inside = alive & torch.isfinite(chosen.tau) & (chosen.tau > 0)
    plain = curves.projector(torch.where(inside, chosen.tau, 1.0))
    eye = torch.eye(curves.size, dtype=plain.dtype, device=plain.device)
    constant = torch.where((chosen.tau > 0) | ~alive, 1.0, 0.0).to(plain)[:, None, None] * eye
    plain = torch.where(inside[:, None, None], plain, constant)
    count = plain.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    frozen = count < NOTHING
    _tell(curves, rule, chosen, alive, frozen, count, mix)
    scale = plain.norm(dim=(1, 2)) if normalize == "fro" else torch.ones_like(plain[:, 0, 0])
    gain = torch.where(frozen, 0.0, mix / torch.where(frozen, 1.0, scale)).to(plain)
    return gain[:, None, None] * plain + (1 - mix) * eye


def _tell(curves: Curves, rule: Rule, chosen: Chosen, alive: Tensor, frozen: Tensor, count: Tensor, mix: float) -> None:
    """All warnings, after one read from the device."""
    value = count if chosen.value is None else chosen.value
    facts = torch.stack([alive, curves.indefinite, chosen.missed, frozen & alive, value]).T.tolist()
    for at, (is_alive, is_indefinite, is_missed, _, reached) in enumerate(facts):
        if not is_alive:
            notes.zero()
        if is_indefinite:
            notes.indefinite_somewhere(at)
        if is_missed:
            notes.missed(rule, at, reached, isinstance(rule, Energy), chosen.evaluations)
    if any(fact[3] for fact in facts):
        notes.frozen(rule, mix)
