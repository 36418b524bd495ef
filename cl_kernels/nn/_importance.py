"""Which adapted weights matter: sensitivity and its uncertainty, averaged over steps (IPC of LoRAC-IPC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cl_kernels.nn._lora_linear import LoRALinear, Watcher

__all__ = ["Importance"]


class Importance:
    """Running statistics of every adapted weight W = W_0 + dW over backward passes.

        I_k = mean |W * dL/dW|        J_k = b1 J_{k-1} + (1 - b1) I_k        U_k = b2 U_{k-1} + (1 - b2) |I_k - J_k|

    and the score is J U (the product form of AdaLoRA and PLATON; zero start, no bias correction). The gradient of one
    weight exists only while it is reduced to a number: no more than one dense dW at a time, and nothing waits for the
    device. One backward pass is one step; under gradient accumulation each pass counts.
    Source: LoRAC-IPC, method-lora-composition.md 5.
    """

    def __init__(self, names: Iterable[str], beta1: float, beta2: float) -> None:
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"Invalid {name} value: {value} (expected 0 <= {name} < 1)")
        self.beta1, self.beta2 = beta1, beta2
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        self._names = list(names)

    def watcher(self, layer_name: str) -> Watcher:
        """What a layer calls in its backward pass."""

        @torch.no_grad()
        def watch(layer: LoRALinear, x: Tensor, grad: Tensor) -> None:
            flat = grad.reshape(-1, grad.shape[-1])
            rows = x.reshape(-1, x.shape[-1]).to(flat.dtype)  # under autocast x may be wider than what it was made to
            for part, adapters in layer.named_adapters():
                if not adapters.frozen:
                    where, name = layer.slices[part], layer.place(layer_name, part)
                    weight = layer.base.weight[where] + adapters.delta().mT
                    self.update(name, (weight * (flat[:, where].mT @ rows)).abs_().mean())

        return watch

    @torch.no_grad()
    def update(self, name: str, sensitivity: Tensor) -> None:
        """One step of `name` with I_k = `sensitivity`, a 0-d tensor."""
        wide = sensitivity.detach().double()
        mean = self._mean.get(name, torch.zeros_like(wide)) * self.beta1 + (1 - self.beta1) * wide
        spread = self._spread.get(name, torch.zeros_like(wide)) * self.beta2 + (1 - self.beta2) * (wide - mean).abs()
        self._mean[name], self._spread[name] = mean, spread

    def scores(self) -> dict[str, float]:
        """Score of every position, 0 for one that no backward pass reached. Waits for the device, once."""
        seen = [name for name in self._names if name in self._mean]
        if not seen:
            return dict.fromkeys(self._names, 0.0)
        values = torch.stack([self._mean[name] * self._spread[name] for name in seen]).tolist()
        return dict.fromkeys(self._names, 0.0) | dict(zip(seen, values))

    def state_dict(self) -> dict[str, Tensor]:
        """Both averages by position."""
        return {f"{name}/mean": value for name, value in self._mean.items()} | {
            f"{name}/spread": value for name, value in self._spread.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        for key, value in state.items():
            name, _, what = key.rpartition("/")
            (self._mean if what == "mean" else self._spread)[name] = value.clone()
