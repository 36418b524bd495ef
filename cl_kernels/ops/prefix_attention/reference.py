"""Attention over tokens and a prefix in plain torch: by concatenation, and merged from the two parts.

The merge is exact. With scores a_s = scale q k_s^T of a part s, its log-sum-exp l_s and its attention o_s,
l = log sum_s exp(l_s) and O = sum_s exp(l_s - l) o_s. Its gradient needs O and l only: p_s = exp(a_s - l),
dv_s = p_s^T dO, da_s = p_s (dO v_s^T - rowsum(dO O)), dk_s = scale da_s^T q and dq = sum_s scale da_s k_s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.ops.prefix_attention import tokens

__all__ = ["Gradients", "backward", "concatenated", "forward", "merge", "prefix_gradients", "twice"]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> Tensor:
    """The definition, softmax(scale q [k; prefix_k]^T) [v; prefix_v], by torch's attention and with its gradient."""
    batch = q.shape[0]
    keys = torch.cat((k, prefix_k.expand(batch, *prefix_k.shape[1:])), dim=2)
    values = torch.cat((v, prefix_v.expand(batch, *prefix_v.shape[1:])), dim=2)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Merged output [B, H, L, d] and its log-sum-exp [B, H, L]: the tokens' part, and the prefix' in small products."""
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores to 16 bits
        out, lse = tokens.attend(q, k, v, scale)
        return merge(out, lse, q, prefix_k, prefix_v, scale)


def merge(
    out: Tensor, lse: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Merge a prefix into the tokens' output and log-sum-exp [B, H, L]; the result is laid out as `out`.

    A prefix that the batch shares is one product over the B L rows of a head, and no copy of it is made.
    """
    shared, wide = len(prefix_k) == 1, lse.dtype
    keys, values = (_rows(x, shared).to(wide) for x in (prefix_k, prefix_v))
    weights = torch.bmm(_rows(q, shared).to(wide), keys.mT).mul_(scale)
    top = weights.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)  # no key of the prefix counts: exp(-inf - 0) = 0
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    before = _rows(lse.unsqueeze(-1), shared)
    merged = torch.logaddexp(before, total.log_().add_(top))
    mixed = torch.bmm(weights, values).mul_(top.sub_(merged).exp_())
    mixed.addcmul_(_rows(out, shared).to(wide), (before - merged).exp_())
    result = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)  # `out` is a view
    return result.copy_(_images(mixed, q.shape, shared)), _images(merged, q.shape, shared).squeeze(-1).contiguous()


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
) -> Gradients:
    """Gradients of all five inputs; where only the prefix trains (`tokens_too` false), empty ones for q, k and v."""
    with torch.autocast(q.device.type, enabled=False):
        if not tokens_too:
            none = [q.new_empty(0) for _ in range(3)]
            return (*none, *prefix_gradients(grad, q, prefix_k, prefix_v, out, lse, scale, None))  # type: ignore[return-value]
        dq, dk, dv = (tokens.rows_first(g) for g in tokens.gradients(grad, q, k, v, out, lse, scale))
        return dq, dk, dv, *prefix_gradients(grad, q, prefix_k, prefix_v, out, lse, scale, dq)


def prefix_gradients(
    grad: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the prefix, summed over the batch where it is shared; its part of dq is added to `dq`."""
    shared, wide = len(prefix_k) == 1, lse.dtype
    keys, values, rows, slope, mixed = (_rows(x, shared).to(wide) for x in (prefix_k, prefix_v, q, grad, out))
    weights = torch.bmm(rows, keys.mT).mul_(scale).sub_(_rows(lse.unsqueeze(-1), shared)).exp_()
    dv = torch.bmm(weights.mT, slope)
    inner = (slope * mixed).sum(-1, keepdim=True)
    weights.mul_(torch.bmm(slope, values.mT).sub_(inner)).mul_(scale)
    if dq is not None:
        dq.add_(_images(torch.bmm(weights, keys), q.shape, shared))
    dk = torch.bmm(weights.mT, rows)
    return dk.view(prefix_k.shape).to(prefix_k.dtype), dv.view(prefix_v.shape).to(prefix_v.dtype)


def twice(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> Gradients:
    """The gradients in differentiable operations on concatenated keys, so that they have gradients in turn."""
    batch, count = len(q), k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    slope, rows = grad.to(wide), q.to(wide)
    keys, values = (
        torch.cat((x, p.expand(batch, *p.shape[1:])), 2).to(wide) for x, p in ((k, prefix_k), (v, prefix_v))
    )
    weights = (scale * (rows @ keys.mT)).softmax(-1)
    from_weights = slope @ values.mT
    scores = weights * (from_weights - (weights * from_weights).sum(-1, keepdim=True)) * scale
    for_keys, for_values = scores.mT @ rows, weights.mT @ slope
    parts = [scores @ keys, for_keys[:, :, :count], for_values[:, :, :count]]
    for gradient, prefix in ((for_keys, prefix_k), (for_values, prefix_v)):
        parts.append(gradient[:, :, count:].sum_to_size(prefix.shape))
    dq, dk, dv, dpk, dpv = (part.to(q.dtype) for part in parts)
    return dq, dk, dv, dpk, dpv


def _rows(x: Tensor, shared: bool) -> Tensor:
    """[B, H, L, d] as one matrix a head, [H, B L, d], where the prefix is shared, else one a head and image."""
    return x.transpose(0, 1).flatten(1, 2) if shared else x.flatten(0, 1)


def _images(rows: Tensor, shape: torch.Size, shared: bool) -> Tensor:
    """The inverse of `_rows`, to [B, H, L, d]."""
    batch, heads, length = shape[:3]
    if shared:
        return rows.view(heads, batch, length, -1).transpose(0, 1)
    return rows.view(batch, heads, length, -1)
