"""The rows that a weight sees, in pieces: nothing here copies more than `WORKSPACE_BYTES` of them at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.subspace._layers import CONVOLUTIONS, Layer

__all__ = ["WORKSPACE_BYTES", "Rows", "checked", "input_rows", "joined", "output_rows", "parts", "token_rows"]

WORKSPACE_BYTES = 16 << 20  # of one copy: padded images and their patches, the piece before and its packed panels: 64


class Rows(NamedTuple):
    """`number` rows [..., d] of one batch on a device, in pieces."""

    number: int
    pieces: Iterable[Tensor]
    device: torch.device


def checked(layer: Layer, x: Any, wanted: int, axis: int = -1) -> Tensor:
    """`x` if it holds rows for the weight of `layer`. Raises `SubspaceMismatchError` naming layer and shapes."""
    key, shape = layer.key, tuple(layer.weight.shape)
    if not isinstance(x, Tensor):
        raise SubspaceMismatchError(f"{key}: expected a tensor of rows for the weight {shape}, got {type(x).__name__}")
    if hasattr(x, "placements"):
        raise SubspaceMismatchError(
            f"{key}: its input is a DTensor, of which this process holds a part; tensor parallelism is not supported"
        )
    if not x.is_floating_point():
        raise SubspaceMismatchError(f"{key}: expected rows of a real floating dtype, got {x.dtype}")
    if x.ndim < -axis or (x.size(axis) if x.is_nested else x.shape[axis]) != wanted:
        got = "nested" if x.is_nested else tuple(x.shape)
        raise SubspaceMismatchError(
            f"{key}: expected {wanted} at dimension {axis} for a weight of shape {shape}, got {got}"
        )
    return x


def input_rows(layer: Layer, x: Tensor, skip_tokens: int) -> Rows:
    """The rows that multiply the weight; convolutions as unfolded patches, their groups as rows of their own."""
    if not isinstance(layer.module, CONVOLUTIONS):
        return token_rows(checked(layer, x, layer.width("input")), skip_tokens)
    module: Any = layer.module
    spatial = len(module.kernel_size)
    checked(layer, x, module.in_channels, -spatial - 1)
    if x.ndim == spatial + 1:
        x = x.unsqueeze(0)
    around = _padding(module)
    sizes = [n + before + after for n, (before, after) in zip(x.shape[2:], around, strict=True)]
    places = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(sizes, module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    number = len(x) * math.prod(places) * int(module.groups)
    return Rows(number, _patches(module, x, around, places), x.device)


def joined(some: Iterable[Rows]) -> Rows:
    """One batch from several tensors."""
    every = list(some)
    pieces = itertools.chain.from_iterable(rows.pieces for rows in every)
    return Rows(sum(rows.number for rows in every), pieces, every[0].device)


def output_rows(layer: Layer, grad: Tensor, skip_tokens: int) -> Rows:
    """The rows [n, out] of a gradient with respect to the output."""
    if isinstance(layer.module, CONVOLUTIONS):
        return token_rows(grad.movedim(-1 - len(layer.module.kernel_size), -1), 0)
    return token_rows(grad, skip_tokens)


def token_rows(x: Tensor, skip: int) -> Rows:
    """[..., tokens, d] without the first `skip` tokens (the last -skip if negative), as rows; nothing is copied."""
    sequences = x.unbind() if x.is_nested else (x,)
    kept = [_without(sequence, skip, tokens=x.ndim >= 3) for sequence in sequences]
    return Rows(sum(rows.shape[:-1].numel() for rows in kept), kept, x.device)


def parts(x: Tensor, limit: int) -> Iterator[Tensor]:
    """Views of the rows [..., d] of `x`, of at most `limit` bytes each."""
    size = x.numel() * x.element_size()
    if size <= limit or x.ndim < 2:
        yield x
        return
    if x.ndim > 2 and x.is_contiguous():
        x = x.flatten(0, -2)
    one = size // len(x)
    for piece in x.split(max(1, limit // one)):
        if one <= limit or x.ndim == 2:
            yield piece
        else:
            yield from parts(piece[0], limit)


def _without(x: Tensor, skip: int, tokens: bool) -> Tensor:
    if not skip or not tokens:
        return x
    return x[..., skip:, :] if skip > 0 else x[..., :skip, :]


def _padding(module: Any) -> list[tuple[int, int]]:
    """What the convolution adds before and after each spatial dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in module.padding]


def _patches(module: Any, x: Tensor, around: list[tuple[int, int]], places: list[int]) -> Iterator[Tensor]:
    """Rows [n, c k ...] of all images; a copy of one piece at a time, of whole images or of part of one."""
    if not x.numel() or min(places) < 1:
        return
    width = module.in_channels // module.groups * math.prod(module.kernel_size)
    one = math.prod(places) * module.groups * width * x.element_size()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    flat = [side for pair in reversed(around) for side in pair]
    for images in x.split(max(1, WORKSPACE_BYTES // one)):
        padded = F.pad(images, flat, mode=mode) if any(flat) else images
        windows = _windows(module, padded, places)
        lines = max(1, WORKSPACE_BYTES * places[0] // one) if len(images) == 1 else places[0]
        for piece in windows.split(lines, dim=1):
            yield piece.reshape(-1, width)


def _windows(module: Any, x: Tensor, places: list[int]) -> Tensor:
    """A view [B, places ..., groups, c, k ...] of padded images [B, C, sizes ...]: every patch, nothing copied."""
    batch, channel, *steps = x.stride()
    each = module.in_channels // module.groups
    size = (len(x), *places, module.groups, each, *module.kernel_size)
    over = tuple(step * stride for step, stride in zip(steps, module.stride, strict=True))
    within = tuple(step * dilation for step, dilation in zip(steps, module.dilation, strict=True))
    return x.as_strided(size, (batch, *over, channel * each, channel, *within), x.storage_offset())
