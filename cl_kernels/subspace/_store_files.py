"""A store's state in a safetensors file, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_kernels._version import __version__
from cl_kernels.errors import CheckpointError
from cl_kernels.subspace import _files

__all__ = ["read", "refusal", "write"]

FORMAT = "cl_kernels.subspace"
VERSION = 2  # 1 did not know what the last task added


def write(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], names: list[str], provenance: Mapping[str, str]
) -> None:
    """Write atomically; a tensor that several keys share is written once."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() > 1 and identity in first:
            ties[key] = first[identity]
            continue
        first[identity] = key
        tensors[key] = tensor
    header = {
        "library": f"cl_kernels {__version__}",
        "ties": json.dumps(ties),
        "names": json.dumps(names),
        "provenance": json.dumps(provenance),
    }
    _files.save_tensors(path, tensors, kind=FORMAT, version=VERSION, metadata=header)


def read(
    path: str | os.PathLike[str], device: str | torch.device
) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """State, names in their order, provenance. Raises `CheckpointError` for any other file."""
    tensors, header = _files.load_tensors(path, kind=FORMAT, version=VERSION, device=device)
    try:
        for key, source in json.loads(header["ties"]).items():
            tensors[key] = tensors[source]
        provenance = {str(key): str(value) for key, value in json.loads(header["provenance"]).items()}
        return tensors, [str(name) for name in json.loads(header["names"])], provenance
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise refusal(path, error) from error


def refusal(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """What a file whose contents do not fit is refused with."""
    return CheckpointError(f"{path}: its contents are not those of a subspace store: {error}")
