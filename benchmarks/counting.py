"""What one step hands out: operations, waits for the device, bytes, kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counter", "count"]


class Counter(TorchDispatchMode):
    """Counts what one step hands to torch: operations that are no views, waits for the device, bytes they move."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in returned):
            return result  # a view
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.waits += 1
        self.operations += 1
        inputs = list(_tensors((args, kwargs or {})))
        specs = zip(args, func._schema.arguments, strict=False)
        # The fused optimizers' schemas say that they write gradients, which they do only with a gradient scale.
        written = [a for a, spec in specs if spec.alias_info is not None and spec.name != "grads"]
        fresh = [] if any(alias is not None for alias in returned) else list(_tensors(result))
        self.moved += sum(t.nbytes for t in [*inputs, *_tensors(written), *fresh])
        return result

    @classmethod
    def of(cls, step: Callable[[], Any]) -> Counter:
        """The counts of a step that has run before."""
        step()
        with cls() as counter:
            step()
        return counter


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def count(step: Callable[[], Any], device: str) -> int:
    """Kernel launches of a step on a GPU; on the CPU, operations that the host hands to torch, views left out."""
    if device != "cuda":
        return Counter.of(step).operations
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())
