"""The merged form on CUDA: torch's fused attention for the tokens, then one launch for the prefix.

Backward: torch's own backward kernel for the tokens, one launch that adds the prefix' part of dq, one for the gradient
of the prefix. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Final

import torch
from torch import Tensor

from cl_kernels.ops import _tuning
from cl_kernels.ops._registry import Unsupported, backend
from cl_kernels.ops.prefix_attention import plan, tokens

__all__ = ["backward", "forward", "how"]

_OLDEST: Final = 80
_PROGRAMS: Final = 528  # four blocks on each of the 132 multiprocessors of an H100 or H200; one number for all devices
_BYTES: Final = 16  # of a load


def forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _refuse(q)
    from cl_kernels.ops.prefix_attention import kernels

    with torch.autocast(q.device.type, enabled=False):
        before, lse = tokens.attend(q, k, v, scale)
    out = torch.empty_strided(before.shape, before.stride(), dtype=q.dtype, device=q.device)
    merged = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=q.device)
    q, prefix_k, prefix_v = _aligned(q, prefix_k, prefix_v)
    config = _config(kernels.MERGE, q)
    given = (q, prefix_k, prefix_v, before, lse, out, merged, scale, *_strides(q, prefix_k, prefix_v))
    _launch(kernels.MERGE, config, _row_items(q, config), *given, *_sizes(q, prefix_k))
    return out, merged


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    tokens_too: bool,
) -> tuple[Tensor, ...]:
    _refuse(q)
    from cl_kernels.ops.prefix_attention import kernels

    for_tokens = [q.new_empty(0) for _ in range(3)]
    if tokens_too:
        with torch.autocast(q.device.type, enabled=False):
            for_tokens = [tokens.rows_first(g) for g in tokens.gradients(grad, q, k, v, out, lse, scale)]
    q, grad, prefix_k, prefix_v = _aligned(q, grad, prefix_k, prefix_v)
    given = (q, grad, prefix_k, prefix_v, tokens.rows_first(out), lse)
    numbers = (scale, *_strides(q, grad, prefix_k, prefix_v), *_sizes(q, prefix_k))
    if tokens_too:
        config = _config(kernels.ROWS, q)
        _launch(kernels.ROWS, config, _row_items(q, config), *given, for_tokens[0], *numbers)
    config = _config(kernels.KEYS, q)
    batch, heads, length, width = q.shape
    prefixes, _, count, _ = prefix_k.shape
    blocks, images = prefixes * heads * -(-count // config["KEYS"]), batch // prefixes
    chunks = max(1, min(images * -(-length // config["ROWS"]), _PROGRAMS // blocks))
    dk, dv = (lse.new_empty((chunks, prefixes, heads, count, width)) for _ in range(2))
    _launch(kernels.KEYS, config, blocks * chunks, *given, dk, dv, *numbers, images, chunks)
    return (*for_tokens, dk.sum(0).to(prefix_k.dtype), dv.sum(0).to(prefix_v.dtype))


def how(*arguments: Any) -> str | None:
    """For `explain`: raises `Unsupported` where these arguments are concatenated, or as the kernels would."""
    given = [x for x in arguments if isinstance(x, Tensor)]
    if given:
        _refuse(given[0])
    if len(given) == 5 and backend() == "auto" and not plan.merges(*given):
        raise Unsupported("concatenation is faster for these shapes")
    return None


def _refuse(q: Tensor) -> None:
    reason = plan.unsupported(q.dtype, q.shape[-1])
    if reason is not None:
        raise Unsupported(reason)
    if q.device.type == "cpu":
        if q.dtype == torch.bfloat16:
            raise Unsupported(f"Triton's interpreter multiplies {q.dtype} wrongly")
    elif _capability(q.device) < _OLDEST:
        raise Unsupported(f"compute capability {_capability(q.device) / 10} is older than {_OLDEST / 10}")


@functools.cache
def _capability(device: torch.device) -> int:
    from cl_kernels.ops import _triton

    return _triton.capability(device)


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """As 16-byte loads need them; others are copied. A fused qkv projection gives views that are fine as they are."""
    return [x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _is_aligned(x: Tensor) -> bool:
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % _BYTES == 0 and not any(step % plan.ALIGNED for step in steps)


def _strides(*tensors: Tensor) -> list[int]:
    """Of image, head and row of each; one prefix for all images has the image stride 0."""
    return [step for x in tensors for step in (x.stride(0) if len(x) > 1 else 0, x.stride(1), x.stride(2))]


def _sizes(q: Tensor, prefix_k: Tensor) -> tuple[int, int, int, int]:
    """Heads, queries, keys of the prefix, and the width in eights of numbers."""
    return q.shape[1], q.shape[2], prefix_k.shape[2], q.shape[3] // plan.ALIGNED


def _row_items(q: Tensor, config: _tuning.Config) -> int:
    return q.shape[0] * q.shape[1] * -(-q.shape[2] // int(config["ROWS"]))


def _config(table: _tuning.KernelTable, q: Tensor) -> _tuning.Config:
    from cl_kernels.ops import _triton

    size = "64" if q.shape[-1] <= 64 else "128"
    return table.choose(_capability(q.device), _triton.dtype_name(q.dtype), size)


def _launch(table: _tuning.KernelTable, config: _tuning.Config, items: int, *arguments: Any) -> None:
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        table.kernel[(items,)](*arguments, **dict(config.constants), **config.options())
