"""Keeping the down-projections of different tasks orthogonal: by a penalty, by a QR parametrisation, or afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_kernels import ops
from cl_kernels.nn._adapters import Adapters

__all__ = ["Enforcement", "Orthogonality"]

Enforcement = Literal["penalty", "qr", "absorb"]


class _Group(NamedTuple):
    """Positions of one shape, so that one batched operation serves them all."""

    names: list[str]
    old: Tensor  # [positions, in, K], the history side by side
    past: Tensor | None  # [positions], ||old^T old - I||_F^2, which does not change during a task


class Orthogonality:
    """What `LoRAStack` does about A^T A, for all positions of one shape at a time."""

    def __init__(self, enforcement: Enforcement | None, penalty: Literal["stack", "cross"] | None) -> None:
        if enforcement not in (None, "penalty", "qr", "absorb"):
            raise ValueError(f"orthogonality: expected 'penalty', 'qr', 'absorb' or None, got {enforcement!r}")
        self.enforcement = enforcement
        self.kind = penalty
        self._groups: list[_Group] | None = None  # made when first needed in a task

    def check(self, named: Mapping[str, Adapters], rank: int) -> None:
        """Whether the histories leave room for `rank` more columns: a warning, or `ValueError` where "qr" needs it."""
        for name, adapters in named.items():
            size, columns = adapters.past_a.shape
            if self.enforcement in ("qr", "penalty") and columns + rank > size:
                text = (
                    f"{name}: {columns} earlier columns and {rank} new ones cannot be orthogonal in {size} dimensions; "
                    "use a smaller rank or fewer tasks"
                )
                if self.enforcement == "qr":
                    raise ValueError(f"rank: {text}")
                warnings.warn(text, stacklevel=4)
                return

    def forget(self) -> None:
        """The positions or their histories have changed."""
        self._groups = None

    def refresh(self, named: Mapping[str, Adapters]) -> None:
        """With "qr": A_t of every position from what trains now."""
        if self.enforcement != "qr":
            return
        for (names, old, _), new in self._stacked(named):
            q = ops.extend_basis(old, new).q if old.shape[-1] else ops.qr(new).q
            for name, one in zip(names, q.unbind(0)):
                named[name].orthonormal_a = one

    def penalty(self, named: Mapping[str, Adapters]) -> Tensor:
        """The term of the loss."""
        terms = []
        for (_, old, past), new in self._stacked(named):
            if self.kind == "stack":
                terms.append(ops.orthogonality_penalty(new, old if old.shape[-1] else None, past=past).sum())
            elif self.kind == "cross" and old.shape[-1]:
                terms.append(ops.orthogonality_penalty(new, old, norm="l1").sum())
        if terms:
            return torch.stack(terms).sum()
        like = next(iter(named.values())).past_a
        return like.new_zeros(())

    def end(self, named: Mapping[str, Adapters]) -> None:
        """Before the adapters join the history: "qr" fixes Q, "absorb" moves R into B."""
        self.refresh(named)
        if self.enforcement == "absorb":
            for (names, *_), new in self._stacked(named):
                q, r = ops.qr(new)
                for name, one, factor in zip(names, q.unbind(0), r.unbind(0)):
                    current = named[name].current
                    if current is not None:
                        current.a.copy_(one)
                        current.b.copy_(factor @ current.b)
        self.forget()

    def _stacked(self, named: Mapping[str, Adapters]) -> Iterator[tuple[_Group, Tensor]]:
        """Each group with what its positions train, [positions, in, r]."""
        if self._groups is None:
            self._groups = self._grouped(named)
        for group in self._groups:
            yield group, torch.stack([one for name in group.names if (one := named[name].lora_a) is not None])

    @torch.no_grad()
    def _grouped(self, named: Mapping[str, Adapters]) -> list[_Group]:
        by_shape: dict[tuple[int, int, int], list[str]] = {}
        for name, adapters in named.items():
            if adapters.lora_a is not None:
                size, rank = adapters.lora_a.shape
                by_shape.setdefault((size, adapters.past_a.shape[1], rank), []).append(name)
        groups = []
        for names in by_shape.values():
            old = torch.stack([named[name].past_a for name in names])
            stack = self.kind == "stack" and old.shape[-1] > 0
            groups.append(_Group(names, old, ops.orthogonality_penalty(old).square() if stack else None))
        return groups
