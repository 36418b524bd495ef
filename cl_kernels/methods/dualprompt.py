"""DualPrompt: prompts that all tasks share, and prompts of each task found by a key (Wang et al., ECCV 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._pools import PoolMethod, PoolOptions, even
from cl_kernels.nn import DualPrompt as Pool

__all__ = ["DualPrompt", "DualPromptOptions"]


@dataclass(frozen=True, kw_only=True)
class DualPromptOptions(PoolOptions):
    """Options of `dualprompt`.

    * general, expert: numbers of blocks with prompts of all tasks, and of those after them with prompts of each task.
      None for both: 2 and 3 as published, n // 2 and the others in a backbone of n < 5 blocks.
    * general_length, length: rows of the two kinds of prompts, half keys and half values.
    * size: entries drawn in advance; more tasks add more.
    * candidates: "seen" chooses among the tasks so far; "all" also among entries not trained yet, as published.
    * pull: factor of the loss that draws a task's key to its queries.
    """

    general: int | None = None
    expert: int | None = None
    general_length: int = 6
    length: int = 20
    size: int = 10
    candidates: str = "seen"
    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("general", "expert"):
            value = getattr(self, name)
            require(name, value is None or count(value, 0, 4096), "None or an int in [0, 4096]", value)
        pair = (self.general is None) == (self.expert is None)
        require("expert", pair, "a number where general is one, and None where it is None", self.expert)
        even("general_length", self.general_length)
        even("length", self.length)
        require("size", count(self.size, 1, 65536), "an int in [1, 65536]", self.size)
        require("candidates", self.candidates in ("seen", "all"), "seen or all", self.candidates)
        require("pull", number(self.pull, 0.0, 1e6), "a number in [0, 1e6]", self.pull)

    def pool(self, backbone: nn.Module, *, query_dim: int | None = None) -> Pool:
        """The pool for a backbone."""
        general: range | None = None
        expert: range | None = None
        if self.general is not None and self.expert is not None:
            depth, last = len(list(getattr(backbone, "blocks", nn.Module()).children())), self.general + self.expert
            require("expert", last <= depth, f"with general at most the {depth} blocks of the backbone", self.expert)
            general, expert = range(self.general), range(self.general, last)
        return Pool.of(
            backbone,
            size=self.size,
            length=self.length,
            general_length=self.general_length,
            general=general,
            expert=expert,
            pull=self.pull,
            candidates=self.candidates,
            query_dim=query_dim,
        )


class DualPrompt(PoolMethod):
    """G-prompts in the first blocks, trained by all tasks, and in the next ones an E-prompt of each task.

    A test image gets the E-prompt whose key is nearest to its query: a guess of the task, made for each image by
    itself. E-prompts and keys of earlier tasks do not change; G-prompts do. See `nn.DualPrompt`."""

    name: ClassVar[str] = "dualprompt"
    options_type: ClassVar[type[Options]] = DualPromptOptions
    default_lr: ClassVar[float] = 5e-3  # of 1e-3, 5e-3, 2e-2 and 0.1 the best on new digits, with 2e-2
