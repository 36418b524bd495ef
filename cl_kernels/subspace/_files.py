"""Files that survive: written in one step, read without executing anything."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cl_kernels.errors import CheckpointError

__all__ = ["load_tensors", "open_slices", "save_tensors", "write_atomically"]

_writing: set[str] = set()  # names of this process' temporary files
_MAGIC = {
    b"\x80": "a pickle",
    b"PK\x03\x04": "a zip archive (torch.save writes pickles in one)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip file",
    b"\x89HDF": "an HDF5 file",
}


def write_atomically(path: str | os.PathLike[str], payload: bytes) -> None:
    """Replace the file `path` by `payload` in one step.

    A temporary file in the same directory is written, flushed to disk and renamed over `path`: killed at any byte,
    `path` holds its old bytes or the new ones. What killed writers left behind is removed. Raises `OSError` (disk full,
    read-only) with the old file in place and the temporary one removed.
    """
    target = Path(path)
    _sweep(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _writing.add(temporary.name)
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _writing.discard(temporary.name)
    _sync_directory(target.parent)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, kind: str, version: int, metadata: Mapping[str, str]
) -> None:
    """Write `tensors` as safetensors, atomically, with `kind`, `version` and `metadata` in the header.

    Tensors go to the CPU as contiguous copies, since safetensors refuses views and shared memory.
    """
    copies = {
        key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }
    header = {**metadata, "format": kind, "format_version": str(version)}
    write_atomically(path, save(copies, header))


def load_tensors(
    path: str | os.PathLike[str], *, kind: str, version: int, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file written by `save_tensors`, memory-mapped while reading.

    Raises `CheckpointError` naming the path for a missing, damaged or foreign file, a pickle, another kind or a newer
    version. `OSError` other than a missing file passes through.
    """
    target = Path(path)
    _refuse_foreign(target)
    try:
        with safe_open(target, framework="pt", device=str(device)) as file:
            header = dict(file.metadata() or {})
            _check_header(target, header, kind, version)
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"{target}: expected a safetensors file of format {kind!r}, but it is damaged: {error}"
        ) from error


@contextlib.contextmanager
def open_slices(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Anybody's safetensors file, memory-mapped: `keys()` and `get_slice(key)` read what is asked for and no more.

    Raises `CheckpointError` naming the path for a missing, damaged or foreign file and for a pickle.
    """
    target = Path(path)
    _refuse_foreign(target)
    try:
        file = safe_open(target, framework="pt", device="cpu")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{target}: expected a safetensors file, but it is damaged: {error}") from error
    with file as opened:
        yield opened


def _refuse_foreign(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: expected a file, got a directory") from error
    for magic, what in _MAGIC.items():
        if head.startswith(magic) and not _plausible_header(head, path):
            raise CheckpointError(
                f"{path}: expected safetensors, got {what}, which is refused: loading it could run code"
            )


def _plausible_header(head: bytes, path: Path) -> bool:
    """A safetensors file starts with its header's length, which may begin with any byte; then comes '{'."""
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length + 8 > path.stat().st_size:
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _check_header(path: Path, header: Mapping[str, str], kind: str, version: int) -> None:
    if header.get("format") != kind:
        raise CheckpointError(
            f"{path}: expected format {kind!r}, got {header.get('format')!r}; it is another program's file"
        )
    written = header.get("format_version", "")
    if not written.isdecimal() or not 1 <= int(written) <= version:
        raise CheckpointError(
            f"{path}: expected format version 1 to {version}, got {written!r}; update cl_kernels to read it"
        )


def _sweep(target: Path) -> None:
    """Remove temporary files of writers of `target` that are no longer alive."""
    prefix, suffix = f".{target.name}.", ".tmp"
    with contextlib.suppress(OSError):
        for entry in target.parent.iterdir():
            name = entry.name
            ours = name.startswith(prefix) and name.endswith(suffix) and name not in _writing
            if ours and not _alive(name[len(prefix) : -len(suffix)].partition("-")[0]):
                entry.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    """Whether another process of that number may be writing; a container starts again under its old number."""
    if not process.isdecimal():
        return True  # not ours to judge
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sync_directory(directory: Path) -> None:
    """Make the rename durable; Windows cannot open directories, and its rename needs no more."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
