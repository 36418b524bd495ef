"""What all optimizers of the package share: names, groups, the checks of torch's settings, and skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.optim import _gradients, _names

__all__ = ["NamedOptimizer"]


class NamedOptimizer(Optimizer):
    """A torch optimizer whose parameters have names, and a step in two kinds: torch's own, and one of ours.

    A subclass says by `_prepared` which parameters are bound to something (None: the parameter trains freely) and
    steps them in `_bound`; torch's functional twin steps the free ones in `_free`. Everything that can fail does so in
    `_sorted` and `_checked_lists`, before anything is written.
    """

    _step_supports_amp_scaling = False
    _OWN: tuple[str, ...] = ("_names", "_nonfinite", "_skipped")  # beside torch's own, kept by pickle and deepcopy

    def __init__(self, params: Any, defaults: dict[str, Any], nonfinite: str) -> None:
        if nonfinite not in ("propagate", "skip"):
            raise ValueError(f"Invalid nonfinite value: {nonfinite!r} (expected 'propagate' or 'skip')")
        self._names: dict[Tensor, str] = {}
        self._nonfinite = nonfinite
        self._skipped: Tensor | None = None
        self._check_group(defaults)
        super().__init__(params, defaults)
        if defaults["fused"]:
            self._step_supports_amp_scaling = True

    # -- what subclasses say ------------------------------------------------------------------------------------------

    def _prepared(self, parameter: Tensor) -> Any:
        """What binds a parameter; None where it trains freely."""
        raise NotImplementedError

    def _refuse_sparse(self, bound: bool) -> None:
        """Raise `RuntimeError` for a sparse gradient, of a parameter that is bound or not."""
        raise NotImplementedError

    def _free(self, group: dict[str, Any], params: list[Tensor], scale: Tensor | None, found: Tensor | None) -> None:
        """torch's own functional step."""
        raise NotImplementedError

    def _checked_lists(self, group: dict[str, Any], params: list[Tensor], bonds: list[Any], on_device: bool) -> Any:
        """The states of bound parameters, made where there are none, checked, as `_bound` takes them."""
        raise NotImplementedError

    def _bound(
        self, group: dict[str, Any], lists: Any, bonds: list[Any], scale: Tensor | None, found: Tensor | None
    ) -> None:
        """The step of bound parameters."""
        raise NotImplementedError

    def _present_changed(self) -> None:
        """Names or groups changed: follow them, or raise and change nothing."""

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` recomputes the loss with gradients enabled. A parameter without gradient is left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh()
        plans = [(group, *self._sorted(group)) for group in self.param_groups]  # raises before anything is written
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._nonfinite == "skip":
            found_inf, self._skipped = _gradients.found_nonfinite(
                [p.grad for _, free, bound, _ in plans for p in (*free, *bound)], found_inf, self._skipped
            )
            if _gradients.known_bad(found_inf):
                return loss
        calls = [  # makes and checks all states before anything is written
            (group, self._checked_lists(group, bound, bonds, found_inf is not None), bonds)
            for group, _, bound, bonds in plans
            if bound
        ]
        for group, free, _, _ in plans:
            if free:
                self._free(group, free, scale, found_inf)
        for group, lists, bonds in calls:
            self._bound(group, lists, bonds, scale, found_inf)
        return loss

    def _sorted(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Parameters with a gradient: those that train freely, and those bound, with what binds them."""
        free: list[Tensor] = []
        bound: list[Tensor] = []
        bonds: list[Any] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            prepared = self._prepared(p)
            if grad.layout is not torch.strided:
                self._refuse_sparse(prepared is not None)
            if prepared is None:
                free.append(p)
            else:
                bound.append(p)
                bonds.append(prepared)
        first = free or bound
        if (
            first
            and first[0].is_cuda
            and not group.get("capturable", True)
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError("a CUDA graph is being captured, but a parameter group has capturable=False")
        return free, bound, bonds

    def skipped_steps(self) -> int:
        """How many steps `nonfinite="skip"` has left out. Reads one number from the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def _refresh(self) -> None:
        """Before a step: follow changes of the groups."""
        _names.settle(self.param_groups)

    # -- names and groups ---------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Read the parameters' names anew, after a toolbox replaced parameters or edited `param_groups`.

        State follows a name to its new tensor; a resized parameter loses its state, with a warning. Raises
        `SubspaceMismatchError` for what no longer fits, and then changes nothing.
        """
        named, state = _names.named(model), self.state.copy()
        before = (self._names, [group.get("param_names") for group in self.param_groups])
        try:
            self._names = _names.rebind(self._names, named, self.param_groups, self.state)
            self._present_changed()
        except Exception:
            self._names, self.state = before[0], state
            for group, names in zip(self.param_groups, before[1], strict=True):
                if names is not None:
                    group["param_names"] = names
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, also where a group holds a generator."""
        _names.settle(self.param_groups)
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's settings are checked, and it is refused unnamed where names are needed."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names, before = group.get("param_names"), dict(self._names)
        if names is not None:
            self._names.update(zip(group["params"], map(_names.plain_name, names), strict=True))
        try:
            self._check_group(group)
            self._present_changed()
        except Exception:
            self.param_groups.pop()
            self._names = before
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for settings, defaults or a group's, that are out of range; subclasses add their own."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if group["foreach"] and not group.get("capturable", False):
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["differentiable"]:
            raise ValueError("differentiable=True is not supported: a projected step is not recorded by autograd")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    # -- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = (*self._OWN, "_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
