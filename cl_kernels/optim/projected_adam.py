"""Adam and AdamW whose updates are projected after the moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_kernels.ops.projection import step_
from cl_kernels.optim import _shards
from cl_kernels.optim._adam import ADAM, AdamTwin, Betas
from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.optim._subspace import Prepared

__all__ = ["ProjectedAdam", "ProjectedAdamW"]


class ProjectedAdam(AdamTwin, ProjectedOptimizer):
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
        given = locals()
        defaults = {name: given[name] for name in (*ADAM, "decoupled_weight_decay", "project_decay")}
        super().__init__(params, defaults, subspace, nonfinite)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("project_decay", True)

    def _checked_lists(
        self, group: dict[str, Any], params: list[Tensor], bonds: list[Prepared], on_device: bool
    ) -> tuple[list[Tensor], ...]:
        """The parameters and what belongs to them, as the kernels take them: local shards."""
        lists = (params, *self._twin_lists(group, params, on_device))
        if any(map(_shards.is_sharded, params)):
            return tuple(map(_shards.all_local, lists))
        return lists

    def _bound(
        self,
        group: dict[str, Any],
        lists: tuple[list[Tensor], ...],
        bonds: list[Prepared],
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        params, grads, first, second, largest, steps = lists
        step_(
            params, grads, first, second, steps, bonds,
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
