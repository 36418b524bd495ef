"""Optimizers that are held to an anchor: whose, where from, what is left out, and how it is told apart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.optim import _anchors, _gradients, _names, _rows, _shards, _subspace
from cl_kernels.optim._anchors import DEFAULT_EXCLUDE
from cl_kernels.optim._named import NamedOptimizer

__all__ = ["AnchoredOptimizer", "Anchors", "Exclude", "Held"]

Anchors = str | os.PathLike[str] | Mapping[str, Tensor | None] | None
Exclude = str | Tensor | Iterable[str | Tensor]


@dataclass(slots=True, eq=False)
class Held:
    """One parameter's anchor: the memory that steps work on, never the parameter's own.

    `slot` is this process's part, None for a zero anchor. `digest` (of the whole; `mine` of this part) and `scale` (its
    mean row norm) are of the true anchor, whatever a step keeps in the slot meanwhile. `record` is the radius state
    where a method has one: it survives toolboxes that wipe `optimizer.state`.
    """

    name: str | None
    slot: Tensor | None
    digest: Tensor
    mine: Tensor
    scale: float = 0.0
    record: Tensor | None = None


class AnchoredOptimizer(NamedOptimizer):
    """An optimizer that knows the weights its parameters are held to, by name, in memory of its own."""

    _OWN = (*NamedOptimizer._OWN, "_held", "_patterns", "_anchor_dtype", "_built")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        anchors: Anchors,
        exclude: Exclude,
        anchor_dtype: torch.dtype | str | None,
        nonfinite: str,
    ) -> None:
        if not (anchor_dtype in (None, "auto") or isinstance(anchor_dtype, torch.dtype)):
            raise ValueError(f"Invalid anchor_dtype value: {anchor_dtype!r} (expected None, 'auto' or a torch.dtype)")
        if isinstance(anchor_dtype, torch.dtype) and not anchor_dtype.is_floating_point:
            raise ValueError(f"Invalid anchor_dtype value: {anchor_dtype} (expected a floating point type)")
        self._held: dict[Tensor, Held] = {}
        self._left_out: dict[Tensor, bool] = {}
        self._anchor_dtype = anchor_dtype
        self._patterns = (exclude,) if isinstance(exclude, (str, Tensor)) else tuple(exclude)
        self._built = False
        super().__init__(params, defaults, nonfinite)
        present, given = list(_names.grouped(self.param_groups)), exclude is not DEFAULT_EXCLUDE
        _anchors.excluded(self._patterns, self._names, present, given)
        if not given and not self._names:
            warnings.warn(
                "the parameters have no names, so none is excluded: a head that starts at random would be held to "
                "where it starts. Pass `model.named_parameters()`, or exclude=() if that is meant",
                stacklevel=4,
            )
        self._built = True
        self.set_anchors(anchors)

    # -- anchors ------------------------------------------------------------------------------------------------------

    def set_anchors(self, anchors: Anchors = "init", *, strict: bool = True) -> None:
        """Hold the parameters to other anchors from now on, as when a new task begins; what was learned about the old
        ones (radii) is forgotten, moments are kept.

        `anchors`: "init" for the weights as they are now, a mapping of parameter names to tensors (a state dict; None
        for a zero anchor), the path of a safetensors file, of which only what this process holds is read, or None for
        zero anchors throughout. Every parameter that is not excluded needs one; with `strict` off those without keep
        theirs. Raises `SubspaceMismatchError` for names, `ValueError` for shapes, `NonFiniteError`, `CheckpointError`
        (file), and then changes nothing.
        """
        made: dict[Tensor, Held] = {}
        missing: list[str] = []
        with _anchors.lookup(anchors) as (find, has):
            for p in self._to_hold(frozen=anchors != "init" or isinstance(anchors, Mapping)):
                name = self._names.get(p)
                if has(name):
                    made[p] = self._hold(name, p, find(name, p))
                elif strict or p not in self._held:
                    missing.append(str(name or f"a parameter of shape {tuple(p.shape)} without a name"))
        if missing:
            raise SubspaceMismatchError(
                f"anchors: none for {_names.few(missing)}; exclude what has no pre-trained weights "
                "(`exclude=('head.*',)`), or give it an anchor"
            )
        _anchors.finite([(str(held.name), held.slot) for held in made.values() if held.slot is not None])
        _subspace.shared_memory({str(self._names.get(p, i)): p for i, p in enumerate(made)})
        self._agree_on(made)
        self._held = {p: held for p, held in self._held.items() if not strict and p not in made} | made
        for p in made:
            self._anchored(p)

    def anchors(self) -> dict[str, Tensor | None]:
        """The anchors by name, as copies: always the true ones. None is a zero anchor."""
        labels = self._labels()
        return {
            labels[p]: None if held.slot is None else _shards.like(self._true(p, held).to(p.dtype, copy=True), p)
            for p, held in self._present()
        }

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """By name, the largest row norm of W - W_0 in the group's norm; one transfer from the device.

        Sharded parameters are reduced over their processes: every process must call it then.
        """
        labels, found = self._labels(), {}
        for p, held in self._present():
            weight = _shards.local(p).double()
            moved = weight if held.slot is None else weight - self._true(p, held).double()
            found[labels[p]] = _rows.largest(moved, p, self._norm_of(p))
        tops = list(found.values())
        read = torch.stack([top.to(tops[0].device) for top in tops]).tolist() if tops else []
        return dict(zip(found, read, strict=True))

    def fingerprints(self) -> dict[str, str]:
        """64 bits of each true anchor by name, the same on every device and however it is sharded."""
        labels = self._labels()
        return {labels[p]: f"{int(held.digest) & (1 << 64) - 1:016x}" for p, held in self._present()}

    # -- what subclasses say ------------------------------------------------------------------------------------------

    def _true(self, parameter: Tensor, held: Held) -> Tensor:
        """This process's part of the true anchor, not a copy; not for zero anchors."""
        if held.slot is None:
            raise AssertionError("a zero anchor has no memory")
        return held.slot

    def _anchored(self, parameter: Tensor) -> None:
        """The parameter has a new anchor: forget what was learned about the old one."""

    def _norm_of(self, parameter: Tensor) -> str:
        """The norm of the parameter's group."""
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                return str(group.get("norm", "row_l1"))
        return "row_l1"

    # -- who is held --------------------------------------------------------------------------------------------------

    def _prepared(self, parameter: Tensor) -> Held | None:
        held = self._held.get(parameter)
        if held is None:
            if self._is_excluded(parameter):
                return None
            held = self._adopted(parameter)
        slot = held.slot
        if slot is not None:
            here = _shards.local(parameter)
            if slot.shape != here.shape:
                raise ValueError(
                    f"{held.name}: the parameter has shape {tuple(here.shape)}, its anchor {tuple(slot.shape)}; after "
                    "a parameter was resized call `bind(model)`"
                )
            if slot.device != here.device:  # the model was moved: its anchor follows
                held.slot = slot.to(here.device)
                held.record = None if held.record is None else held.record.to(here.device)
        return held

    def _is_excluded(self, parameter: Tensor) -> bool:
        known = self._left_out.get(parameter)
        if known is None:
            hit = _anchors.excluded(self._patterns, self._names, [parameter], must=False)
            known = self._left_out[parameter] = bool(hit)
        return known

    def _to_hold(self, frozen: bool) -> Iterator[Tensor]:
        """Those not excluded; frozen ones on request, else they are anchored where they are once they train."""
        for p in _names.grouped(self.param_groups):
            if not self._is_excluded(p) and (frozen or p.requires_grad):
                yield p

    def _adopted(self, parameter: Tensor) -> Held:
        """A parameter that was frozen, or that a toolbox put into a group, is anchored where it is now."""
        name = self._names.get(parameter)
        if name is None and self._names:
            raise SubspaceMismatchError(
                f"a parameter of shape {tuple(parameter.shape)} has no name, so whose anchor it has cannot be told: "
                "call `bind(model)` after editing the groups"
            )
        held = self._hold(name, parameter, _shards.local(parameter).detach().clone())
        self._agree_on({parameter: held})
        self._held[parameter] = held
        return held

    def _hold(self, name: str | None, parameter: Tensor, anchor: Tensor | None) -> Held:
        label = str(name or f"a parameter of shape {tuple(parameter.shape)}")
        if parameter.is_complex():
            raise RuntimeError(f"{label}: complex parameters cannot be held to an anchor; exclude them")
        if why := _shards.flattened(() if name is None else (name,), None, None, None):
            raise SubspaceMismatchError(f"{label}: {why}")
        _shards.rows(label, parameter)  # raises where rows are cut
        if anchor is None:
            nothing = torch.zeros((), dtype=torch.int64, device=_shards.local(parameter).device)
            return Held(name, None, nothing, nothing)
        digest = _anchors.checksum(anchor, _shards.offset(parameter))
        scale = 0.0
        if self._wants_scale(parameter):
            scale = float(_rows.mean(anchor.double(), parameter, self._norm_of(parameter)))
        return Held(name, _anchors.compact(label, anchor, self._anchor_dtype), digest, digest, scale)

    def _wants_scale(self, parameter: Tensor) -> bool:
        """Whether the anchor's mean row norm is asked for, which reads a number from the device."""
        return False

    def _agree_on(self, made: dict[Tensor, Held]) -> None:
        """Digests of shards become those of the whole."""
        sharded = [(p, held) for p, held in made.items() if _shards.rows("", p) is not None]
        if sharded:
            total = _shards.summed(torch.stack([held.digest for _, held in sharded]), [p for p, _ in sharded])
            for (_, held), digest in zip(sharded, total, strict=True):
                held.digest = digest

    def _present_changed(self) -> None:
        if not self._built:
            return
        self._left_out = {}
        present = list(_names.grouped(self.param_groups))
        by_name = {held.name: (p, held) for p, held in self._held.items() if held.name is not None}
        held_now = {p: replace(h, name=self._names.get(p, h.name)) for p, h in self._held.items()}
        for p in present:
            before = by_name.get(self._names.get(p, ""))
            if p in held_now or before is None or before[0] in set(present) or self._is_excluded(p):
                continue
            if before[0].shape == p.shape:  # the same weight in a new tensor
                held_now[p] = held_now.pop(before[0])
        for p in self._to_hold(frozen=False):
            if p not in held_now:
                held_now[p] = self._hold(self._names.get(p), p, _shards.local(p).detach().clone())
        self._agree_on({p: held for p, held in held_now.items() if p not in self._held})
        self._held = held_now

    def _present(self) -> list[tuple[Tensor, Held]]:
        """Anchored parameters in the order of the groups, the same in every process."""
        return [(p, self._held[p]) for p in _names.grouped(self.param_groups) if p in self._held]

    def _labels(self) -> dict[Tensor, str]:
        """Names, or positions for parameters that have none."""
        return {p: self._names.get(p, str(i)) for i, p in enumerate(_names.grouped(self.param_groups))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._left_out = {}

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self, *, include_anchors: bool = False) -> dict[str, Any]:
        """torch's state dict, with the fingerprints of the anchors by name, and on request the anchors themselves."""
        _names.settle(self.param_groups)
        state: dict[str, Any] = super().state_dict()
        state["anchors"] = {"fingerprints": self.fingerprints()}
        if include_anchors:
            state["anchors"]["tensors"] = self.anchors()
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Load a state dict, torch's own included. One saved under other anchors than the present raises
        `SubspaceMismatchError` unless it carries its anchors or `strict` is off; nothing has changed then."""
        saved: dict[str, Any] = state_dict.get("anchors", {})
        before = (self._held, self.state, self.param_groups)
        if "tensors" in saved:
            self._embedded(saved["tensors"])
        elif strict and saved:
            self._same_anchors(saved["fingerprints"], state_dict)
        try:
            self._before_load(state_dict)
            super().load_state_dict(state_dict)
            _gradients.check_state(self._names, self.state)
        except Exception:
            self._held, self.state, self.param_groups = before
            raise
        self._loaded(state_dict, before[0])

    def _before_load(self, state_dict: dict[str, Any]) -> None:
        """Raise where the state cannot be taken over."""

    def _loaded(self, state_dict: dict[str, Any], before: dict[Tensor, Held]) -> None:
        """A state was loaded; `before`: what was held until then."""

    def _embedded(self, tensors: Mapping[str, Tensor | None]) -> None:
        made = {}
        with _anchors.lookup(tensors) as (find, has):
            for p, label in self._labels().items():
                if has(label) and not self._is_excluded(p):
                    made[p] = self._hold(self._names.get(p), p, find(label, p))
        self._agree_on(made)
        self._held = self._held | made

    def _same_anchors(self, saved: Mapping[str, str], state_dict: Mapping[str, Any]) -> None:
        """Raise unless the anchors saved are the present ones. One that was frozen then or is now is not compared."""
        labels, have = self._labels(), self.fingerprints()
        trained = {label for i, label in enumerate(labels.values()) if state_dict["state"].get(i)}
        differing = {label for label in saved.keys() & have.keys() if saved[label] != have[label]}
        differing |= {label for label in saved if label in trained and label not in have}
        differing |= {label for label in have if label in trained and label not in saved}
        differing |= saved.keys() - set(labels.values())
        if differing:
            raise SubspaceMismatchError(
                f"the state was saved under other anchors; differing: {_names.few(differing)}. Make the optimizer from "
                "the pre-trained weights before trained ones are loaded, give it `anchors=` (a mapping or a file), or "
                "save with include_anchors=True; strict=False goes on regardless"
            )
