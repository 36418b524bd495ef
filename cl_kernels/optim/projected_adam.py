"""Adam and AdamW whose updates are projected after the moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from cl_kernels.ops.projection import step_
from cl_kernels.optim import _gradients, _shards
from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim._subspace import Prepared

__all__ = ["ProjectedAdam", "ProjectedAdamW"]

Betas = tuple[float | Tensor, float | Tensor]


class ProjectedAdam(ProjectedOptimizer):
    """`torch.optim.Adam` with each update projected after the moments: p <- p + P_left u P_right.

    u is the complete Adam update, weight decay (and decoupled decay) included; moments see raw gradients. Projecting
    the gradient before Adam, as tensor hooks do, leaves a third of the step inside the protected space.

    `params`: tensors, groups, or `model.named_parameters()`; names are needed once `subspace` is given, and go without
    the prefixes of DDP and torch.compile. `subspace` is a `SubspaceStore` or a dictionary of projectors by name; it is
    referenced, never copied. Without one, and for parameters it does not name, this is torch's own Adam, bit for bit
    with the same flags. `nonfinite="skip"` leaves out a whole step in which any gradient is NaN or infinite (see
    `skipped_steps`); on CUDA it decides on the device and uses torch's fused kernels for the free parameters.
    `project_decay=False` applies decoupled decay unprojected. 16-bit parameters lose updates below half a unit in the
    last place, as in torch: keep them in float32 and use autocast. With `eps=0` a projected parameter whose first
    moment is 0 stays where it is. Where no parameter has a gradient a step does nothing, but a `GradScaler` stops with
    "No inf checks were recorded": nothing of this optimizer was reached by the loss.

    Raises `ValueError` for hyper-parameters, and what `set_subspace` raises. Cost: torch's, plus 4 m d r operations a
    projected parameter. Source: NSP2 (method-null-space 6), Adam-NSCL.
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
        decoupled_weight_decay: bool = False,
        subspace: Any = None,
        nonfinite: str = "propagate",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        project_decay: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "project_decay": project_decay,
        }
        super().__init__(params, defaults, subspace, nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("capturable", False)
            group.setdefault("decoupled_weight_decay", False)
            group.setdefault("project_decay", True)

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
            (group, self._bound_lists(group, bound, found_inf is not None), sides)
            for group, _, bound, sides in plans
            if bound
        ]
        for group, free, _, _ in plans:
            if free:
                self._free(group, free, scale, found_inf)
        for group, lists, sides in calls:
            self._bound(group, lists, sides, scale, found_inf)
        return loss

    def _sorted(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Prepared]]:
        """Parameters with a gradient: those that train freely, and those projected, with their projectors."""
        free: list[Tensor] = []
        bound: list[Tensor] = []
        sides: list[Prepared] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            prepared = self._prepared(p)
            if prepared is None:
                free.append(p)
            else:
                bound.append(p)
                sides.append(prepared)
        first = free or bound
        if first and first[0].is_cuda and not group["capturable"] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is being captured, but a parameter group has capturable=False")
        return free, bound, sides

    def _lists(self, group: dict[str, Any], params: list[Tensor], on_device: bool) -> tuple[list[Tensor], ...]:
        """Gradients, moments, largest second moments and steps, made where there are none (an empty dictionary is no
        state: Avalanche leaves one)."""
        grads: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        largest: list[Tensor] = []
        steps: list[Tensor] = []
        amsgrad = group["amsgrad"]
        on_device = on_device or group["capturable"] or bool(group["fused"])
        for p in params:
            state = self.state[p]
            if not state:  # all of it or nothing: memory may end in between
                new = [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2)]
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = new
            if amsgrad:
                if "max_exp_avg_sq" not in state:
                    state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                largest.append(state["max_exp_avg_sq"])
            if on_device and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)
            grads.append(p.grad)  # type: ignore[arg-type]  # _sorted left out those without
            first.append(state["exp_avg"])
            second.append(state["exp_avg_sq"])
            steps.append(state["step"])
        return grads, first, second, largest, steps

    def _free(self, group: dict[str, Any], params: list[Tensor], scale: Tensor | None, found: Tensor | None) -> None:
        """torch's own functional Adam, so that it is torch's own Adam."""
        on_device = self._nonfinite == "skip" and params[0].is_cuda
        beta1, beta2 = group["betas"]
        grads, first, second, largest, steps = self._lists(group, params, on_device)
        fused = True if on_device else group["fused"]
        adam(
            params, grads, first, second, largest, steps,
            foreach=None if on_device else group["foreach"],
            capturable=group["capturable"],
            fused=fused,
            grad_scale=scale if fused else None,
            found_inf=found if fused else None,
            has_complex=any(torch.is_complex(p) for p in params),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip

    def _bound_lists(self, group: dict[str, Any], params: list[Tensor], on_device: bool) -> tuple[list[Tensor], ...]:
        """As `_lists`, with the parameters in front, checked, and all as the kernels take them: local shards."""
        grads, first, second, largest, steps = self._lists(group, params, on_device)
        for i, p in enumerate(params):
            _gradients.check_memory(self._names.get(p, ""), p, (grads[i], first[i], second[i], *largest[i : i + 1]))
        lists = (params, grads, first, second, largest, steps)
        if any(map(_shards.is_sharded, params)):
            return tuple(map(_shards.all_local, lists))
        return lists

    def _bound(
        self,
        group: dict[str, Any],
        lists: tuple[list[Tensor], ...],
        sides: list[Prepared],
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        params, grads, first, second, largest, steps = lists
        step_(
            params, grads, first, second, steps, sides,
            lr=_shards.local(group["lr"]), max_exp_avg_sqs=largest, beta1=float(beta1), beta2=float(beta2),
            eps=group["eps"], weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"], maximize=group["maximize"],
            grad_scale=_shards.local(scale), found_inf=_shards.local(found), project_decay=group["project_decay"],
        )  # fmt: skip


class ProjectedAdamW(ProjectedAdam):
    """`ProjectedAdam` with decoupled weight decay, 1e-2 by default: `torch.optim.AdamW` with projected updates."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        options["decoupled_weight_decay"] = True
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # a state of plain Adam says otherwise
