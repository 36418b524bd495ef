"""What an optimizer needs from a subspace store: the projectors of a tensor, checked once and kept ready."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_kernels.errors import SubspaceError, SubspaceMismatchError
from cl_kernels.ops._projector import Projector, Sides
from cl_kernels.ops.projection import BASIS, DENSE, NONE, Side, matrix_shape, side_of
from cl_kernels.optim import _shards
from cl_kernels.subspace import SubspaceStore

__all__ = [
    "Prepared",
    "Ready",
    "Store",
    "as_store",
    "embedded",
    "leak",
    "outdated",
    "prepare",
    "ready",
    "shared_memory",
    "tensors_of",
]

Prepared = tuple[Side, Side]
Ready = tuple[Prepared, torch.device, torch.dtype, torch.Size]
_ORTHONORMAL = 1e-5  # largest entry of V^T V - I; float32 solvers reach 1e-6, half of that is rounding of V itself


class Store(Protocol):
    """What of `SubspaceStore` an optimizer uses."""

    version: int

    def keys(self) -> Iterable[str]: ...

    def sides(self, name: str) -> Sides: ...

    def fingerprint(self, name: str) -> str: ...


def as_store(value: Any) -> Store | None:
    """`value` as a store: a `SubspaceStore`, anything like it, or a mapping of names to projectors, as it is now."""
    if value is None or all(hasattr(value, name) for name in ("keys", "sides", "fingerprint", "version")):
        return value  # type: ignore[no-any-return]  # checked by its attributes
    if isinstance(value, Mapping):
        return SubspaceStore(value)
    kind = type(value).__name__
    raise TypeError(f"subspace: expected a SubspaceStore or a mapping of names to projectors, got {kind}")


def prepare(name: str, parameter: Tensor, sides: Sides) -> Prepared | None:
    """The projectors of `parameter` in the form, dtype and layout of the step; None where both sides do nothing.

    Raises `SubspaceMismatchError` for sizes and for shards that the projectors mix, `RuntimeError` for devices,
    `SubspaceError` for a basis that is not orthonormal.
    """
    if parameter.is_complex():
        raise RuntimeError(f"{name}: complex parameters cannot be projected")
    sizes = [None if side is None else side.dim for side in sides]
    if matrix_shape(parameter.shape, *sizes) is None:
        why = _shards.flattened((), parameter, *sizes)
        raise SubspaceMismatchError(
            f"{name}: projectors of sizes {sizes[0]} (left) and {sizes[1]} (right) do not fit {tuple(parameter.shape)}"
            + (f". {why}" if why else "")
        )
    _shards.check_placements(name, parameter, *sizes)
    left, right = (_side(name, parameter, side) for side in sides)
    return None if left[1] == right[1] == NONE else (left, right)


def ready(name: str, parameter: Tensor, sides: Sides) -> Ready | None:
    """`prepare`, with what it depends on of the parameter."""
    prepared = prepare(name, parameter, sides)
    return None if prepared is None else (prepared, parameter.device, parameter.dtype, parameter.shape)


def outdated(entry: Ready, parameter: Tensor) -> bool:
    """Whether the model was moved, converted or resized since `ready`: then it has to be called again."""
    return parameter.shape != entry[3] or parameter.dtype != entry[2] or parameter.device != entry[1]


def shared_memory(named: Mapping[str, Tensor]) -> None:
    """Raise `SubspaceMismatchError` where two parameters start at the same place in memory: each would be stepped."""
    first: dict[tuple[torch.device, int], str] = {}
    for name, parameter in named.items():
        here = _shards.local(parameter)
        if here.device.type == "meta" or not here.numel():
            continue
        other = first.setdefault((here.device, here.data_ptr()), name)
        if other != name:
            raise SubspaceMismatchError(
                f"{other} and {name} share their memory: give the optimizer one of them, or tie the parameters "
                "themselves (`b.weight = a.weight`)"
            )


def _side(name: str, parameter: Tensor, projector: Projector | None) -> Side:
    matrix, form, identity, span = side_of(name, projector)
    if matrix is None:
        return matrix, form, identity, span
    if matrix.device != parameter.device:
        raise RuntimeError(
            f"{name}: the parameter is on {parameter.device} but its projector on {matrix.device}; "
            f"move the store first, `store.to({str(parameter.device)!r})`"
        )
    identity, span = float(identity), float(span)
    if form == BASIS:
        _orthonormal(name, matrix)
        if (matrix.shape[-1] == 0 or span == 0.0) and identity == 1.0:
            return side_of(name, None)
    # A 16-bit basis stays 16-bit, half the memory: the step applies it twice, since it is orthonormal to three digits.
    short = form == BASIS and matrix.dtype.itemsize == 2
    ready = matrix.detach().to(matrix.dtype if short else torch.promote_types(parameter.dtype, torch.float32))
    # Column-major, as LAPACK returns it: both products of a few rows then run along contiguous memory.
    return (ready.contiguous() if form == DENSE else ready.mT.contiguous().mT), form, identity, span


def _orthonormal(name: str, basis: Tensor) -> None:
    v = basis.detach().to(torch.promote_types(basis.dtype, torch.float32))
    gram = v.mT @ v
    wanted = torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) != 0).to(gram))  # columns of zeros are padding
    error = float((gram - wanted).abs().max()) if gram.numel() else 0.0
    limit = _ORTHONORMAL if basis.dtype in (torch.float32, torch.float64) else 2e-2
    if not error <= limit:
        raise SubspaceError(f"{name}: basis is not orthonormal, max |V^T V - I| = {error:.3g} (allowed {limit:g})")


def leak(change: Tensor, sides: Sides) -> float:
    """The largest share, over both sides, of `change` that lies in the directions its projectors suppress most."""
    sizes = [None if side is None else side.dim for side in sides]
    shape = matrix_shape(change.shape, *sizes)
    if shape is None:
        raise SubspaceMismatchError(f"projectors of sizes {sizes} do not fit shape {tuple(change.shape)}")
    x = change.double().reshape(shape)
    norm = float(x.norm())
    parts = [0.0 if side is None else _suppressed(y, side) for side, y in zip(sides, (x.mT, x), strict=True)]
    return max(parts) / norm if norm else 0.0


def _suppressed(x: Tensor, side: Projector) -> float:
    if side.dense is not None:
        values, vectors = torch.linalg.eigh(side.dense.double())
        low = values.abs() < 0.5 * values.abs().amax(-1, keepdim=True)
        return float((x @ (vectors * low[..., None, :])).norm())
    v, span = side.basis.double(), torch.as_tensor(side.span).double()
    inside = x @ v
    kept = x - inside @ v.mT  # a negative span keeps the span of V: what it suppresses lies outside
    return float(torch.where(span > 0, inside.norm(), torch.where(span < 0, kept.norm(), 0.0)).max())


def tensors_of(store: Store) -> dict[str, list[dict[str, Any] | None]]:
    """The projectors as plain dictionaries of tensors and numbers, loadable with `weights_only=True`."""
    return {name: [None if s is None else dict(s._asdict()) for s in store.sides(name)] for name in store.keys()}  # noqa: SIM118 - a Protocol, not a dict


def embedded(values: Mapping[str, Any], devices: Mapping[str, torch.device]) -> Store:
    """The inverse of `tensors_of`, on the devices of the parameters."""
    cpu = torch.device("cpu")
    sides = {
        name: Sides(*(None if s is None else Projector(**s).to(devices.get(name, cpu)) for s in pair))
        for name, pair in values.items()
    }
    return SubspaceStore(sides)
