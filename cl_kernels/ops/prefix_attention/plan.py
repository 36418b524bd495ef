"""Merge or concatenate: which of the two forms is faster, by shape.

CPU: torch's attention over concatenated keys is one well-blocked pass and a copy costs little beside it, so for as
many queries as keys the merge takes 1.03 to 1.2 times as long, whatever the prefix. It wins where the copies of k and
v are large and little else is done (few queries: 0.65 to 0.95 of the time at 64 images), where a shared prefix is much
longer than the tokens (0.3 to 0.9) and where only the prefix trains, as no gradient of the tokens is formed then (0.45
to 0.75). Measured on one thread of a Zen 5, float32.

CUDA, by bytes and not measured. In units of one tensor of the queries' size, r = M / N and a shared prefix, forward
takes 8 + 4 r concatenated (4 + 2 r of it the copies) and 7 merged; backward 8 + 6 r and 16. So the merge wins without
gradients, with few queries and where only the prefix trains; else from r = 0.7 on.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["ALIGNED", "WIDEST", "how", "merges", "unsupported"]

ALIGNED: Final = 8  # widths and strides the Triton kernels take are multiples of it (kernels.py)
WIDEST: Final = 128  # head that they take
FEW: Final = 8  # so many times fewer queries than keys count as few
LARGE: Final = 16 << 20  # bytes of concatenated keys and values from which copies leave the caches of a CPU
MANY: Final = 1 << 20  # scores from which the token gradients that are saved outweigh what a call of ours costs
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why the Triton kernels do not take heads of this dtype and width; None where they do."""
    if dtype not in _DTYPES:
        return f"no fused attention gives the log-sum-exp of {dtype}"
    if width % ALIGNED or width > WIDEST:
        return f"heads {width} wide; expected a multiple of {ALIGNED}, at most {WIDEST}"
    return None


def merges(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> bool:
    """Whether merging beats concatenation for these arguments."""
    batch, heads, queries, width = q.shape
    keys, prefix, shared = k.shape[2], prefix_k.shape[2], len(prefix_k) == 1
    tracked = torch.is_grad_enabled() and (prefix_k.requires_grad or prefix_v.requires_grad)
    for_tokens = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few, prefix_alone = FEW * queries <= keys + prefix, tracked and not for_tokens
    if q.device.type == "cuda":
        fits = unsupported(q.dtype, width) is None
        return fits and (few or prefix_alone or not for_tokens or 4 * prefix >= 3 * keys)
    if q.device.type != "cpu":
        return False
    if prefix_alone and (shared or prefix <= keys) and batch * heads * queries * (keys + prefix) >= MANY:
        return True
    large = 2 * batch * heads * (keys + prefix) * width * q.element_size() >= LARGE
    return large and (few or (shared and prefix >= 2 * keys and width >= 32))


def how(*arguments: object) -> str | None:
    """For `explain`: the form that the public function takes for these arguments."""
    tensors = [x for x in arguments if isinstance(x, Tensor) and x.ndim == 4]
    if len(tensors) != 5:
        return None
    if merges(*tensors):
        return "merged by log-sum-exp"
    return "by concatenation and torch's attention, which is faster for these shapes"
