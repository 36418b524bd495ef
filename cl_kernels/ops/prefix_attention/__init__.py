"""Attention with prompts as further keys and values, without a copy of the tokens' own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cl_kernels.ops import _checks
from cl_kernels.ops._registry import backend, define, register_autograd
from cl_kernels.ops.prefix_attention import autograd, cuda, plan, reference

__all__ = ["prefix_attention"]

_NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def _like_heads(x: Tensor) -> Tensor:
    """Empty, of the shape of x [B, H, L, d], laid out as [B, L, H, d]."""
    batch, heads, length, width = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
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
    for_tokens = [_like_heads(x) if tokens_too else x.new_empty(0) for x in (q, k, v)]
    return (*for_tokens, prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape))


_FORWARD = define(
    "prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, float scale) -> (Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake,
    triton=cuda.forward,
    triton_details=cuda.how,
    reference_details=plan.how,
)
register_autograd("prefix_attention", autograd.backward, autograd.context)

define(
    "prefix_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor out, Tensor lse, "
    "float scale, bool tokens_too) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    triton=cuda.backward,
)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of q over the keys [k; prefix_k] and values [v; prefix_v]: softmax(scale q [k; pk]^T) [v; pv].

    q [B, H, L, d], k and v [B, H, N, d] of one floating dtype, any strides; L need not be N. prefix_k and prefix_v
    [B, H, M, d], or [1, H, M, d] for a prefix that the whole batch shares, in any floating dtype (they are converted
    to q's); several prefixes are given as one, joined by the caller. `scale` is 1/sqrt(d) where it is None. Returns
    [B, H, L, d]. Under autocast it computes in autocast's dtype, as torch's attention does. NaN and infinity as there.

    Differentiable in all five. Two forms with the same result: the concatenation through torch's fused attention, and
    the parts merged by their log-sum-exp, w = sigmoid(l_prefix - l_tokens), without a copy of k and v and, in a shared
    prefix, of the prefix. The faster one is taken by shape (`plan.py`); a backend other than "auto" takes the merge.
    The merged form has second derivatives (it then forms the map), the concatenated one those of torch's attention.

    Raises `TypeError`, `ValueError` (shape, dtype), `RuntimeError` (devices), each naming the argument.
    Cost: 4 B H L (N + M) d operations; concatenation moves 4 B H (N + M) d numbers more, the merge 3 B H L d.
    Source: prefix tuning (Li and Liang, 2021); the merge as in flash decoding; method-distillation 3.1.
    """
    inputs = _checked(q, k, v, prefix_k, prefix_v)
    factor = (q.shape[-1] or 1) ** -0.5 if scale is None else _checks.number("scale", scale)
    if not math.isfinite(factor):
        raise ValueError(f"Invalid scale value: {scale} (expected a finite number)")
    empty = any(0 in x.shape for x in inputs)
    if empty or (backend() == "auto" and not plan.merges(*inputs)):
        return reference.concatenated(*inputs, factor)
    out: Tensor = _FORWARD(*inputs, factor)[0]
    return out


def _checked(*tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five tensors in the dtype to compute in, if they fit each other."""
    for name, x in zip(_NAMES, tensors, strict=True):
        if _checks.floating(name, x).ndim != 4:
            raise ValueError(f"{name}: expected shape [B, H, rows, d], got {tuple(x.shape)}")
        _checks.same_device(name, x, "q", tensors[0])
    q, k, v, prefix_k, prefix_v = tensors
    batch, heads, _, width = q.shape
    for name, x, first in (("k", k, "N"), ("prefix_k", prefix_k, "M")):
        allowed = (batch,) if name == "k" else (1, batch)
        if x.shape[0] not in allowed or (x.shape[1], x.shape[3]) != (heads, width):
            lead = batch if name == "k" else f"1 or {batch}"
            wanted = f"[{lead}, {heads}, {first}, {width}]"
            raise ValueError(f"{name}: expected shape {wanted} for q of shape {tuple(q.shape)}, got {tuple(x.shape)}")
    for name, x, key_name, key in (("v", v, "k", k), ("prefix_v", prefix_v, "prefix_k", prefix_k)):
        if x.shape != key.shape:
            raise ValueError(f"{name}: expected the shape of {key_name}, {tuple(key.shape)}, got {tuple(x.shape)}")
    dtype = q.dtype
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
        dtype = tensors[0].dtype
    for name, x in zip(_NAMES[1:3], tensors[1:3], strict=True):
        if x.dtype != dtype:
            raise ValueError(f"{name}: expected the dtype of q, {dtype}, got {x.dtype}")
    q, k, v, prefix_k, prefix_v = tensors
    return q, k, v, prefix_k.to(dtype), prefix_v.to(dtype)
