"""What is checked before the first write of a step: NaN and infinity, and that memory is as the kernels take it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_kernels.optim import _shards

__all__ = ["check_memory", "check_state", "found_nonfinite", "known_bad"]


def check_memory(name: str, parameter: Tensor, tensors: Iterable[Tensor]) -> None:
    """Raise unless gradient and moments lie as their parameter does: kernels that get addresses cannot tell.

    `ValueError` for another shape, `RuntimeError` for another device.
    """
    shape, on_cpu = parameter.shape, parameter.is_cpu  # a comparison of devices takes 95 ns, this 35
    for tensor in tensors:
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: the parameter has shape {tuple(shape)}, its gradient or moment {tuple(tensor.shape)}; after "
                "a parameter was resized call `bind(model)`, or delete its state"
            )
        if tensor.is_cpu != on_cpu or not (on_cpu or tensor.device == parameter.device):
            raise RuntimeError(
                f"{name}: the parameter is on {parameter.device}, its gradient or moment on {tensor.device}; move the "
                "model before the optimizer is made, or load its state again"
            )


def check_state(names: Mapping[Tensor, str], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise `ValueError` for moments of another shape than their parameter's: torch finds that in the next step."""
    for parameter, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in ("step", "radius", "fired") and value.shape != parameter.shape:
                raise ValueError(
                    f"{names.get(parameter, 'a parameter')} has shape {tuple(parameter.shape)}, but its {key} in the "
                    f"state {tuple(value.shape)}"
                )


def found_nonfinite(
    grads: list[Tensor | None], found: Tensor | None, skipped: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(1.0 if any gradient holds NaN or infinity else 0.0, the count of such steps), without a word to the host.

    Where gradients are sharded, all processes agree.
    """
    given = [grad for grad in grads if grad is not None]
    if not given:
        return found, skipped
    device = given[0].device
    present = [grad for grad in _shards.all_local(given) if grad.numel()] or [torch.zeros(1, device=device)]
    norms = torch._foreach_norm(present, float("inf"))
    total = torch.stack([norm.float().to(device) for norm in norms])
    bad = _shards.agree((~torch.isfinite(total).all()).float(), given)
    if found is not None:
        bad = torch.maximum(bad, found.to(device))
    return bad, bad if skipped is None else skipped.to(device) + bad


def known_bad(found: Any) -> bool:
    """Whether the host may know that the step is left out. A scaler that met no gradient hands over a plain 0."""
    return isinstance(found, Tensor) and found.device.type == "cpu" and bool(found)
