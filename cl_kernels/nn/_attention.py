"""Self-attention of timm's pre-norm ViT blocks over image tokens and prompt keys, in the pieces PromptedViT needs.

Blocks and attention modules are typed `Any`: they belong to timm, which is imported only by those who use it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.ops.prefix_attention import tokens as _tokens

PIECE_BYTES = 16 << 20  # of queries that are widened at a time

__all__ = [
    "attend",
    "attend_with_mass",
    "check_block",
    "effective_key_weight",
    "finish",
    "head_dim",
    "project",
    "project_some",
]

_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


def check_block(index: int, block: Any) -> None:
    """Raise `ValueError` unless `block` is x + attn(norm1(x)), x + mlp(norm2(x)) with plain self-attention."""
    kind = type(block).__name__
    missing = [name for name in _BLOCK if not hasattr(block, name)]
    if missing:
        raise ValueError(
            f"timm_model: block {index} ({kind}) has no {', '.join(missing)}; prompts need timm's pre-norm Block"
        )
    attention = block.attn
    unusual = type(attention).__name__
    fused = getattr(attention, "qkv", None) is not None
    separate = all(getattr(attention, name, None) is not None for name in ("q_proj", "k_proj", "v_proj"))
    if not (fused or separate) or not hasattr(attention, "num_heads") or not hasattr(attention, "proj"):
        raise ValueError(f"timm_model: block {index} has attention {unusual}; expected fused qkv or separate q, k, v")
    foreign = {
        "relative position bias": "rel_pos",
        "differential attention": "lambda_init",
        "separate q and v biases": "q_bias",
    }
    for what, name in foreign.items():
        if getattr(attention, name, None) is not None:
            raise ValueError(f"timm_model: block {index} ({unusual}) uses {what}, which PromptedViT does not support")
    if getattr(attention, "num_kv_groups", 1) != 1:
        raise ValueError(f"timm_model: block {index} ({unusual}) shares keys between heads, which is not supported")
    if isinstance(block.norm1, nn.Identity) or not isinstance(getattr(block, "norm1", None), nn.Module):
        raise ValueError(f"timm_model: block {index} has no norm before attention; prompts need a pre-norm block")


def head_dim(attention: Any) -> int:
    """Width of one head."""
    return int(getattr(attention, "head_dim", 0)) or int(_key_projection(attention).shape[0]) // int(
        attention.num_heads
    )


def _key_projection(attention: Any) -> Tensor:
    """Rows of the key projection, [H*dh, D] in torch's [out, in] layout."""
    if getattr(attention, "qkv", None) is not None:
        weight: Tensor = attention.qkv.weight
        return weight[weight.shape[0] // 3 : 2 * (weight.shape[0] // 3)]
    separate: Tensor = attention.k_proj.weight
    return separate


def project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, dh] of `tokens` [B, N, D], after bias and q/k norms, before the scale."""
    shape = (int(attention.num_heads), head_dim(attention))
    if getattr(attention, "qkv", None) is not None:
        q, k, v = attention.qkv(tokens).unflatten(-1, (3, *shape)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        parts = (attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens))
        q, k, v = (part.unflatten(-1, shape).transpose(1, 2) for part in parts)
    return _norm(attention, "q_norm", q), _norm(attention, "k_norm", k), v


def project_some(attention: Any, read: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the rows `read` [B, R, D], keys and values of all `tokens` [B, N, D], otherwise as `project`."""
    shape = (int(attention.num_heads), head_dim(attention))
    fused = getattr(attention, "qkv", None)
    if fused is None:
        parts = (attention.q_proj(read), attention.k_proj(tokens), attention.v_proj(tokens))
        q, k, v = (part.unflatten(-1, shape).transpose(1, 2) for part in parts)
    else:
        inner = shape[0] * shape[1]
        of_q, of_kv = (None, None) if fused.bias is None else (fused.bias[:inner], fused.bias[inner:])
        q = F.linear(read, fused.weight[:inner], of_q).unflatten(-1, shape).transpose(1, 2)
        both = F.linear(tokens, fused.weight[inner:], of_kv).unflatten(-1, (2, *shape))
        k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
    return _norm(attention, "q_norm", q), _norm(attention, "k_norm", k), v


def _norm(attention: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attention, name, None)
    return x if norm is None else norm(x)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, fused by torch."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attend_with_mass(q: Tensor, k: Tensor, v: Tensor, prompt_key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention output and S_P = exp(scale q k_P^T - lse) [B, H, N, M], the softmax columns of the prompt keys.

    The output keeps its gradient; S_P is detached. Where fused attention gives its log-sum-exp, no map is formed.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # autocast would round the scores to 16 bits
        fused = _tokens.fused(q.detach(), k.detach(), v.detach(), scale)
        lse = _log_sum_exp(q, k, scale) if fused is None else fused[1]
        mass = _columns(q, prompt_key, lse, scale)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    out = attend(q, k, v, scale) if tracked or fused is None else fused[0]
    return out, mass


def _columns(q: Tensor, prompt_key: Tensor, lse: Tensor, scale: float) -> Tensor:
    """exp(scale q k_P^T - lse), from products that are exact to float32, some images at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    product = dtype if _float32_products_are_exact(q.device) else torch.float64
    wide_key = prompt_key.to(product).mT
    mass = q.new_empty((*q.shape[:3], prompt_key.shape[2]), dtype=dtype)
    one = max(1, q[:1].numel() * product.itemsize)
    for first in range(0, len(q), max(1, PIECE_BYTES // one)):
        some = slice(first, first + max(1, PIECE_BYTES // one))
        key = wide_key if len(wide_key) == 1 else wide_key[some]
        scores = torch.matmul(q[some].to(product), key).mul_(scale)
        mass[some] = scores.sub_(lse[some].to(product).unsqueeze(-1)).exp_()
    return mass


def _log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """log of the softmax' denominators [B, H, N] from the map itself, one image at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for image, (one, keys) in enumerate(zip(q, k, strict=True)):
        torch.logsumexp((one.to(wide) @ keys.to(wide).mT).mul_(scale), -1, out=lse[image])
    return lse


def _float32_products_are_exact(device: torch.device) -> bool:
    """Whether torch may not shorten float32 products: TF32 on a GPU, bfloat16 on a CPU, cost 1e-3 of a softmax."""
    try:
        allowed = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return not allowed and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer fp32_precision names, which refuse to be read through the older ones
        return False


def finish(attention: Any, mixed: Tensor, tokens: Tensor) -> Tensor:
    """Merge heads [B, H, N, dh] -> [B, N, D] and apply what timm applies after the softmax."""
    out = mixed.transpose(1, 2).flatten(2)
    out = _norm(attention, "norm", out)
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(tokens).sigmoid()
    return attention.proj_drop(attention.proj(out))  # type: ignore[no-any-return]  # timm's modules are untyped


def effective_key_weight(attention: Any) -> Tensor:
    """W_k [H*dh, D] with the linear part of a key norm folded in.

    That is diag(gain) C W_k,h for LayerNorm and diag(gain) W_k,h for an RMS norm. The scale by which a key norm divides
    is left out, as NSP2 leaves out the prompts' own sigma. Raises `ValueError` for another kind of key norm.
    """
    weight = _key_projection(attention).detach()
    norm = getattr(attention, "k_norm", None)
    if norm is None or isinstance(norm, nn.Identity):
        return weight.clone()
    heads = weight.reshape(int(attention.num_heads), head_dim(attention), -1)
    if isinstance(norm, nn.LayerNorm):
        heads = heads - heads.mean(dim=1, keepdim=True)
    elif "rms" not in type(norm).__name__.lower():
        raise ValueError(f"timm_model: the key norm {type(norm).__name__} has no known linear part")
    gain = getattr(norm, "weight", None)
    return (heads if gain is None else heads * gain.detach().unsqueeze(-1)).reshape(weight.shape)
