"""Where anchors come from: the weights as they are, a mapping, or a safetensors file read by slices."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cl_kernels.errors import NonFiniteError, SubspaceMismatchError
from cl_kernels.optim import _names, _shards
from cl_kernels.subspace._files import open_slices

__all__ = ["DEFAULT_EXCLUDE", "Lookup", "checksum", "compact", "excluded", "finite", "lookup"]

DEFAULT_EXCLUDE = ("head.*",)
Lookup = Callable[[str | None, Tensor], Tensor | None]  # (name, parameter) -> its anchor, its own memory; None: zero
_BLOCK = 1 << 16  # elements that are hashed at a time: their 64-bit numbers stay in a cache
_16 = (torch.bfloat16, torch.float16)


@contextmanager
def lookup(source: Any) -> Iterator[tuple[Lookup, Callable[[str | None], bool]]]:
    """(look one anchor up, is it there) for "init", None, a mapping by name, or the path of a safetensors file."""
    if source is None:
        yield (lambda _name, _p: None), (lambda _name: True)
    elif isinstance(source, str) and source == "init":
        yield (lambda _name, p: _shards.local(p).detach().clone()), (lambda _name: True)
    elif isinstance(source, Mapping):
        keys = {_names.plain_name(key): key for key in source}
        yield (lambda name, p: _of_mapping(source[keys[str(name)]], name, p)), keys.__contains__
    elif isinstance(source, str | os.PathLike):
        with open_slices(source) as file:
            keys = {_names.plain_name(key): key for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            yield (lambda name, p: _of_file(file, keys[str(name)], name, p)), keys.__contains__
    else:
        kind = type(source).__name__
        raise TypeError(f"anchors: expected 'init', a mapping of names to tensors, a path or None, got {kind}")


def _of_mapping(value: Any, name: str | None, p: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"anchors[{name!r}]: expected a Tensor or None, got {type(value).__name__}")
    _fits(name, tuple(value.shape), value.dtype, p)
    if _shards.is_sharded(value) and _shards.is_sharded(p):
        if value.placements != p.placements:  # type: ignore[attr-defined]
            raise SubspaceMismatchError(
                f"{name}: its anchor is placed {value.placements}, the parameter {p.placements}"  # type: ignore[attr-defined]
            )
        return _owned(_shards.local(value), p)
    rows = _shards.rows(str(name), p)
    return _owned(value if rows is None else value[rows], p)


def _of_file(file: Any, key: str, name: str | None, p: Tensor) -> Tensor:
    """Only the rows that this process holds are read."""
    stored = file.get_slice(key)
    shape = tuple(stored.get_shape())
    rows = _shards.rows(str(name), p) if shape == tuple(p.shape) else None
    if not shape:
        value = file.get_tensor(key)
    elif rows is None:
        value = stored[:1] if shape != tuple(p.shape) else stored[:]  # a piece is enough to be refused
    else:
        value = stored[rows]
    _fits(name, shape, value.dtype, p)
    return _owned(value, p)


def _owned(value: Tensor, p: Tensor) -> Tensor:
    """A copy in the parameter's type, rounded as loading it into the parameter rounds it, and laid out alike."""
    here = _shards.local(p).detach()
    return torch.empty_like(here, requires_grad=False).copy_(value.detach())


def _fits(name: str | None, shape: tuple[int, ...], dtype: torch.dtype, p: Tensor) -> None:
    if shape != tuple(p.shape):
        why = f". {_shards.FLATTENED}" if p.ndim == 1 and len(shape) > 1 else ""
        raise ValueError(f"{name}: the parameter has shape {tuple(p.shape)}, its anchor {shape}{why}")
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating point anchor, got {dtype}")


def compact(name: str, value: Tensor, wanted: torch.dtype | str | None) -> Tensor:
    """The anchor in the type that keeps it: halved where a 16-bit type holds every element exactly.

    "auto" takes bfloat16 or float16 where the round trip is exact and else leaves it; a dtype is a demand.
    Raises `ValueError` where that is not exact: rounding would be as large as what fine-tuning moves (9.4).
    """
    if wanted is None or value.dtype in _16 or wanted == value.dtype:
        return value
    for kind in _16 if wanted == "auto" else (wanted,):
        short = value.to(kind)
        if torch.equal(short.to(value.dtype), value):
            return short
    if wanted == "auto":
        return value
    raise ValueError(
        f"{name}: anchor_dtype={wanted} does not hold its {value.dtype} anchor exactly (rounding moves it by up to "
        f"{float((value.to(wanted).to(value.dtype) - value).abs().max()):.1e}); "
        "'auto' keeps such tensors as they are"
    )


def finite(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise `NonFiniteError` naming anchors that hold NaN or infinity. Reads one number from the device."""
    present = [(name, value) for name, value in named if value.numel() and value.device.type != "meta"]
    if not present:
        return
    norms = torch._foreach_norm([value for _, value in present], float("inf"))
    bad = ~torch.isfinite(torch.stack([norm.float().to(norms[0].device) for norm in norms]))
    if bool(bad.any()):
        raise NonFiniteError(
            f"anchors: NaN or infinity in {_names.few(n for (n, _), b in zip(present, bad.tolist()) if b)}"
        )


def checksum(value: Tensor, offset: int = 0) -> Tensor:
    """64 bits of a tensor's values, 0-d int64 on its device: the same on every device and for every 16-bit form.

    A sum of each element's bits times a number that belongs to its place, modulo 2^64, so that shards add up to the
    whole: `offset` is the place of the first element. It tells anchors apart, it does not guard them.
    """
    work = torch.promote_types(value.dtype, torch.float32)
    kind = torch.int64 if work is torch.float64 else torch.int32
    bits = value.detach().reshape(-1).to(work).view(kind)
    weights = _mixed(torch.arange(min(_BLOCK, offset + bits.numel()), device=value.device))
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    at = 0
    while at < bits.numel():
        block, start = divmod(offset + at, _BLOCK)
        part = bits[at : at + _BLOCK - start]
        total += (part * weights[start : start + part.numel()]).sum() * _mixed(torch.full_like(total, ~block))
        at += part.numel()
    return total


def _mixed(place: Tensor) -> Tensor:
    """Odd 64-bit numbers without order, one for each integer; the constants are xxHash's."""
    x = (place + 1) * -7046029254386353131
    x = (x ^ (x >> 32)) * -4417276706812531889
    return (x ^ (x >> 29)) | 1


def excluded(
    patterns: Iterable[Any], names: Mapping[Tensor, str], present: Sequence[Tensor], must: bool
) -> set[Tensor]:
    """Parameters that a pattern names: a glob of names, a module's or a parameter's name, or the parameter itself.

    With `must` a pattern that matches none raises `ValueError` with the names nearest to it.
    """
    found: set[Tensor] = set()
    for pattern in patterns:
        if isinstance(pattern, Tensor):
            hits = [p for p in present if p is pattern]
        else:
            plain = _names.plain_name(pattern)
            hits = [p for p in present if (name := names.get(p)) is not None and _matches(name, plain)]
        if must and not hits:
            raise ValueError(_no_match(pattern, [names[p] for p in present if p in names]))
        found.update(hits)
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _no_match(pattern: Any, known: list[str]) -> str:
    if isinstance(pattern, Tensor):
        return f"exclude: a tensor of shape {tuple(pattern.shape)} is no parameter of this optimizer"
    if not known:
        return (
            f"exclude: {pattern!r} cannot match parameters without names; pass `model.named_parameters()` to the "
            "optimizer, or the parameters themselves in `exclude`"
        )
    near = difflib.get_close_matches(pattern.rstrip("*."), known, 5, 0.0)
    return f"exclude: {pattern!r} matches no parameter; nearest names: {', '.join(near)}"
