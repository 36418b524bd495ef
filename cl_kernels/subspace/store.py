"""What a model remembers: projectors by parameter name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.ops import Projector, Sides
from cl_kernels.subspace import _algebra, _store_files
from cl_kernels.subspace._merge import OnFull, check_on_full, merged
from cl_kernels.subspace._names import checked_name, plain_name
from cl_kernels.subspace._report import SideReport, side_reports
from cl_kernels.subspace._state import check_notes, flatten, tensor_versions, unflatten

__all__ = ["SideReport", "SubspaceStore"]


class SubspaceStore(MutableMapping[str, Projector | Sides]):
    """Projectors by parameter name, with their files, their merging and their report.

    ``store[name] = Projector(...)`` acts on the right (the last dimension of the parameter), ``Sides(left, right)`` on
    both. Names lose the prefixes of DistributedDataParallel and torch.compile; they may hold letters, digits
    and ``_ . / -``. Bases are two-dimensional, [d, r], and must be orthonormal (max |V^T V - I| at most 1e-5 in fp32,
    1e-9 in fp64), else `SubspaceError` with the measured error. `version` grows with every change. A wrong call changes
    nothing.
    """

    def __init__(self, entries: Mapping[str, Projector | Sides] | None = None) -> None:
        self._entries: dict[str, Sides] = {}
        self._notes: dict[str, dict[str, float]] = {}  # "<side>/energy", "<side>/condition", "<side>/added" by name
        self._prints: dict[str, tuple[Any, str]] = {}  # fingerprints, and the versions of the tensors they are of
        self.version = 0
        self.provenance: dict[str, str] = {}
        for name, value in (entries or {}).items():
            self[name] = value

    # ------------------------------------------------------------------------------------------------ mapping
    def __getitem__(self, name: str) -> Projector | Sides:
        sides = self.sides(name)
        return sides.right if sides.left is None and sides.right is not None else sides

    def __setitem__(self, name: str, value: Projector | Sides | tuple[Projector | None, Projector | None]) -> None:
        self.put(name, value)

    def __delitem__(self, name: str) -> None:
        del self._entries[plain_name(name)]
        del self._notes[plain_name(name)]
        self._prints.pop(plain_name(name), None)
        self.version += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and plain_name(name) in self._entries

    def put(
        self,
        name: str,
        value: Projector | Sides | tuple[Projector | None, Projector | None],
        **notes: float,
    ) -> None:
        """Set an entry with what is known of it: ``right_energy``, ``right_condition`` and the same for the left.

        Energy is the share of the second moment's trace that is protected, condition its largest over its smallest
        eigenvalue. How many directions the entry uses more than the one before it is noted for `report`.
        """
        plain, sides = _checked(name, value)
        kept = {f"{side}/{what}" for side in ("left", "right") for what in ("energy", "condition")}
        named = {key.replace("_", "/", 1): float(number) for key, number in notes.items()}
        if not named.keys() <= kept:
            raise TypeError(f"notes: expected some of {sorted(kept)}, got {sorted(named)}")
        check_notes(plain, named)
        self._take(plain, sides, named)

    def _take(self, name: str, sides: Sides, notes: Mapping[str, float]) -> None:
        """Set an entry that was checked, and note what it adds."""
        before = self._entries.get(name, Sides())
        added = {
            f"{side}/added": _algebra.used(new) - (0.0 if old is None else _algebra.used(old))
            for side, old, new in zip(Sides._fields, before, sides, strict=True)
            if new is not None
        }
        self._set(name, sides, {**notes, **added})

    def _set(self, name: str, sides: Sides, notes: dict[str, float]) -> None:
        self._entries[name] = sides
        self._notes[name] = notes
        self._prints.pop(name, None)
        self.version += 1

    def sides(self, name: str) -> Sides:
        """The entry as a (left, right) pair. Raises `KeyError` naming it when there is none."""
        return self._entries[plain_name(name)]

    def fingerprint(self, name: str) -> str:
        """blake2b of the name, the ranks and the bytes of the projectors, the same on every device.

        Computed once an entry, and again when its tensors were written to.
        """
        plain = plain_name(name)
        versions = tensor_versions(self._entries[plain])
        known = self._prints.get(plain)
        if versions is not None and known is not None and known[0] == versions:
            return known[1]
        digest = hashlib.blake2b(plain.encode(), digest_size=16)
        for key, tensor in flatten(plain, self._entries[plain]).items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().to("cpu").contiguous().reshape(-1)
            digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
        self._prints[plain] = (versions, digest.hexdigest())
        return self._prints[plain][1]

    # ------------------------------------------------------------------------------------------------ use
    def merge(
        self, other: Mapping[str, Projector | Sides], *, tolerance: float | None = None, on_full: OnFull = "freeze"
    ) -> None:
        """Protect what `other` protects too: the sum of both spans, re-orthogonalised; the order does not matter.

        Both projectors of a name must have the same mix and normalisation, which the result keeps; the gain of a
        normalised one grows with its rank as when it is built anew. Directions closer than `tolerance` (default: 1e-7
        for fp64 bases, 1e-4 below) count once. When nothing stays free, `on_full` freezes the layer with one warning,
        raises `SubspaceError`, or "relax" gives the last direction back. Other sizes: `SubspaceMismatchError`.
        Energy and condition are kept for names that are new to this store; of a sum of spans they are not known.
        """
        check_on_full(on_full)
        both: dict[str, Sides] = {}
        for name, value in other.items():
            plain, theirs = checked_name(name), Sides.of(value)
            ours = self._entries.get(plain, Sides())
            sides = zip(Sides._fields, ours, theirs, strict=True)
            union = Sides(*(merged(f"{plain} ({side})", a, b, tolerance, on_full) for side, a, b in sides))
            both[plain] = _checked(plain, union)[1]
        for name, checked in both.items():
            known = isinstance(other, SubspaceStore) and name not in self._entries
            self._take(name, checked, other._measured(name) if known else {})  # type: ignore[attr-defined]  # known says so

    def replace(self, other: SubspaceStore) -> None:
        """Put the entries of `other`, with what it knows of them, in place of those of the same names.

        This is the step from task to task of a method that cuts its subspace anew from the sum of all second moments:
        `report` then says by how much each layer grew. Other sizes: `SubspaceMismatchError`, nothing has changed then.
        """
        for name in other:
            for side, ours, theirs in zip(Sides._fields, self._entries.get(name, Sides()), other.sides(name)):
                if ours is not None and theirs is not None and ours.dim != theirs.dim:
                    raise SubspaceMismatchError(
                        f"{name} ({side}): cannot replace a projector of dimension {ours.dim} by one of {theirs.dim}"
                    )
        for name in other:
            self._take(name, other.sides(name), other._measured(name))

    def _measured(self, name: str) -> dict[str, float]:
        return {key: note for key, note in self._notes[name].items() if not key.endswith("/added")}

    def capacity(self) -> dict[str, float]:
        """Share of update directions that each layer still has: (free left share) x (free right share)."""
        shares: dict[str, float] = {}
        for name, sides in self._entries.items():
            shares[name] = 1.0
            for projector in sides:
                shares[name] *= 1.0 if projector is None else _algebra.free_share(projector)
        return shares

    def report(self) -> list[SideReport]:
        """One row per layer and side: dimension, protected rank, energy, condition, orthogonality error, and the room.

        `used` is the share of directions that are protected, rank / d (for a dense P, 1 - (tr P)^2 / (d ||P||_F^2));
        `added` how many more the last `put`, `merge` or `replace` of this entry uses than the entry before it, all of
        them for the first one; `tasks_left` how many tasks that add as many still fit, floor((d - rank) / added), and
        infinity when the last one added none. None where unknown: files of version 1.
        """
        return [row for name, sides in self._entries.items() for row in side_reports(name, sides, self._notes[name])]

    def to(self, *args: Any, **kwargs: Any) -> SubspaceStore:
        """Convert every projector in place as `Tensor.to` does, and return the store."""
        moved = {
            name: Sides(*(None if projector is None else projector.to(*args, **kwargs) for projector in sides))
            for name, sides in self._entries.items()
        }
        self._entries = moved
        self._prints.clear()
        self.version += 1
        return self

    def clone(self) -> SubspaceStore:
        """A copy that shares no tensor with this store."""
        copy = SubspaceStore()
        copy.load_state_dict({key: tensor.clone() for key, tensor in self.state_dict().items()})
        copy.provenance = dict(self.provenance)
        return copy

    # ------------------------------------------------------------------------------------------------ state and files
    def state_dict(self) -> dict[str, Tensor]:
        """Flat: ``<name>/<side>/<basis|identity|span|dense|energy|condition|added>``, tensors only."""
        state: dict[str, Tensor] = {}
        for name, sides in self._entries.items():
            state |= flatten(name, sides)
            state |= {
                f"{name}/{key}": torch.tensor(note, dtype=torch.float64) for key, note in self._notes[name].items()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Take over the entries of `state`; strictly, they replace all entries, whose names must be the same if any.

        Raises `SubspaceMismatchError` for malformed keys or, strictly, other names; with ``strict=False`` entries that
        `state` does not name stay.
        """
        fresh = SubspaceStore()
        for name, (sides, notes) in unflatten(state).items():
            fresh.put(name, sides)
            fresh._set(checked_name(name), fresh.sides(name), notes)
        if strict and self._entries and self._entries.keys() != fresh._entries.keys():
            names = sorted(self._entries.keys() ^ fresh._entries.keys())
            raise SubspaceMismatchError(
                f"state: names differ from the store's: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; "
                "use strict=False to keep entries that it does not name"
            )
        self._entries = fresh._entries if strict else {**self._entries, **fresh._entries}
        self._notes = fresh._notes if strict else {**self._notes, **fresh._notes}
        self._prints.clear()
        self.version += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically; a tensor that several names share is written once. Raises `OSError`."""
        _store_files.write(path, self.state_dict(), list(self), self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SubspaceStore:
        """Read a file that `save` wrote; nothing in it is executed. Raises `CheckpointError` for any other file."""
        state, names, provenance = _store_files.read(path, device)
        store = cls()
        try:
            store.load_state_dict(state)
            if sorted(names) != sorted(store):
                raise ValueError(f"it lists {names}, and holds {list(store)}")
            store._entries = {name: store._entries[name] for name in names}
        except (ValueError, TypeError, KeyError, RuntimeError, NonFiniteError) as error:
            raise _store_files.refusal(path, error) from error
        store.provenance = provenance
        return store


def _checked(name: str, value: Any) -> tuple[str, Sides]:
    """The plain name and the sides of an entry, if it may be one."""
    plain, sides = checked_name(name), Sides.of(value)
    if sides == (None, None):
        raise ValueError(f"value: {plain} has neither a left nor a right projector; leave its name out instead")
    for side, projector in zip(Sides._fields, sides, strict=True):
        if projector is not None:
            _algebra.check(f"{plain} ({side})", projector)
    return plain, sides
