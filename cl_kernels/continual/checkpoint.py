"""Checkpoints: a tree of tensors and plain values in one safetensors file, written atomically, read without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cl_kernels.errors import CheckpointError
from cl_kernels.subspace._files import write_atomically

__all__ = ["FORMAT", "VERSION", "load", "probe", "save_atomically", "write_atomically"]

FORMAT = "cl_kernels.run"
VERSION = "1"

Tree = Any  # dict with str or int keys | list | tuple | Tensor | str | int | float | bool | None


def save_atomically(path: Path, tree: Tree, *, fingerprint: str) -> None:
    """Write `tree` to `path` by `write_atomically`: killed at any byte, `path` is the old file or the new one.

    Raises `OSError` (disk full, read-only) with the old file in place, and `TypeError` for a value that JSON cannot
    hold exactly."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(tree, tensors), allow_nan=True)
    metadata = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "tree": layout}
    write_atomically(path, save(tensors, metadata))


def load(path: Path, *, fingerprint: str, device: torch.device) -> Tree:
    """The tree saved at `path`; what was on an accelerator goes to `device`, what was on the CPU stays there.

    Raises `CheckpointError` naming the path for a damaged or foreign file, another version, or another run's
    fingerprint."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, fingerprint)
            # Copies: torch's own allocations are aligned to 64 bytes, those of the file are not, and BLAS sums in
            # another order on memory of another alignment. A resumed run would then differ in the last bits.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
        return _unpack(json.loads(metadata["tree"]), tensors, device)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint of this package ({type(error).__name__}: {error}); "
            "remove it, or start over with overwrite=True"
        ) from error


def probe(directory: Path) -> None:
    """Make `directory` and write, read and remove a 64 KiB file in it. Raises `OSError` if any of it fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "probe"  # a fixed name: what a killed process left is removed by the next
        try:
            write_atomically(file, bytes(65536))
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"out: cannot write to it ({error.strerror})", str(directory)) from error


def _check(path: Path, metadata: dict[str, str], fingerprint: str) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a file of format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {metadata.get('version')!r}")
    if metadata.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to another run (fingerprint {metadata.get('fingerprint')}, this run has {fingerprint}): "
            "method, data, backbone, seed or options differ"
        )


def _pack(value: Tree, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; tensors go to `tensors` under a number. Every node but numbers and strings is a one-key
    object."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # ties and views become copies
        return {"tensor" if value.device.type == "cpu" else "device tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_key(key), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"checkpoint: cannot hold a value of type {type(value).__name__}")


def _key(key: object) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"checkpoint: dict keys must be str or int, got {type(key).__name__}")


def _unpack(node: Any, tensors: dict[str, Tensor], device: torch.device) -> Tree:
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()
    if kind in ("tensor", "device tensor"):
        return tensors[body] if kind == "tensor" else tensors[body].to(device)
    if kind == "dict":
        return {key: _unpack(item, tensors, device) for key, item in body}
    items = [_unpack(item, tensors, device) for item in body]
    return tuple(items) if kind == "tuple" else items
