"""Names of parameters, the keys of a subspace store: without wrapper prefixes, found again after edits from outside."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from cl_kernels.subspace._names import plain_name

__all__ = ["few", "grouped", "named", "plain_name", "rebind", "settle"]


def named(model: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Names by parameter, of a module or of what `named_parameters()` gave."""
    pairs = model.named_parameters() if isinstance(model, nn.Module) else model
    return {parameter: plain_name(name) for name, parameter in pairs}


def few(names: Iterable[str]) -> str:
    """Up to five names, and how many more."""
    found = sorted(names)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def grouped(param_groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Every parameter of the optimizer, read anew: toolboxes edit the groups at any time."""
    settle(param_groups)
    for group in param_groups:
        yield from group["params"]


def settle(param_groups: list[dict[str, Any]]) -> None:
    """Make lists of what others put into groups: PILOT puts a generator there, which can be read once."""
    for group in param_groups:
        if not isinstance(group["params"], (list, tuple)):
            group["params"] = list(group["params"])


def rebind(
    old: dict[Tensor, str], new: dict[Tensor, str], param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
) -> dict[Tensor, str]:
    """Names after the model or the groups changed; state follows a name to its new tensor unless that was resized."""
    present = set(grouped(param_groups))
    by_name = {name: parameter for parameter, name in old.items()}
    for parameter, name in new.items():
        before = by_name.get(name)
        if before is None or before is parameter or before in present or not state.get(before):
            continue
        kept = state.pop(before)
        if before.shape != parameter.shape:
            warnings.warn(
                f"{name}: resized from {tuple(before.shape)} to {tuple(parameter.shape)}, its optimizer state is reset",
                stacklevel=3,
            )
        elif parameter in present and not state.get(parameter):
            state[parameter] = kept
    names = {parameter: name for parameter, name in old.items() if parameter in present and parameter not in new}
    names |= new
    for group in param_groups:
        if "param_names" in group and all(parameter in names for parameter in group["params"]):
            group["param_names"] = [names[parameter] for parameter in group["params"]]
    return names
