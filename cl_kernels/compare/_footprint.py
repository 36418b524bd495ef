"""How much memory a training step takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Footprint"]


class Footprint:
    """Peak bytes of training. CUDA: the most that torch's allocator had given out. CPU, where a process keeps what it
    once had: weights, gradients, optimizer state, and what the first forward pass kept for its backward pass."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._kept: dict[int, int] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one forward pass: count the memory of tensors that autograd keeps, each piece once."""
        weights = set(_storages(self._weights()))

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self._kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def peak(self, optimizer: Optimizer | None) -> int:
        """Bytes, after at least one step."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
        weights = self._weights()
        held = _storages([*weights, *(weight.grad for weight in weights), *states])
        return sum(self._kept.values()) + sum(held.values())

    def _weights(self) -> list[Tensor]:
        return [value for module in self._modules for value in (*module.parameters(), *module.buffers())]


def _storages(values: list[Any]) -> dict[int, int]:
    """Bytes by address, so that views and tied weights count once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
