"""L2P: the nearest prompts of a pool that all tasks share (Wang et al., CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._pools import PoolMethod, PoolOptions, even, first
from cl_kernels.nn import L2P as Pool

__all__ = ["L2P", "L2POptions"]


@dataclass(frozen=True, kw_only=True)
class L2POptions(PoolOptions):
    """Options of `l2p`; the pool's are those of CODA-Prompt's code.

    * size, top: prompts in the pool, and how many of them an image gets.
    * length: rows of a prompt, half keys and half values.
    * blocks: the first so many have a pool (None: one).
    * pull: factor of the loss that draws the selected keys to the query.
    """

    size: int = 30
    length: int = 20
    top: int = 5
    blocks: int | None = None
    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("size", count(self.size, 1, 65536), "an int in [1, 65536]", self.size)
        require("top", count(self.top, 1, self.size), f"an int in [1, size = {self.size}]", self.top)
        even("length", self.length)
        require("blocks", self.blocks is None or count(self.blocks, 1, 4096), "None or an int >= 1", self.blocks)
        require("pull", number(self.pull, 0.0, 1e6), "a number in [0, 1e6]", self.pull)

    def pool(self, backbone: nn.Module, *, query_dim: int | None = None) -> Pool:
        """The pool for a backbone."""
        return Pool.of(
            backbone,
            size=self.size,
            length=self.length,
            top=self.top,
            layers=first("blocks", self.blocks, backbone),
            pull=self.pull,
            query_dim=query_dim,
        )


class L2P(PoolMethod):
    """Every image gets the `top` prompts whose keys are nearest to its query, as keys and values of the first block.

    All tasks train the same prompts: nothing is protected but what is not selected. See `nn.L2P`."""

    name: ClassVar[str] = "l2p"
    options_type: ClassVar[type[Options]] = L2POptions
    default_lr: ClassVar[float] = 5e-3  # of 1e-3, 5e-3, 2e-2 and 0.1 the best on new digits, where 2e-2 forgets
