"""CODA-Prompt: prompts put together from components by soft weights (Smith et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cl_kernels.methods._options import Options, count, require
from cl_kernels.methods._pools import PoolMethod, PoolOptions, even, first
from cl_kernels.nn import CODAPrompt as Pool

__all__ = ["CODAPrompt", "CODAPromptOptions"]


@dataclass(frozen=True, kw_only=True)
class CODAPromptOptions(PoolOptions):
    """Options of `coda-prompt`.

    * components: that a task adds.
    * length: rows of a component, half keys and half values.
    * blocks: the first so many have prompts (None: five, or all of a smaller backbone).
    * orthogonalize: new components by "qr", or by the "published" Gram-Schmidt.
    """

    components: int = 10
    length: int = 8
    blocks: int | None = None
    orthogonalize: str = "qr"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("components", count(self.components, 1, 65536), "an int in [1, 65536]", self.components)
        even("length", self.length)
        require("blocks", self.blocks is None or count(self.blocks, 1, 4096), "None or an int >= 1", self.blocks)
        require("orthogonalize", self.orthogonalize in ("qr", "published"), "qr or published", self.orthogonalize)

    def pool(self, backbone: nn.Module, *, query_dim: int | None = None) -> Pool:
        """The pool for a backbone."""
        return Pool.of(
            backbone,
            components=self.components,
            length=self.length,
            layers=first("blocks", self.blocks, backbone),
            orthogonalize=self.orthogonalize,
            query_dim=query_dim,
        )


class CODAPrompt(PoolMethod):
    """Each block's prompt is a sum of components weighted by the image's query; a task trains the ones it added.

    Earlier components, keys and attentions stay bit for bit, but every image sees the new ones too, so that features of
    earlier tasks move with them. See `nn.CODAPrompt`."""

    name: ClassVar[str] = "coda-prompt"
    options_type: ClassVar[type[Options]] = CODAPromptOptions
    default_lr: ClassVar[float] = 5e-3  # of 1e-3, 5e-3, 2e-2 and 0.1 the best on new digits, where 2e-2 forgets
