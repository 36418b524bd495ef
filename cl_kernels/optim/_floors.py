"""Weights that lie on their anchor: the anchor's memory holds the next displacement there, and the weight the anchor.

Through steps, edits from outside, copies and checkpoints the true anchor stays known, and a run that goes on from a
file goes on as it would have.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops.weight_projection import FIRED, FLOORED
from cl_kernels.optim import _anchors, _names, _shards
from cl_kernels.optim._anchored import AnchoredOptimizer, Held

__all__ = ["HALVES", "FlooredOptimizer"]

HALVES = (torch.bfloat16, torch.float16)
SLOT = "anchor_slot"  # in a checkpoint: c of a tensor at its floor


class FlooredOptimizer(AnchoredOptimizer):
    """An anchored optimizer with a radius record for each parameter, whose anchors' memory may hold a displacement."""

    _OWN = (*AnchoredOptimizer._OWN, "_full_state")

    def __init__(self, params: Any, defaults: dict[str, Any], full_state: bool, *anchoring: Any) -> None:
        self._versions: dict[Tensor, int] = {}  # of the weights as the last step left them
        self._full_state = full_state
        super().__init__(params, defaults, *anchoring)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = {}

    # -- edits ---------------------------------------------------------------------------------------------------------

    def _watch(self, pairs: list[tuple[Tensor, Held]]) -> None:
        """Raise `RuntimeError` if a weight that lies on its anchor was edited: it is the anchor's only copy there.

        Only weights whose version has changed since the last step are looked at, so an ordinary step reads nothing.
        An edit that was taken back (an average swapped in for a test) is none.
        """
        edited = [(p, held) for p, held in pairs if self._versions.get(p) != _shards.version(p)]
        if not edited or (edited[0][0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        for p, _ in edited:
            if "master" in self.state.get(p, ()):
                master = _shards.local(self.state[p]["master"])
                here = _shards.local(p)
                master.copy_(torch.where(here == master.to(p.dtype), master, here.float()))
        down = self._floored(edited)
        for p, held in down:
            if int(_anchors.checksum(_shards.local(p).detach(), _shards.offset(p))) != int(held.mine):
                raise RuntimeError(
                    f"{held.name}: the weight was edited while its radius is at the floor, where the weight itself is "
                    "the only copy of the anchor. Call `set_anchors` with the anchors, or put the weight back; to "
                    "return to an older checkpoint load the optimizer's state before the model's"
                )

    def _floored(self, pairs: list[tuple[Tensor, Held]]) -> list[tuple[Tensor, Held]]:
        """Those whose anchor's memory holds c; reads the device once, if any has been stepped."""
        known = [(p, held, held.record) for p, held in pairs if held.record is not None and held.slot is not None]
        if not known:
            return []
        flags = torch.stack([record[FLOORED].to(known[0][2].device) for _, _, record in known]).tolist()
        return [(p, held) for (p, held, _), down in zip(known, flags, strict=True) if down]

    def _true(self, parameter: Tensor, held: Held) -> Tensor:
        slot = super()._true(parameter, held)
        if held.record is None:
            return slot
        here = _shards.local(parameter).detach()
        return torch.where(held.record[FLOORED] != 0, here, slot.to(here.dtype))

    def anchors(self) -> dict[str, Tensor | None]:
        self._watch(self._present())
        return super().anchors()

    def _anchored(self, parameter: Tensor) -> None:
        """The radius starts again from its floor; only the count of steps in which it acted goes on."""
        held, record = self._held[parameter], self.state.get(parameter, {}).get("radius")
        self._versions.pop(parameter, None)
        if record is not None:
            record[:FIRED] = 0
            held.record = record

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self, *, include_anchors: bool = False) -> dict[str, Any]:
        """torch's state dict with the radii, c of tensors at their floor, and fingerprints of the anchors by name; on
        request the anchors themselves. Reads the floors from the device."""
        self._watch(self._present())
        state = super().state_dict(include_anchors=include_anchors)
        down = {p for p, _ in self._floored(self._present())}
        for i, p in enumerate(_names.grouped(self.param_groups)):
            held = self._held.get(p)
            if held is not None and held.slot is not None and i in state["state"] and (self._full_state or p in down):
                state["state"][i] = state["state"][i] | {SLOT: _shards.like(held.slot.clone(), p)}
        return state

    def _before_load(self, state_dict: dict[str, Any]) -> None:
        if "tensors" not in state_dict.get("anchors", {}):
            self._watch(self._present())

    @torch.no_grad()
    def _loaded(self, state_dict: dict[str, Any], before: dict[Tensor, Held]) -> None:
        """Undo torch's casts to the parameters' dtype, and give each slot what belongs there."""
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        self._versions = {}
        for index, p in zip(ids, _names.grouped(self.param_groups), strict=True):
            entry, held, state = state_dict["state"].get(index, {}), self._held.get(p), self.state.get(p, {})
            state.pop(SLOT, None)
            if held is None:  # excluded now
                for key in ("radius", "master"):
                    state.pop(key, None)
            if held is None or not entry:
                continue
            for key, value in entry.items():
                wide = isinstance(value, Tensor) and value.dtype is torch.float32 and p.dtype in HALVES
                if key in ("radius", "master") or (wide and key not in ("step", SLOT)):
                    state[key] = value.detach().to(_shards.local(p).device, copy=True)
            if "step" in state:
                state["step"] = state["step"].to(_shards.local(p).device)
            if "radius" in entry:
                self._settle(p, held, state["radius"], entry.get(SLOT))

    def _settle(self, p: Tensor, held: Held, record: Tensor, saved: Tensor | None) -> None:
        """Put the true anchor into the slot if c is there, then the c that was saved. Without one (distributed
        checkpoints drop it unless full_state) the next h is 0, as for a tensor that has not moved."""
        slot = held.slot
        if slot is not None:
            if held.record is not None:
                down = held.record[FLOORED].to(slot.device) != 0
                slot.copy_(torch.where(down, _shards.local(p).to(slot.dtype), slot))
            if saved is None:
                record[FLOORED] = 0.0
            else:
                slot.copy_(_shards.local(saved))
        held.record = record
