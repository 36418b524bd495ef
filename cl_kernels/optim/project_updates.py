"""Any torch optimizer as a projected one: the difference that its step made is projected."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.projection import BASIS, NONE, project_sides
from cl_kernels.optim import _names, _shards, _subspace
from cl_kernels.optim._base import ProjectedOptimizer

__all__ = ["ProjectedUpdates", "project_updates"]

_PROJECTED: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those with a handle: projecting twice is another method
_BLOCK = 1 << 20  # elements that `low_memory` holds in float64 at a time: 8 MB


class _Kept(NamedTuple):
    """A parameter before the step: a copy, or with `low_memory` only its products with the basis."""

    parameter: Tensor
    before: Tensor
    sides: _subspace.Prepared
    products: bool


class ProjectedUpdates:
    """The handle of `project_updates`: `set_subspace`, `bind`, and `remove` to end the projection."""

    def __init__(self, optimizer: Optimizer, *, low_memory: bool = False) -> None:
        if isinstance(optimizer, ProjectedOptimizer):
            raise ValueError(f"optimizer: {type(optimizer).__name__} projects by itself, call its set_subspace(store)")
        if optimizer in _PROJECTED:
            raise ValueError("optimizer: its updates are projected already; use that handle, or its remove() first")
        self._optimizer = optimizer
        self._low_memory = low_memory
        self._store: _subspace.Store | None = None
        self._names: dict[Tensor, str] = {}
        self._kept: list[_Kept] = []
        self._seen: int | None = None
        self._ready: dict[Tensor, _subspace.Ready | None] = {}
        for group in optimizer.param_groups:
            names = group.get("param_names", ())
            self._names.update(zip(group["params"], map(_names.plain_name, names), strict=False))
        try:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        except AttributeError as error:
            kind = type(optimizer).__name__
            raise TypeError(
                f"optimizer: {kind} has no step hooks, so it wraps another optimizer; call project_updates on the one "
                "inside, before it is wrapped"
            ) from error
        _PROJECTED.add(optimizer)

    def bind(self, model: nn.Module) -> None:
        """Read the parameters' names from the model: needed where the optimizer was made from bare tensors, and after
        a toolbox replaced parameters."""
        names, present = _names.named(model), set(_names.grouped(self._optimizer.param_groups))
        self._names = {p: name for p, name in self._names.items() if p in present and p not in names} | names
        self._ready = {}

    def set_subspace(self, store: Any, *, strict: bool = True) -> None:
        """As `ProjectedAdam.set_subspace`; raises `SubspaceMismatchError` and then changes nothing."""
        checked = _subspace.as_store(store)
        keys = set() if checked is None else set(checked.keys())
        present = list(_names.grouped(self._optimizer.param_groups))
        unknown = sorted(keys - set(self._names.values()))
        if keys and (why := _shards.flattened(self._names.values(), None, None, None)):
            raise SubspaceMismatchError(f"parameters named as in {next(iter(self._names.values()))}: {why}")
        if keys and any(p not in self._names for p in present):
            raise SubspaceMismatchError(
                "the optimizer's parameters have no names, but the subspace is kept by name: pass "
                "`model.named_parameters()` to the optimizer, or `model=` to project_updates"
            )
        if strict and unknown:
            raise SubspaceMismatchError(f"unknown parameters: {', '.join(unknown[:5])}; strict=False ignores them")
        covered = {} if checked is None else {p: n for p in present if (n := self._names.get(p)) in keys and n}
        ready = {p: _subspace.ready(name, p, checked.sides(name)) for p, name in covered.items() if checked}
        _subspace.shared_memory({name: p for p, name in covered.items()})
        self._store, self._ready = checked, {p: ready.get(p) for p in present}
        self._seen = None if checked is None else checked.version

    def remove(self) -> None:
        """Leave the optimizer as it was; once done, doing it again changes nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:  # else it may have another handle by now
            _PROJECTED.discard(self._optimizer)
        self._hooks, self._kept = [], []

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Everything that can fail fails here, before the optimizer writes; all memory to be kept is taken here."""
        if _inside_own_step(optimizer):
            return
        self._kept = []  # a step that raised leaves what it kept
        store = self._store
        if store is None:
            return
        if self._seen != store.version:
            self._seen, self._ready = store.version, {}
        closure = any(value is not None for value in (*args[1:], *kwargs.values()))
        bound = [(p, sides) for p in _names.grouped(optimizer.param_groups) if (sides := self._sides(store, p))]
        self._kept = [self._keep(p, sides) for p, sides in bound if closure or p.grad is not None]

    def _sides(self, store: _subspace.Store, p: Tensor) -> _subspace.Prepared | None:
        if p in self._ready:
            found = self._ready[p]
            if found is None or not _subspace.outdated(found, p):
                return None if found is None else found[0]
        name, keys = self._names.get(p), set(store.keys())
        if name is None and keys:
            raise SubspaceMismatchError(
                f"a parameter of shape {tuple(p.shape)} has no name: call `bind(model)` after editing the groups"
                + (f". If an engine put it there: {_shards.FLATTENED}" if p.ndim == 1 else "")
            )
        found = self._ready[p] = _subspace.ready(name, p, store.sides(name)) if name in keys and name else None
        return None if found is None else found[0]

    def _keep(self, p: Tensor, sides: _subspace.Prepared) -> _Kept:
        here = _shards.local(p)
        left, (basis, form, identity, _) = sides
        plain = left[1] == NONE and form == BASIS and identity == 1.0 and here.is_contiguous()
        # 8 r bytes a row against 4 d: products of rounded numbers cancel, so they are made and kept in float64.
        # A 16-bit basis has to be applied twice, which these products do once.
        fits = basis is not None and basis.dtype == here.dtype and basis.dtype.itemsize > 2
        if self._low_memory and plain and fits and basis is not None and _thin(basis):
            return _Kept(here, _products(here, basis), sides, products=True)
        return _Kept(here, here.detach().clone(memory_format=torch.preserve_format), sides, products=False)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _inside_own_step(optimizer):
            return
        kept, self._kept = self._kept, []
        try:
            for entry in kept:
                _project(entry)
        except Exception:  # out of memory: then the step has not happened
            for entry in kept:
                if not entry.products:
                    entry.parameter.copy_(entry.before)
            raise


def _thin(basis: Tensor) -> bool:
    return 4 * basis.shape[-1] <= basis.shape[-2]


def _project(kept: _Kept) -> None:
    """-0.0 + 0.0 would lose the sign: what was not moved keeps its bits."""
    p, before, sides, products = kept
    if products:
        basis, _, _, span = sides[1]
        if basis is not None:
            change = _products(p, basis).sub_(before).mul_(-span).to(p.dtype)
            rows = p.view(-1, basis.shape[-2])
            for part, moved in zip(_blocks(rows), _blocks(rows, change)):
                added = moved @ basis.mT
                part.copy_(torch.where(added == 0, part, part + added))
        return
    work = torch.promote_types(p.dtype, torch.float32)
    update = project_sides(p.to(work) - before.to(work), sides)
    p.copy_(torch.where(update == 0, before.to(work), before.to(work) + update))


def _products(p: Tensor, basis: Tensor) -> Tensor:
    """p V in float64, a block of rows at a time."""
    rows = p.detach().view(-1, basis.shape[-2])
    v = basis.double()
    result = torch.empty(rows.shape[0], v.shape[1], dtype=torch.float64, device=p.device)
    for part, products in zip(_blocks(rows), _blocks(rows, result)):
        torch.mm(part.double(), v, out=products)
    return result


def _blocks(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """`rows`, or what goes with them, in pieces of at most `_BLOCK` elements of `rows`."""
    parts: tuple[Tensor, ...] = (rows if like is None else like).split(max(1, _BLOCK // max(1, rows.shape[1])))
    return parts


def _inside_own_step(optimizer: Optimizer) -> bool:
    """Whether this hook belongs to a step inside another step of `optimizer`: a subclass that calls its parent's
    `step()` makes torch fire every hook twice."""
    if torch.compiler.is_compiling():
        return False
    code = getattr(type(optimizer).step, "__code__", None)
    frame, running = inspect.currentframe(), 0
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("args", (None,))[0] is optimizer:
            running += 1
        frame = frame.f_back
    return running > 1


def project_updates(
    optimizer: Optimizer,
    store: Any = None,
    *,
    model: nn.Module | None = None,
    strict: bool = True,
    low_memory: bool = False,
) -> ProjectedUpdates:
    """Make any torch optimizer a projected one: after each step, p <- p0 + P_left (p - p0) P_right.

    Works through torch's step hooks, so it includes whatever the step did, decay too. `store` is keyed by the names
    the optimizer was given (`named_parameters()`), else by those of `model`. Returns a handle to change the store
    between tasks and to remove the projection.

    Keeps a copy of the projected parameters that have a gradient, during the step. `low_memory` keeps 8 r bytes a row
    in its place (p0 V in float64) where the projector is I - b V V^T on the right side alone and r <= d / 4; it
    multiplies in float64, which some GPUs do slowly. `ProjectedAdam` needs neither.

    What does not fit is found before the optimizer's step, which then does not happen; whatever fails later puts the
    projected parameters back (not with `low_memory`). An optimizer that calls its parent's `step()` is projected once.
    torch's copies of an optimizer (`deepcopy`, pickle) lose all hooks: call this again on the copy.

    Raises `SubspaceMismatchError` for names and sizes, `ValueError` for an optimizer that is projected already.
    """
    handle = ProjectedUpdates(optimizer, low_memory=low_memory)
    try:
        if model is not None:
            handle.bind(model)
        handle.set_subspace(store, strict=strict)
    except Exception:
        handle.remove()
        raise
    return handle
