"""Entries of a store as a flat mapping of tensors, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.ops import Projector, Sides

__all__ = ["check_notes", "flatten", "tensor_versions", "unflatten"]

NOTES = ("energy", "condition", "added")
FIELDS = ("basis", "identity", "span", "dense", *NOTES)


def flatten(name: str, sides: Sides) -> dict[str, Tensor]:
    """The tensors of one entry by ``<name>/<side>/<field>``."""
    state: dict[str, Tensor] = {}
    for side, projector in zip(Sides._fields, sides, strict=True):
        if projector is None:
            continue
        prefix = f"{name}/{side}/"
        if projector.dense is not None:
            state[prefix + "dense"] = projector.dense
            continue
        state[prefix + "basis"] = projector.basis
        state[prefix + "identity"] = torch.tensor(float(projector.identity), dtype=torch.float64)
        state[prefix + "span"] = torch.tensor(float(projector.span), dtype=torch.float64)
    return state


def tensor_versions(sides: Sides) -> tuple[tuple[int, int], ...] | None:
    """What changes when a tensor of the entry is replaced or written to; None if torch does not count writes to it."""
    tensors = [x for projector in sides if projector is not None for x in projector if isinstance(x, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((id(tensor), tensor._version) for tensor in tensors)


def check_notes(name: str, notes: Mapping[str, float]) -> None:
    """Raise `NonFiniteError` for a note that is no number: reports and their JSON could not show it."""
    for what, number in notes.items():
        if not math.isfinite(number):
            raise NonFiniteError(f"{name}: its {what} is {number}")


def unflatten(state: Mapping[str, Tensor]) -> dict[str, tuple[Sides, dict[str, float]]]:
    """Entries and their notes by name. Raises `SubspaceMismatchError` for a key of another form or a missing one,
    `NonFiniteError` for a note."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in state.items():
        name, side, field = [*key.rsplit("/", 2), "", ""][:3]
        if side not in Sides._fields or field not in FIELDS or not isinstance(tensor, Tensor):
            raise SubspaceMismatchError(f"state: {key!r} is no '<name>/<left|right>/<field>' with a tensor")
        groups.setdefault(name, {}).setdefault(side, {})[field] = tensor
    entries: dict[str, tuple[Sides, dict[str, float]]] = {}
    for name, sides in groups.items():
        notes = {
            f"{side}/{what}": float(fields[what]) for side, fields in sides.items() for what in NOTES if what in fields
        }
        check_notes(name, notes)
        entries[name] = (Sides(*(_projector(name, side, sides.get(side)) for side in Sides._fields)), notes)
    return entries


def _projector(name: str, side: str, fields: Mapping[str, Tensor] | None) -> Projector | None:
    if fields is None:
        return None
    if "dense" in fields:
        return Projector.from_dense(fields["dense"])
    missing = [field for field in ("basis", "identity", "span") if field not in fields]
    if missing:
        raise SubspaceMismatchError(f"state: {name}/{side} lacks {', '.join(missing)}")
    return Projector(fields["basis"], float(fields["identity"]), float(fields["span"]))
