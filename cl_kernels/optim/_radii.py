"""What FTPAdamW and FTPSGD share: learned radii around an anchor, their diagnostics and their place in a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.weight_projection import FIRED, FIRST, FLOORED, GAMMA, GRADIENT, NORMS, PROJECTED, SECOND, rule_of
from cl_kernels.optim import _names, _sharded_radii, _shards
from cl_kernels.optim._anchored import Anchors, Exclude, Held
from cl_kernels.optim._anchors import DEFAULT_EXCLUDE
from cl_kernels.optim._floors import HALVES, FlooredOptimizer

__all__ = ["Lists", "RadiusOptimizer", "RadiusOptions"]

_RULE: dict[str, Any] = {  # settings of a group: the published arithmetic
    "kappa": 1.0,
    "radius_lr": 1e-2,
    "relative_radius_lr": False,
    "masked": False,
    "radius_floor": 1e-8,
    "norm": "row_l1",
    "radius": None,
    "master_weights": True,
}


class RadiusOptions(TypedDict, total=False):
    """What FTPAdamW and FTPSGD take beside torch's arguments."""

    anchors: Anchors
    exclude: Exclude
    anchor_dtype: torch.dtype | str | None
    nonfinite: str
    full_state: bool
    kappa: float
    radius_lr: float
    relative_radius_lr: bool
    masked: bool
    radius_floor: float
    norm: str
    radius: float | None
    master_weights: bool


class Lists(NamedTuple):
    """What one group's step works on; `weights` are the parameters, or float32 masters of 16-bit ones. All local."""

    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    largests: list[Tensor]
    steps: list[Tensor]
    slots: list[Tensor | None]
    records: list[Tensor]

    def only(self, which: Sequence[int]) -> Lists:
        """The entries at these places; a list that there is none of stays empty."""
        return Lists(*([field[i] for i in which] if field else [] for field in self))  # type: ignore[arg-type]  # alike


class RadiusOptimizer(FlooredOptimizer):
    """An anchored optimizer that keeps each row of W - W_0 within a radius that it learns, one for each tensor."""

    _OWN = (*FlooredOptimizer._OWN, "_unopened")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        anchors: Anchors = "init",
        exclude: Exclude = DEFAULT_EXCLUDE,
        anchor_dtype: torch.dtype | str | None = None,
        nonfinite: str = "propagate",
        full_state: bool = False,
        **rule: Any,
    ) -> None:
        if unknown := rule.keys() - _RULE.keys():
            raise TypeError(f"{type(self).__name__}: unexpected argument {min(unknown)!r}")
        self._unopened = False  # anchors that need not be where the weights are, and no step since
        super().__init__(params, defaults | _RULE | rule, full_state, anchors, exclude, anchor_dtype, nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["norm"] not in NORMS:
            raise ValueError(f"Invalid norm value: {group['norm']!r} (expected one of {', '.join(map(repr, NORMS))})")
        if group["radius"] is not None and not group["radius"] >= 0.0:
            raise ValueError(f"Invalid radius value: {group['radius']} (expected None, or 0 or more)")
        if not 0.0 <= group["radius_lr"] < math.inf:
            raise ValueError(f"Invalid radius_lr value: {group['radius_lr']} (expected 0 or more)")
        rule_of(1, group["kappa"], group["radius_lr"], False, group["radius_floor"], None, group["norm"])

    def set_anchors(self, anchors: Anchors = "init", *, strict: bool = True) -> None:
        super().set_anchors(anchors, strict=strict)
        self._unopened = not isinstance(anchors, str) or anchors != "init"

    def set_radii(self, radii: Mapping[str, float]) -> None:
        """Start from these radii by name, such as another optimizer's `radii()`, instead of the floor.

        What a fresh radius would do, return a weight to its anchor in the first step, does not happen then: this is how
        a second task goes on around the first one's anchors. The radius's moments start anew. Raises `ValueError` for
        radii that are negative or not finite and `SubspaceMismatchError` for unknown names, and then changes nothing.
        """
        held, labels = dict(self._present()), self._labels()
        known = {labels[p]: p for p in held}
        if unknown := radii.keys() - known.keys():
            raise SubspaceMismatchError(f"radii: no parameter is held under the names {_names.few(unknown)}")
        if wrong := [name for name, value in radii.items() if not 0.0 <= value < math.inf]:
            raise ValueError(f"radii: expected numbers from 0, got {radii[wrong[0]]} for {wrong[0]}")
        for name, value in radii.items():
            p = known[name]
            if self.state.get(p):
                record = self._record(p, held[p])
            else:  # the record waits for the state, which is made in the first step
                kind = torch.float64 if p.dtype is torch.float64 else torch.float32
                record = held[p].record = torch.zeros(8, dtype=kind, device=_shards.local(p).device)
            record[[FIRST, SECOND]] = 0.0
            record[GAMMA] = value

    # -- what it learned ----------------------------------------------------------------------------------------------

    def radii(self) -> dict[str, float]:
        """The radius of each parameter by name: 0 before its first step, `radius_floor` at its floor."""
        fixed = {p: group["radius"] for group in self.param_groups for p in group["params"]}
        labels, learned = self._labels(), self._read(GAMMA)
        given = {labels[p]: float(fixed[p]) for p, _ in self._present() if fixed[p] is not None}
        return {labels[p]: learned.get(labels[p], 0.0) for p, _ in self._present()} | given

    def projected_fraction(self) -> dict[str, float]:
        """By name, the share of rows that the last step scaled back to the radius."""
        return self._read(PROJECTED)

    def radius_gradients(self) -> dict[str, float]:
        """By name, the h of the last step, before `kappa`: above 0 where moving outward raised the loss."""
        return self._read(GRADIENT)

    def fire_rate(self) -> dict[str, float]:
        """By name, the share of all steps in which any row was scaled: 0 says that the method does nothing."""
        steps = [self.state[p]["step"] for p, _ in self._stepped()]
        counts = torch.stack([step.to(steps[0].device) for step in steps]).tolist() if steps else []
        fired = self._read(FIRED)
        return {name: fired[name] / max(count, 1.0) for name, count in zip(fired, counts, strict=True)}

    def floor_rate(self) -> float:
        """The share of parameters that lie on their anchor now: an ordinary state, but one to know of."""
        found = self._read(FLOORED).values()
        return sum(found) / max(len(found), 1)

    def _read(self, column: int) -> dict[str, float]:
        """One entry of every radius record, by name, in one transfer from the device."""
        labels, stepped = self._labels(), self._stepped()
        if not stepped:
            return {}
        values = torch.stack([record[column].to(stepped[0][1].device) for _, record in stepped]).tolist()
        return {labels[p]: value for (p, _), value in zip(stepped, values, strict=True)}

    def _stepped(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters with their radius records, those that have one."""
        return [(p, held.record) for p, held in self._present() if held.record is not None and "step" in self.state[p]]

    # -- a step -------------------------------------------------------------------------------------------------------

    def _moments(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Gradients, first moments, second moments, their largest, steps: the base optimizer's, checked."""
        raise NotImplementedError

    def _fused(
        self, group: dict[str, Any], lists: Lists, rule: tuple[Any, ...], scale: Tensor | None, found: Tensor | None
    ) -> None:
        """The step of parameters that are whole."""
        raise NotImplementedError

    def _base(self, group: dict[str, Any]) -> Any:
        """The base step's numbers, as the room's reference takes them."""
        raise NotImplementedError

    def _checked_lists(self, group: dict[str, Any], params: list[Tensor], bonds: list[Held], on_device: bool) -> Lists:
        self._rule(group, 1, group["radius_lr"])  # a group may have been edited
        if not torch.compiler.is_compiling():
            self._watch(list(zip(params, bonds, strict=True)))
        grads, firsts, seconds, largests, steps = self._moments(group, params)
        records = [self._record(p, held) for p, held in zip(params, bonds, strict=True)]
        if self._unopened:
            self._opening(group, params, bonds)
        weights = [self.state[p].get("master", p) for p in params]
        slots = [held.slot for held in bonds]
        if any(map(_shards.is_sharded, params)):
            weights, grads, firsts = map(_shards.all_local, (weights, grads, firsts))
            seconds, largests = map(_shards.all_local, (seconds, largests))
        return Lists(params, weights, grads, firsts, seconds, largests, steps, slots, records)

    def _record(self, p: Tensor, held: Held) -> Tensor:
        """The radius record, made where there is none; one that a toolbox wiped with the state is found again."""
        state = self.state[p]
        record: Tensor | None = state.get("radius")
        if record is None:
            kind = torch.float64 if p.dtype is torch.float64 else torch.float32
            device = _shards.local(p).device
            record = torch.zeros(8, dtype=kind, device=device) if held.record is None else held.record
            state["radius"] = record
        if held.record is not record:
            held.record = record
        if record.device != _shards.local(p).device:
            raise RuntimeError(
                f"{held.name}: the parameter is on {p.device}, its radius on {record.device}; load its state again"
            )
        return record

    def _bound(
        self, group: dict[str, Any], lists: Lists, bonds: list[Held], scale: Tensor | None, found: Tensor | None
    ) -> None:
        speeds: float | list[float] = group["radius_lr"]
        if group["relative_radius_lr"]:  # zero anchors have no size to be relative to
            speeds = [group["radius_lr"] * (held.scale or 1.0) for held in bonds]
        scale, found = _shards.local(scale), _shards.local(found)
        cut = [i for i, p in enumerate(lists.params) if _shards.shard_groups(p)]
        for which, sharded in (([i for i in range(len(bonds)) if i not in set(cut)], False), (cut, True)):
            if not which:
                continue
            part = lists if len(which) == len(bonds) else lists.only(which)
            each = speeds if isinstance(speeds, float | int) else [speeds[i] for i in which]
            rule = self._rule(group, len(which), each)
            if sharded:
                _sharded_radii.step_(group, part, self._base(group), rule, scale, found)
            else:
                self._fused(group, part, rule, scale, found)
        masters = [i for i, p in enumerate(lists.params) if "master" in self.state[p]]
        if masters:
            here = [_shards.local(lists.params[i]) for i in masters]
            torch._foreach_copy_(here, [lists.weights[i] for i in masters])
        if not torch.compiler.is_compiling():
            for p in lists.params:
                self._versions[p] = _shards.version(p)

    @staticmethod
    def _rule(group: dict[str, Any], count: int, speeds: float | list[float]) -> tuple[Any, ...]:
        """The group's settings as the step takes them; raises `ValueError` where one is out of range."""
        return rule_of(
            count, group["kappa"], speeds, group["masked"], group["radius_floor"], group["radius"], group["norm"]
        )

    def _masters(self, group: dict[str, Any], params: list[Tensor], *moments: str) -> None:
        """The state of 16-bit parameters in float32, with a float32 copy of the weight that the steps work on. A state
        that came without one, torch's own or a float32 parameter's, is widened."""
        for p in params:
            state = self.state[p]
            if p.dtype not in HALVES or not group["master_weights"] or "master" in state:
                continue
            kept = {key: state[key] for key in moments if state.get(key) is not None}
            wide = {key: value.float() for key, value in kept.items()}
            for key in moments:
                if key not in kept:
                    wide[key] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
            if "step" not in state and not kept:
                wide["step"] = torch.zeros((), dtype=torch.float32, device=_shards.local(p).device)
            wide["master"] = p.detach().to(torch.float32, copy=True)
            state.update(wide)

    def _opening(self, group: dict[str, Any], params: list[Tensor], bonds: list[Held]) -> None:
        """Say that a first step returns to the anchor what has been trained already."""
        fresh = [(p, held) for p, held in zip(params, bonds, strict=True) if held.slot is not None]
        lr = group["lr"]
        if torch.compiler.is_compiling() or group["radius"] is not None or (not isinstance(lr, Tensor) and lr == 0.0):
            return
        self._unopened = False
        apart = [
            (held.record[GAMMA] == 0) & (_shards.local(p) != held.slot).any()
            for p, held in fresh
            if held.record is not None and held.slot is not None
        ]
        if apart and any(moved := torch.stack([far.to(apart[0].device) for far in apart]).tolist()):
            which = _names.few(str(held.name) for (_, held), far in zip(fresh, moved, strict=True) if far)
            warnings.warn(
                f"the first step returns weights to their anchors, where every radius starts, and these are elsewhere: "
                f"{which}. To continue a run load its state; `radius=` fixes a radius instead",
                stacklevel=6,
            )

    def _wants_scale(self, parameter: Tensor) -> bool:
        return any(group["relative_radius_lr"] for group in self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in _RULE.items():
                group.setdefault(key, value)
