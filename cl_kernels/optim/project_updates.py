"""Any torch optimizer as a projected one: the difference that its step made is projected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.projection import project_sides
from cl_kernels.optim import _names, _subspace

__all__ = ["ProjectedUpdates", "project_updates"]


class ProjectedUpdates:
    """The handle of `project_updates`: `set_subspace`, `bind`, and `remove` to end the projection."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._store: _subspace.Store | None = None
        self._names: dict[Tensor, str] = {}
        self._before: list[tuple[Tensor, Tensor, _subspace.Prepared]] = []
        for group in optimizer.param_groups:
            names = group.get("param_names", ())
            self._names.update(zip(group["params"], map(_names.plain_name, names), strict=False))
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._keep()),
            optimizer.register_step_post_hook(lambda *_: self._project()),
        ]

    def bind(self, model: nn.Module) -> None:
        """Read the parameters' names from the model: needed where the optimizer was made from bare tensors."""
        self._names.update(_names.named(model))

    def set_subspace(self, store: Any, *, strict: bool = True) -> None:
        """As `ProjectedAdam.set_subspace`; raises `SubspaceMismatchError` and then changes nothing."""
        checked = _subspace.as_store(store)
        keys = set() if checked is None else set(checked.keys())
        present = list(_names.grouped(self._optimizer.param_groups))
        unknown = sorted(keys - set(self._names.values()))
        if keys and any(p not in self._names for p in present):
            raise SubspaceMismatchError(
                "the optimizer's parameters have no names, but the subspace is kept by name: pass "
                "`model.named_parameters()` to the optimizer, or `model=` to project_updates"
            )
        if strict and unknown:
            raise SubspaceMismatchError(f"unknown parameters: {', '.join(unknown[:5])}; strict=False ignores them")
        for p in present:
            if checked is not None and self._names.get(p) in keys:
                _subspace.prepare(self._names[p], p, checked.sides(self._names[p]))
        self._store, self._seen, self._ready = checked, None, {}

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _keep(self) -> None:
        self._before = []
        store = self._store
        if store is None:
            return
        if self._seen != store.version:
            self._seen, self._ready = store.version, {}
        keys = set(store.keys())
        for p in _names.grouped(self._optimizer.param_groups):
            if p not in self._ready:
                name = self._names.get(p)
                if name is None and keys:
                    raise SubspaceMismatchError("a parameter has no name: call `bind(model)` after editing the groups")
                self._ready[p] = _subspace.prepare(name, p, store.sides(name)) if name in keys and name else None
            sides = self._ready[p]
            if sides is not None:
                self._before.append((p, p.detach().clone(), sides))

    @torch.no_grad()
    def _project(self) -> None:
        for p, before, sides in self._before:
            p.copy_(before + project_sides(p - before, sides))
        self._before = []

    _seen: int | None = None
    _ready: dict[Tensor, _subspace.Prepared | None] = {}  # noqa: RUF012 - replaced, never written, before first use


def project_updates(
    optimizer: Optimizer, store: Any = None, *, model: nn.Module | None = None, strict: bool = True
) -> ProjectedUpdates:
    """Make any torch optimizer a projected one: after each step, p <- p0 + P_left (p - p0) P_right.

    Works through torch's step hooks, so it includes whatever the step did, decay too. `store` is keyed by the names
    the optimizer was given (`named_parameters()`), else by those of `model`. Returns a handle to change the store
    between tasks and to remove the projection. Raises `SubspaceMismatchError` for names and sizes. Keeps a copy of the
    projected parameters during a step; `ProjectedAdam` needs none.
    """
    handle = ProjectedUpdates(optimizer)
    try:
        if model is not None:
            handle.bind(model)
        handle.set_subspace(store, strict=strict)
    except Exception:
        handle.remove()
        raise
    return handle
