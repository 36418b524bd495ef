"""`nn.MultiheadAttention`: its projections are weights of one module, and none of them is called as a module.

A hook on the attention itself sees query, key and value, which are the rows of the input projections. What the output
projection sees stays inside: the attention is run a second time with an identity in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["is_watched", "rows_of", "weight_of", "weights"]

_FORWARD = inspect.signature(nn.MultiheadAttention.forward)
_INPUTS = {"in_proj_weight": 3, "q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2, "out_proj.weight": 4}


def is_watched(module: nn.Module) -> bool:
    """Whether `module` computes as torch's own class does; the children of others are layers like any other."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def weights(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Its projection weights by attribute name."""
    return {part: weight for part in _INPUTS if (weight := weight_of(module, part)) is not None}


def weight_of(module: Any, part: str) -> Any:
    """The weight behind an attribute name, None where there is none."""
    return module.out_proj.weight if part == "out_proj.weight" else getattr(module, part)


def rows_of(module: nn.MultiheadAttention, part: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors [..., d] whose rows multiply the weight `part` in the call with these arguments.

    One projector serves all three thirds of in_proj_weight, so it sees query, key and value, each distinct one once.
    """
    bound = _FORWARD.bind(module, *args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    inputs = [call["query"], call["key"], call["value"]]
    if part == "out_proj.weight":
        return _attended(module, inputs, call)
    if part != "in_proj_weight":
        return [inputs[_INPUTS[part]]]
    distinct: list[Tensor] = []
    for x in inputs:
        if not any(_same(x, other) for other in distinct):
            distinct.append(x)
    return distinct


def _same(x: Tensor, y: Tensor) -> bool:
    if x is y or x.is_nested or y.is_nested:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _attended(module: nn.MultiheadAttention, inputs: list[Tensor], call: Mapping[str, Any]) -> list[Tensor]:
    """What the output projection would see: exact, because x 1 + 0 rounds nothing (TF32 products round x)."""
    if inputs[0].is_nested:  # torch has the whole function only for padded tensors
        each = zip(*(x.unbind() for x in inputs), strict=True)
        unmasked = {**call, "key_padding_mask": None, "attn_mask": None, "is_causal": False}
        return [rows for items in each for rows in _attended(module, list(items), unmasked)]
    size = module.embed_dim
    identity = torch.eye(size, dtype=module.out_proj.weight.dtype, device=module.out_proj.weight.device)
    swapped = module.batch_first and inputs[0].ndim == 3
    q, k, v = (x.transpose(0, 1) for x in inputs) if swapped else inputs
    with torch.no_grad():
        out, _ = F.multi_head_attention_forward(
            q,
            k,
            v,
            size,
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            identity,
            None,
            training=False,
            key_padding_mask=call["key_padding_mask"],
            need_weights=False,
            attn_mask=call["attn_mask"],
            is_causal=call["is_causal"],
            use_separate_proj_weight=module.in_proj_weight is None,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
        )
    return [out]
