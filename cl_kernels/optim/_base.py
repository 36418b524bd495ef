"""What all projected optimizers share: names, the subspace, the check of the promise, and saving."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.optim import _gradients, _names, _shards, _subspace
from cl_kernels.optim._named import NamedOptimizer
from cl_kernels.optim._subspace import Prepared, Ready, Store

__all__ = ["ProjectedOptimizer"]


class ProjectedOptimizer(NamedOptimizer):
    """An optimizer whose updates are projected by a store keyed by parameter name."""

    _OWN = (*NamedOptimizer._OWN, "_store", "_strict", "_start", "_expected")

    def __init__(self, params: Any, defaults: dict[str, Any], subspace: Any, nonfinite: str) -> None:
        self._store: Store | None = None
        self._strict = True
        self._seen: tuple[int, int] | None = None  # identity and version of the store behind _ready
        self._ready: dict[Tensor, Ready | None] = {}
        self._start: dict[Tensor, Tensor] = {}
        self._expected: dict[str, str] = {}  # fingerprints of a loaded state whose store was still empty
        super().__init__(params, defaults, nonfinite)
        if subspace is not None:
            self.set_subspace(subspace)

    # -- the subspace -------------------------------------------------------------------------------------------------

    def set_subspace(self, store: Any, *, strict: bool = True) -> None:
        """Project updates by `store` from now on: a `SubspaceStore`, or a dictionary of projectors by parameter name.

        Moments are kept; `violations()` counts from here. Parameters that the store does not name train freely. With
        `strict`, every name of the store must be a parameter's, and a parameter that was projected before must still
        be. Raises `SubspaceMismatchError`, `SubspaceError` or `RuntimeError` (device), and then changes nothing. Keeps
        one copy of each projected parameter. `None` ends the projection.
        """
        self._adopt(_subspace.as_store(store), strict, restart=True)
        self._expected = {}

    @torch.no_grad()
    def violations(self) -> dict[str, float]:
        """By name, the share ||V^T dW|| / ||dW|| of each projected parameter's movement that lies in the suppressed
        directions, since the last `set_subspace` (or the load of a checkpoint). Near 0 where P removes them. Sharded
        parameters are gathered one by one: every process must call it then."""
        if self._store is None:
            return {}
        return {
            self._names[p]: _subspace.leak(
                _shards.whole(p).double() - _shards.whole(start).to(p.device).double(),
                self._store.sides(self._names[p]),
            )
            for p, start in self._start.items()
        }

    def _refresh(self) -> None:
        """Before a step: follow changes of the groups and of the store."""
        super()._refresh()
        if self._expected:
            self._same_subspace(self._expected)
            self._expected = {}
        if self._store is not None and self._seen != (id(self._store), self._store.version):
            self._adopt(self._store, self._strict, restart=False)

    def _prepared(self, parameter: Tensor) -> Prepared | None:
        """The projectors of one parameter; None where it trains freely."""
        store = self._store
        if store is None:
            return None
        try:
            found = self._ready[parameter]
        except KeyError:
            found = self._ready[parameter] = self._look_up(store, parameter)
        if found is not None and _subspace.outdated(found, parameter):
            found = self._ready[parameter] = self._look_up(store, parameter)
        return None if found is None else found[0]

    def _look_up(self, store: Store, parameter: Tensor) -> Ready | None:
        name = self._names.get(parameter)
        keys = set(store.keys())
        if name is None and keys:
            raise SubspaceMismatchError(
                f"a parameter of shape {tuple(parameter.shape)} has no name, but the subspace is kept by name: pass "
                "`model.named_parameters()` to the optimizer, or call `bind(model)` after editing its groups"
                + (f". If an engine put it there: {_shards.FLATTENED}" if parameter.ndim == 1 else "")
            )
        return _subspace.ready(name, parameter, store.sides(name)) if name in keys and name is not None else None

    def _present_changed(self) -> None:
        self._ready = {}
        if self._store is not None:
            self._adopt(self._store, self._strict, restart=False)

    def _adopt(self, store: Store | None, strict: bool, *, restart: bool) -> None:
        ready: dict[Tensor, Ready | None] = {}
        covered: dict[Tensor, str] = {}  # in the order of the groups, the same in every process
        if store is not None:
            keys = set(store.keys())
            present = list(_names.grouped(self.param_groups))
            if keys and (why := _shards.flattened(self._names.values(), None, None, None)):
                raise SubspaceMismatchError(f"parameters named as in {next(iter(self._names.values()))}: {why}")
            ready = {p: self._look_up(store, p) for p in present}
            covered = {p: name for p in present if (name := self._names.get(p)) in keys and name is not None}
            _subspace.shared_memory({name: p for p, name in covered.items()})
            if strict:
                _all_known(keys - set(self._names.values()), "the subspace names unknown parameters")
                lost = {self._names[p] for p in self._start if p in set(present)} - keys
                _all_known(lost, "parameters projected so far are missing from the new subspace")
        kept = {} if restart else self._start
        start = {p: kept[p] if p in kept else p.detach().clone() for p in covered}
        self._store, self._strict, self._ready, self._start = store, strict, ready, start
        self._seen = None if store is None else (id(store), store.version)

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self, *, include_subspace: bool = False) -> dict[str, Any]:
        """torch's state dict; with a subspace, also its fingerprints by name, and on request its tensors."""
        _names.settle(self.param_groups)
        state: dict[str, Any] = super().state_dict()
        if self._store is not None and (keys := list(self._store.keys())):
            state["subspace"] = {"fingerprints": {name: self._store.fingerprint(name) for name in keys}}
            if include_subspace:
                state["subspace"]["tensors"] = _subspace.tensors_of(self._store)
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Load a state dict, torch's own included. One saved under another subspace than the present raises
        `SubspaceMismatchError` unless it carries its subspace or `strict` is off; nothing has changed then. While the
        present store is empty (frameworks may load it after the optimizer) the comparison waits for the next step."""
        saved = state_dict.get("subspace", {})
        prints: dict[str, str] = saved.get("fingerprints", {})
        store: Store | None = None
        if "tensors" in saved:
            devices = {name: parameter.device for parameter, name in self._names.items()}
            store = _subspace.embedded(saved["tensors"], devices)
        elif strict and prints and (self._store is None or list(self._store.keys())):
            self._same_subspace(prints)
        before = (self._store, self._strict, self._ready, self._start, self._seen, self._expected)
        loaded = (self.state, self.param_groups)
        if store is not None:
            self.set_subspace(store, strict=strict)
        try:
            super().load_state_dict(state_dict)
            _gradients.check_state(self._names, self.state)
        except Exception:
            self._store, self._strict, self._ready, self._start, self._seen, self._expected = before
            self.state, self.param_groups = loaded
            raise
        waits = strict and store is None and self._store is not None and not list(self._store.keys())
        self._expected = prints if waits else {}
        if self._store is not None:
            self._adopt(self._store, self._strict, restart=True)

    def _same_subspace(self, saved: dict[str, str]) -> None:
        store = self._store
        have = {} if store is None else {name: store.fingerprint(name) for name in store.keys()}  # noqa: SIM118 - a Protocol, not a dict
        differing = {name for name in saved.keys() | have.keys() if saved.get(name) != have.get(name)}
        _all_known(differing, "the state was saved under another subspace (call `set_subspace` first); differing")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen, self._ready = None, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectedOptimizer:
        memo[id(self._store)] = self._store  # shared by reference: `store.clone()` copies a store
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


def _all_known(names: set[str], what: str) -> None:
    if names:
        raise SubspaceMismatchError(f"{what}: {_names.few(names)}; pass strict=False to go on regardless")
