"""AdamW with a pull towards anchors: what SPD and L2-SP share."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cl_kernels.optim import _gradients, _names, _shards
from cl_kernels.optim._adam import AdamTwin, Betas
from cl_kernels.optim._anchored import AnchoredOptimizer, Anchors, Exclude, Held
from cl_kernels.optim._anchors import DEFAULT_EXCLUDE

__all__ = ["PulledAdamW"]


class PulledAdamW(AnchoredOptimizer, AdamTwin):
    """torch's AdamW step on every parameter, and `strength` of a subclass's pull on those that are not excluded.

    How often the pull acted is counted on the device, in `state[p]["fired"]`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        strength: float,
        anchors: Anchors = "init",
        exclude: Exclude = DEFAULT_EXCLUDE,
        anchor_dtype: torch.dtype | str | None = None,
        nonfinite: str = "propagate",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "strength": strength,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
            **own,
        }
        super().__init__(params, defaults, anchors, exclude, anchor_dtype, nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0.0 <= group["strength"] < math.inf:
            raise ValueError(f"Invalid strength value: {group['strength']} (expected a number from 0)")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._left_out = {}
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
            for key in {"strength", "coupled"} & self.defaults.keys():  # a state of torch's AdamW does not say
                group.setdefault(key, self.defaults[key])

    # -- counting -----------------------------------------------------------------------------------------------------

    def fired(self) -> dict[str, int]:
        """By name, in how many steps the pull acted; one transfer from the device."""
        return {name: int(count) for name, (count, _) in self._counts().items()}

    def fire_rate(self) -> dict[str, float]:
        """`fired()` as a share of the parameter's steps: 0 throughout means that the pull does nothing."""
        return {name: count / max(steps, 1) for name, (count, steps) in self._counts().items()}

    def _counts(self) -> dict[str, tuple[float, float]]:
        labels, pairs = self._labels(), {}
        for p, _ in self._present():
            state = self.state.get(p) or {}
            if "step" in state:
                step = state["step"].to(p.device)
                pairs[labels[p]] = torch.stack([state.get("fired", torch.zeros_like(step)), step])
        found = list(pairs.values())
        values = torch.stack([pair.to(found[0].device) for pair in found]).tolist() if found else []
        return {name: (count, steps) for name, (count, steps) in zip(pairs, values, strict=True)}

    # -- a step -------------------------------------------------------------------------------------------------------

    def _pulled(
        self, group: dict[str, Any], lists: Any, bonds: list[Held], scale: Tensor | None, found: Tensor | None
    ) -> None:
        """The step of bound parameters, all on one device."""
        raise NotImplementedError

    def _bound(
        self, group: dict[str, Any], lists: Any, bonds: list[Held], scale: Tensor | None, found: Tensor | None
    ) -> None:
        places: dict[torch.device, list[int]] = {}  # a model may be spread over several
        for i, p in enumerate(lists[0]):
            places.setdefault(p.device, []).append(i)
        for which in places.values():
            part = lists if len(places) == 1 else tuple([field[i] for i in which] if field else [] for field in lists)
            self._pulled(group, part, [bonds[i] for i in which], scale, found)

    def _checked_lists(
        self, group: dict[str, Any], params: list[Tensor], bonds: list[Any], on_device: bool
    ) -> tuple[list[Tensor], ...]:
        """The parameters, sharded or not, their counts, and what torch's step takes."""
        grads, first, second, largest, steps = self._lists(group, params, on_device)
        for i, p in enumerate(params):
            _gradients.check_memory(self._names.get(p, ""), p, (grads[i], first[i], second[i], *largest[i : i + 1]))
        for p in params:
            if "fired" not in self.state[p]:
                self.state[p]["fired"] = torch.zeros((), dtype=torch.float32, device=p.device)
        local = [_shards.all_local(values) for values in (params, grads, first, second, largest, steps)]
        return params, [self.state[p]["fired"] for p in params], *local

    def _loaded(self, state_dict: dict[str, Any], before: dict[Tensor, Held]) -> None:
        super()._loaded(state_dict, before)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(ids, _names.grouped(self.param_groups), strict=True):
            saved = state_dict["state"].get(index, {}).get("fired")
            if saved is not None:  # torch has cast it to the parameter's type, which may not count beyond 256
                self.state[p]["fired"] = saved.detach().to(p.device, torch.float32, copy=True)
