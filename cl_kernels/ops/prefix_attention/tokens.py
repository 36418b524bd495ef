"""Attention over the image tokens with its log-sum-exp, by torch's own fused kernels, forward and backward.

aten's `_scaled_dot_product_*` are the only source of the log-sum-exp. They are looked up at run time, here and nowhere
else; where one is missing or refuses, the map is formed. Their backward kernels recompute p = exp(score - lse) from
what they are given: with the output and log-sum-exp of a larger softmax they return the tokens' share of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["attend", "fused", "fused_gradients", "gradients", "rows_first"]

FUSED_HEAD_DIM = 256  # the widest head of torch's flash attention; its memory-efficient one has no limit
_LSE_MULTIPLE: Final = 32  # rows that the memory-efficient kernel pads its log-sum-exp to
_REFUSALS: Final = (AttributeError, RuntimeError, NotImplementedError, TypeError)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, laid out [B, L, H, d], and the log-sum-exp [B, H, L] in float32 or wider.

    A query whose scores are all -inf gets the output 0 and the log-sum-exp -inf.
    """
    found = fused(q, k, v, scale)
    if found is None:
        return _attend(q, k, v, scale)
    out, lse = found
    if q.device.type == "cpu" and bool((lse == 0).any()):  # which this kernel also says where all scores are -inf
        lse = _scores(q, k, scale).logsumexp(-1)
    out, lse = rows_first(out), lse.contiguous()
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the tokens' part of a softmax with output `out` and log-sum-exp `lse`."""
    found = fused_gradients(grad, q, k, v, out, lse, scale)
    return _gradients(grad, q, k, v, out, lse, scale) if found is None else found


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp [B, H, L] from torch's own kernels; None where there is none.

    On CUDA flash attention takes 16-bit heads up to 256 wide (a multiple of 8, which it pads to itself only through the
    public function) on sm_80 and later; the memory-efficient kernel takes float32 as well and any width. Both give
    the natural log of the sum of exp(scale q k), in float32; the latter pads its rows to a multiple of 32. On CUDA
    float64 has neither. What a kernel refuses falls to the next, and out of memory to the caller.
    """
    aten: Any = torch.ops.aten
    q, k, v = _dense_columns(q, k, v)
    calls: list[Callable[[], tuple[Tensor, ...]]] = []
    if 0 in q.shape or k.shape[2] == 0:
        return None
    if q.device.type == "cpu":
        calls = [lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[:2]]
    elif q.device.type == "cuda":
        if _flash_takes(q):
            calls.append(lambda: aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2])
        calls.append(lambda: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2])
    found = _first(calls)
    return None if found is None else (found[0], found[1][..., : q.shape[-2]])


def fused_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dq, dk, dv from torch's own backward kernels, given any softmax' output and log-sum-exp; None without one."""
    aten: Any = torch.ops.aten
    q, k, v, grad, out = _dense_columns(q, k, v, grad, out)
    calls: list[Callable[[], tuple[Tensor, ...]]] = []
    if 0 in q.shape or k.shape[2] == 0:
        return None
    if q.device.type == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        calls = [lambda: backward(grad, q, k, v, out, lse, 0.0, False, scale=scale)]
    elif q.device.type == "cuda":
        if _flash_takes(q):
            seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
            sizes = (None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset)
            calls.append(
                lambda: aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *sizes, scale=scale)
            )
        unread = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of a dropout that is not there
        calls.append(
            lambda: aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, _padded(lse), unread, unread, 0.0, [True, True, True, False], scale=scale
            )
        )
    found = _first(calls)
    return None if found is None else (found[0], found[1], found[2])


def rows_first(x: Tensor) -> Tensor:
    """`x` [B, H, L, d] laid out as [B, L, H, d], in which a ViT merges its heads without a copy."""
    return x if x.transpose(1, 2).is_contiguous() else x.transpose(1, 2).contiguous().transpose(1, 2)


def _first(calls: list[Callable[[], tuple[Tensor, ...]]]) -> tuple[Tensor, ...] | None:
    for call in calls:
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS:
            continue
    return None


def _flash_takes(q: Tensor) -> bool:
    width = q.shape[-1]
    return q.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= FUSED_HEAD_DIM


def _dense_columns(*tensors: Tensor) -> list[Tensor]:
    """With neighbouring columns: the kernel for CPUs reads others as if they were, without a word."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _padded(lse: Tensor) -> Tensor:
    rows = lse.shape[-1]
    padded = lse.new_zeros((*lse.shape[:-1], -(-rows // _LSE_MULTIPLE) * _LSE_MULTIPLE))
    padded[..., :rows] = lse
    return padded


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide) @ k.to(wide).mT).mul_(scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.unsqueeze(-1).masked_fill(lse.unsqueeze(-1) == -torch.inf, 0.0)).exp_()
    return rows_first((weights @ v.to(weights.dtype)).to(q.dtype)), lse


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse.dtype
    grad, keys, queries = grad.to(wide), k.to(wide), q.to(wide)
    weights = _scores(q, k, scale).sub_(lse.unsqueeze(-1)).exp_()
    inner = (grad * out.to(wide)).sum(-1, keepdim=True)
    slopes = (grad @ v.to(wide).mT).sub_(inner).mul_(weights).mul_(scale)
    dv = weights.mT @ grad
    return (slopes @ keys).to(q.dtype), (slopes.mT @ queries).to(k.dtype), dv.to(v.dtype)
