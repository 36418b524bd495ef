"""Covariances in files, so that a run can resume, or tasks collected elsewhere be merged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from cl_kernels._version import __version__
from cl_kernels.errors import CheckpointError, NonFiniteError, SubspaceMismatchError
from cl_kernels.subspace import _files
from cl_kernels.subspace._covariance import Covariance, PromptCovariance, Quartic
from cl_kernels.subspace._names import checked_name

__all__ = ["load_covariances", "save_covariances"]

FORMAT = "cl_kernels.covariances"
VERSION = 1
_WHOLE = "whole"  # the part of a `Covariance`; those of a `PromptCovariance` are "left" and "right"
_NEEDED = {"matrix", "mean", "count", "rows", "centred"}


def save_covariances(path: str | os.PathLike[str], covariances: Mapping[str, Covariance | PromptCovariance]) -> None:
    """Write covariances by name, as `CovarianceCollector.covariances` gives them, to a safetensors file, atomically.

    Keys are ``<name>/<whole|left|right>/<matrix|mean|count|rows|centred|fourth|cubic>``. Raises `ValueError` for a name
    that is none, `NonFiniteError` or `SubspaceMismatchError` for a matrix that is no covariance, `OSError`; the old
    file is untouched then. Cost: the bytes of the matrices, and a copy of them in memory.
    """
    tensors: dict[str, Tensor] = {}
    names = []
    for name, value in covariances.items():
        plain = checked_name(name)
        names.append(plain)
        for which, part in _parts(plain, value).items():
            _check(f"{plain} ({which})", part)
            tensors |= {f"{plain}/{which}/{field}": tensor for field, tensor in _fields(part).items()}
    header = {"library": f"cl_kernels {__version__}", "names": json.dumps(names)}
    _files.save_tensors(path, tensors, kind=FORMAT, version=VERSION, metadata=header)


def load_covariances(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> dict[str, Covariance | PromptCovariance]:
    """Read a file that `save_covariances` wrote; nothing in it is executed. `CheckpointError` for any other file."""
    tensors, header = _files.load_tensors(path, kind=FORMAT, version=VERSION, device=device)
    try:
        groups: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            name, which, field = key.rsplit("/", 2)
            groups.setdefault(name, {}).setdefault(which, {})[field] = tensor
        names = json.loads(header["names"])
        if sorted(names) != sorted(groups):
            raise ValueError(f"it lists {names}, and holds {sorted(groups)}")
        return {name: _read(name, groups[name]) for name in names}
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its contents are not those of saved covariances: {error}") from error


def _parts(name: str, value: Covariance | PromptCovariance) -> dict[str, Covariance]:
    if isinstance(value, PromptCovariance):
        return {"left": value.left, "right": value.right}
    if isinstance(value, Covariance):
        return {_WHOLE: value}
    raise TypeError(f"covariances: expected a Covariance or PromptCovariance for {name}, got {type(value).__name__}")


def _fields(part: Covariance) -> dict[str, Tensor]:
    fields = {
        "matrix": part.matrix,
        "mean": part.mean,
        "count": torch.tensor(part.count, dtype=torch.float64),
        "rows": torch.tensor(part.rows, dtype=torch.int64),
        "centred": torch.tensor(part.centred),
    }
    if part.quartic is not None:
        fields |= {"fourth": torch.tensor(part.quartic.fourth, dtype=torch.float64), "cubic": part.quartic.cubic}
    return fields


def _read(name: str, parts: Mapping[str, Mapping[str, Tensor]]) -> Covariance | PromptCovariance:
    checked_name(name)
    if parts.keys() == {_WHOLE}:
        return _read_part(f"{name} ({_WHOLE})", parts[_WHOLE])
    if parts.keys() == {"left", "right"}:
        return PromptCovariance(*(_read_part(f"{name} ({side})", parts[side]) for side in ("left", "right")))
    raise ValueError(f"{name} has the parts {sorted(parts)}")


def _read_part(label: str, fields: Mapping[str, Tensor]) -> Covariance:
    extra = fields.keys() - _NEEDED
    if not fields.keys() >= _NEEDED or extra not in (set(), {"fourth", "cubic"}):
        raise ValueError(f"{label} has the fields {sorted(fields)}")
    quartic = Quartic(float(fields["fourth"]), fields["cubic"]) if extra else None
    count, rows, centred = float(fields["count"]), int(fields["rows"]), bool(fields["centred"])
    part = Covariance(fields["matrix"], count, fields["mean"], rows, centred, quartic)
    _check(label, part)
    return part


def _check(label: str, part: Covariance) -> None:
    matrix, mean = part.matrix, part.mean
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype not in (torch.float32, torch.float64):
        raise SubspaceMismatchError(
            f"{label}: expected a matrix [d, d] of float32 or float64, got {tuple(matrix.shape)} of {matrix.dtype}"
        )
    vectors = {"mean": mean} | ({} if part.quartic is None else {"cubic": part.quartic.cubic})
    for what, vector in vectors.items():
        if vector.shape != matrix.shape[:1] or not vector.is_floating_point():
            raise SubspaceMismatchError(f"{label}: {what} is {tuple(vector.shape)} of {vector.dtype}")
    finite = [bool(torch.isfinite(x).all()) for x in (matrix, *vectors.values())]
    numbers = [part.count] + ([] if part.quartic is None else [part.quartic.fourth])
    if not all(finite) or not all(0 <= number < float("inf") for number in numbers) or part.rows < 0:
        raise NonFiniteError(f"{label}: its sums are NaN, infinite or, as counts, negative")
    if not torch.equal(matrix, matrix.mT):
        error = float((matrix - matrix.mT).abs().max())
        if error > 1e-6 * float(matrix.abs().max()):
            raise SubspaceMismatchError(f"{label}: the covariance is not symmetric (by up to {error:.3e})")
