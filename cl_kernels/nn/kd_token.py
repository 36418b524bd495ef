"""What KDP adds to a student: one token, short prefixes behind the tokens, and a head that reads the token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.nn.prompt_pool import at_least_one, even, pairs, uniform

__all__ = ["DECOUPLE", "KDHead", "KDToken"]

DECOUPLE = ("none", "mask", "stopgrad")


class KDToken(nn.Module):
    """The KD token u [1, D] and KD prompts G^l [length, D] of KDP (arXiv 2407.13911, v3): equal for all images, without
    keys, trained in every task.

    The token joins the rows after the patches, before block 0, and has no position. Blocks 1..blocks-1 get G^l as a
    prefix, its first half as keys and its second as values; block 0 gets none, as in the code (the figure draws one).
    `blocks` 0 or `length` 0 means no prompts, `token=False` prompts alone, `prompts=False` the token alone (DeiT's
    form). All start as U[0, 1).

    decouple: "none" as published: the class loss reaches u and G because image rows attend to them, and the KD loss
    reaches the pool. "mask": image rows attend neither to u nor to G, and the token not to the pool's prompts: the
    class feature is exactly that of a model without KDToken. "stopgrad": the forward pass of "none", but each side
    sees the other's keys and values as constants: the class loss gives u and G no gradient, the KD loss gives the pool
    none. Raises `ValueError` for an odd length and for values out of range.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        heads: int,
        length: int = 6,
        token: bool = True,
        prompts: bool = True,
        decouple: str = "none",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if at_least_one("dim", dim) % at_least_one("heads", heads):
            raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 0:
            raise ValueError(f"blocks: expected a whole number >= 0, got {blocks!r}")
        if decouple not in DECOUPLE:
            raise ValueError(f"decouple: expected one of {', '.join(DECOUPLE)}, got {decouple!r}")
        if decouple != "none" and not token:
            raise ValueError(f"decouple: {decouple!r} parts the token from the image rows, and there is no token")
        self.dim, self.heads, self.blocks, self.decouple = dim, heads, blocks, decouple
        rows = even("length", length, low=0)
        self.token = nn.Parameter(uniform(1, dim, generator=generator)) if token else None
        layers = range(1, blocks) if prompts and rows else range(0)
        self.prompts = nn.ParameterDict(
            {str(layer): nn.Parameter(uniform(rows, dim, generator=generator)) for layer in layers}
        )

    @torch.no_grad()
    def start(self, token: Tensor) -> None:
        """Start the token as `token` [D], a row that the backbone knows, and the prompts as zeros: they then take a
        share of the attention and add nothing to it. Raises `ValueError` for another width."""
        if token.shape != (self.dim,):
            raise ValueError(f"token: expected shape ({self.dim},), got {tuple(token.shape)}")
        if self.token is not None:
            self.token.copy_(token)
        for prompt in self.prompts.values():
            prompt.zero_()

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [1, H, length / 2, dh] of block `layer`, or None."""
        if str(layer) not in self.prompts:
            return None
        return pairs(self.prompts[str(layer)].unsqueeze(0), self.heads)


class KDHead(nn.Linear):
    """The head [C, D] that reads the KD token; started as torch's linear layers are."""

    def __init__(self, dim: int, classes: int, **options: Any) -> None:
        super().__init__(dim, classes, **options)

    def forward(self, features: Tensor, classes: slice | None = None) -> Tensor:
        """Logits [B, C] of features [B, D], or those of a slice of the classes, computed from its rows alone."""
        if classes is None:
            return F.linear(features, self.weight, self.bias)
        return F.linear(features, self.weight[classes], None if self.bias is None else self.bias[classes])

    @staticmethod
    def blend(class_logits: Tensor, kd_logits: Tensor, alpha: float = 0.5) -> Tensor:
        """``(1 - alpha) z_c + alpha z_d``, by which a student predicts; 0 gives the class head, 1 the KD head."""
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
        if class_logits.shape != kd_logits.shape:
            shapes = tuple(class_logits.shape), tuple(kd_logits.shape)
            raise ValueError(f"kd_logits: expected the shape of class_logits {shapes[0]}, got {shapes[1]}")
        return torch.lerp(class_logits, kd_logits, alpha)
