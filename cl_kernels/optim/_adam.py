"""The torch side of Adam: its settings, its state, and its own functional step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from cl_kernels.optim import _gradients
from cl_kernels.optim._named import NamedOptimizer

__all__ = ["ADAM", "AdamTwin", "Betas"]

Betas = tuple[float | Tensor, float | Tensor]
ADAM = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
)  # fmt: skip


class AdamTwin(NamedOptimizer):
    """Settings, moments and free parameters exactly as torch's Adam and AdamW have them."""

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

    def _refuse_sparse(self, bound: bool) -> None:
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")

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
        self._twin(group, (params, *self._lists(group, params, on_device)), scale, found)

    def _twin(
        self, group: dict[str, Any], lists: tuple[list[Tensor], ...], scale: Tensor | None, found: Tensor | None
    ) -> None:
        """torch's step on `lists`, as `_checked_lists` gives them."""
        params, grads, first, second, largest, steps = lists
        on_device = self._nonfinite == "skip" and params[0].is_cuda
        beta1, beta2 = group["betas"]
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

    def _twin_lists(self, group: dict[str, Any], params: list[Tensor], on_device: bool) -> tuple[list[Tensor], ...]:
        """As `_lists`, checked: kernels that get addresses cannot tell."""
        lists = self._lists(group, params, on_device)
        grads, first, second, largest, _ = lists
        for i, p in enumerate(params):
            _gradients.check_memory(self._names.get(p, ""), p, (grads[i], first[i], second[i], *largest[i : i + 1]))
        return lists
