"""Sharded parameters: what of a projection is local to a shard, and what an engine makes impossible.

FSDP2 shards rows. `U P_right` acts on each row alone, so a shard of rows is projected by itself and the result is exact
with no communication; `P_left U` mixes rows, so it is not. Parameters, gradients and moments are DTensors there, and a
kernel takes their local tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.ops.projection import matrix_shape

__all__ = ["agree", "all_local", "check_placements", "flattened", "is_sharded", "local", "whole"]

_FLAT_NAMES = ("_flat_param", "_fsdp_wrapped_module")
FLATTENED = (
    "DeepSpeed ZeRO, torch's FSDP1 and others that flatten parameters leave each process a one-dimensional slice of "
    "several matrices, whose rows and columns cannot be told any more; projecting it would be another algorithm. Use "
    "DDP, or FSDP2 (`torch.distributed.fsdp.fully_shard`), which keeps the rows of a matrix whole"
)


def _dtensor() -> type | None:
    """DTensor where anybody has imported it: without that there is none, and its import takes a tenth of a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Any) -> Any:
    """This process's part of a DTensor, sharing its memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, Tensor) and is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def all_local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, of a DTensor gathered: every process of its mesh must take part."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def check_placements(name: str, parameter: Tensor, left: int | None, right: int | None) -> None:
    """Raise `SubspaceMismatchError` if a projector of size `left` or `right` mixes elements of different shards."""
    if not is_sharded(parameter):
        return
    rows, columns = _dimensions(parameter.shape, left, right)
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        if placement.is_partial():
            raise SubspaceMismatchError(f"{name}: a parameter with placement {placement} has no value to be projected")
        dim = placement.dim % max(parameter.ndim, 1)
        crossed = (
            "left" if left is not None and dim in rows else "right" if right is not None and dim in columns else ""
        )
        if crossed:
            raise SubspaceMismatchError(
                f"{name}: its {crossed} projector mixes what dimension {dim} of {tuple(parameter.shape)} is sharded "
                f"over ({placement}), so each shard alone would be projected wrongly, silently. Right projectors are "
                "exact on shards of rows. Keep a parameter with a left or two-sided projector whole, "
                "`fully_shard(model, ignored_params={model.prompt})`, or leave it out of the subspace"
            )


def _dimensions(shape: Sequence[int], left: int | None, right: int | None) -> tuple[set[int], set[int]]:
    """The dimensions that `matrix_shape` makes rows of, and columns."""
    n = len(shape)
    last_two = left in (None, shape[-2] if n > 1 else 1) and right in (None, shape[-1] if n else 1)
    return ({n - 2}, {n - 1}) if last_two else ({0}, set(range(1, n)))


def flattened(names: Iterable[str], parameter: Tensor | None, left: int | None, right: int | None) -> str:
    """Why a parameter does not fit, if a sharding engine has flattened it; else an empty string."""
    if any(flat in name for name in names for flat in _FLAT_NAMES):
        return FLATTENED
    if parameter is not None and parameter.ndim == 1 and matrix_shape(parameter.shape, left, right) is None:
        return FLATTENED
    return ""


def agree(found: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The largest `found` of all processes that hold shards of `parameters`: they must skip a step together."""
    groups = {}
    for parameter in parameters:
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            groups.update({id(group): group for group in mesh.get_all_groups()})
    for group in groups.values():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return found
