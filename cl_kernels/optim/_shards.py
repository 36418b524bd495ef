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

__all__ = [
    "agree",
    "all_local",
    "by_mesh",
    "check_placements",
    "flattened",
    "is_sharded",
    "like",
    "local",
    "offset",
    "rows",
    "shard_groups",
    "summed",
    "version",
    "whole",
]

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


def version(tensor: Tensor) -> int:
    """A count that grows with every write in place, but through `.data`; of a DTensor those through itself as well."""
    return tensor._version + (local(tensor)._version if is_sharded(tensor) else 0)


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


def rows(name: str, parameter: Tensor) -> slice | None:
    """The rows of a DTensor's first dimension that this process holds; None where it holds all, or of a plain tensor.

    Raises `SubspaceMismatchError` for placements that cut rows: their norms would be those of pieces.
    """
    if not is_sharded(parameter):
        return None
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    here: Sequence[int] = mesh.get_coordinate()
    start, stop = 0, parameter.shape[0] if parameter.ndim else 1
    cut = False
    for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        if type(placement).__name__ != "Shard" or placement.dim % max(parameter.ndim, 1) != 0:
            raise SubspaceMismatchError(
                f"{name}: {tuple(parameter.shape)} is placed {placement}, which cuts rows or interleaves them; only "
                "shards of whole rows (dimension 0), as `fully_shard` makes them, can be held to an anchor"
            )
        size = -(-(stop - start) // mesh.size(axis))  # as torch.chunk cuts: the last shards may be short or empty
        first = min(start + here[axis] * size, stop)
        start, stop = first, min(first + size, stop)
        cut = True
    return slice(start, stop) if cut else None


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


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """`shard` as a DTensor placed as the parameter is; of a plain parameter as it is."""
    kind = _dtensor()
    if kind is None or not isinstance(parameter, kind):
        return shard
    made: Tensor = kind.from_local(  # type: ignore[attr-defined]
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,  # type: ignore[attr-defined]
        stride=parameter.stride(),
    )  # fmt: skip
    return made


def shard_groups(parameter: Tensor) -> list[Any]:
    """The process groups over which the parameter is cut, one for each axis of its mesh that cuts it."""
    if not is_sharded(parameter):
        return []
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    placements = enumerate(parameter.placements)  # type: ignore[attr-defined]
    return [mesh.get_group(axis) for axis, placement in placements if placement.is_shard() and mesh.size(axis) > 1]


def by_mesh(parameters: Sequence[Tensor]) -> list[tuple[list[Any], list[int]]]:
    """(process groups, places in the list) of the parameters that are cut, together where the groups are the same."""
    meshes: dict[tuple[int, ...], tuple[list[Any], list[int]]] = {}
    for i, parameter in enumerate(parameters):
        if groups := shard_groups(parameter):
            meshes.setdefault(tuple(map(id, groups)), (groups, []))[1].append(i)
    return list(meshes.values())


def summed(values: Tensor, parameters: Sequence[Tensor], largest: bool = False) -> Tensor:
    """`values` [L, ...], one entry a parameter, added up over the processes that hold its shards; or the `largest`.

    One call for each mesh; every process of it must take part.
    """
    how = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    values = values.clone()
    for groups, entries in by_mesh(parameters):
        part = values[entries]
        for group in groups:
            torch.distributed.all_reduce(part, how, group=group)
        values[entries] = part
    return values


def offset(parameter: Tensor) -> int:
    """The place of this process's first element in the whole parameter."""
    here = rows("", parameter)
    return 0 if here is None else int(here.start) * (parameter.numel() // max(parameter.shape[0], 1))


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
