"""What a projecting method remembers of its tasks, and how projectors come of it.

Two kinds: sums of second moments, cut anew after every task (null-space, adam-nscl, nsp2), and bases that only grow,
task by task (gpm). Both are keyed by parameter name and side, and have a constant size or an upper bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cl_kernels.ops import Projector
from cl_kernels.ops.null_space import null_space_projector
from cl_kernels.ops.rules import Rule
from cl_kernels.subspace import Covariance, grow_basis
from cl_kernels.subspace._algebra import Form
from cl_kernels.subspace._merge import freed

__all__ = ["Accumulated", "Cut", "Found", "Grown", "Made", "Memory"]

Found = dict[str, dict[str, Covariance]]
"""What one task's pass gave: by parameter, by side."""

Made = dict[str, dict[str, tuple[Projector, Tensor]]]
"""By parameter, by side: a projector, and the second moment that says what it protects."""

Fold = Callable[[str, str, Tensor], Tensor]


class Memory(Protocol):
    """What is kept from task to task."""

    def remember(self, found: Found, images: int) -> Made:
        """Take in one task of `images` images; the projectors for the tasks to come."""

    def state(self) -> dict[str, Any]:
        """Tensors and numbers for a checkpoint."""

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state` gave."""


class Cut(NamedTuple):
    """B = mix P / (||P||_F if normalize == "fro" else 1) + (1 - mix) I, P the projector onto what `rule` leaves
    free. `solver`: "eigh" cuts hard, "filter" with a soft edge."""

    rule: Rule
    mix: float = 1.0
    normalize: Literal["fro"] | None = None
    solver: Literal["eigh", "filter"] = "eigh"


class Accumulated:
    """Second moments added up over tasks; the subspace is chosen anew from the total after each.

    `cuts`: by side; sides without one are accumulated and not projected. `accumulation`: "sum" adds what tasks give,
    "images" averages it by numbers of images, "rows" averages over all rows, whatever the sizes of tasks and batches.
    `fold(name, side, matrix)` is what projectors see of a moment. State: one matrix a parameter and side."""

    def __init__(self, cuts: Mapping[str, Cut], accumulation: str = "sum", fold: Fold | None = None) -> None:
        self.cuts, self.accumulation, self.fold = cuts, accumulation, fold
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self.images = 0
        self.rows: dict[str, dict[str, float]] = {}

    def remember(self, found: Found, images: int) -> Made:
        before, self.images = self.images, self.images + images
        made: Made = {}
        for name, sides in found.items():
            for side, moment in sides.items():
                old = self.statistics.setdefault(name, {}).get(side)
                rows = self.rows.setdefault(name, {}).get(side, 0.0)
                self.rows[name][side] = rows + moment.count
                mine, theirs = 1.0, 1.0
                if self.accumulation == "images":
                    mine, theirs = images / self.images, before / self.images
                elif self.accumulation == "rows":
                    mine, theirs = 1 / (rows + moment.count), rows / (rows + moment.count)
                total = mine * moment.matrix if old is None else mine * moment.matrix + theirs * old
                self.statistics[name][side] = total
                if side in self.cuts:
                    seen = total if self.fold is None else self.fold(name, side, total)
                    rule, mix, normalize, solver = self.cuts[side]
                    # not "auto": the same edge on every device; once a task it may cost what it does
                    projector = null_space_projector(seen, rule, mix=mix, normalize=normalize, solver=solver)
                    made.setdefault(name, {})[side] = projector, seen
        return made

    def state(self) -> dict[str, Any]:
        return {"statistics": _copied(self.statistics), "images": self.images, "rows": _copied(self.rows)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.statistics = _moved(state["statistics"], device)
        self.images, self.rows = state["images"], _copied(state["rows"])


class Grown:
    """Orthonormal bases of what the tasks used; each task adds directions until its own energy is captured.

    `keep(task, parameter)` is the share of the task's trace to capture; `short_first` leaves the first task one
    direction short, as GPM's code does. State: at most one [d, d] matrix a parameter and side, and none of the
    moments."""

    def __init__(self, keep: Callable[[int, str], float], sides: Collection[str], short_first: bool) -> None:
        self.keep, self.sides, self.short_first = keep, sides, short_first
        self.bases: dict[str, dict[str, Tensor]] = {}
        self.tasks = 0

    def remember(self, found: Found, images: int) -> Made:
        made: Made = {}
        for name, sides in found.items():
            mine = self.bases.setdefault(name, {})
            for side, moment in sides.items():
                if side not in self.sides:
                    continue
                c, short = moment.matrix, self.short_first and self.tasks == 0
                mine[side] = grow_basis(mine.get(side), c, self.keep(self.tasks, name), short=short).basis
                projector = freed(f"{name} ({side})", Form(mine[side], 1.0, False), mine[side], "freeze")
                made.setdefault(name, {})[side] = projector, c
        self.tasks += 1
        return made

    def state(self) -> dict[str, Any]:
        return {"bases": _copied(self.bases), "tasks": self.tasks}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.bases, self.tasks = _moved(state["bases"], device), state["tasks"]


def _copied(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: dict(sides) for name, sides in values.items()}


def _moved(tensors: dict[str, dict[str, Tensor]], device: torch.device) -> dict[str, dict[str, Tensor]]:
    return {name: {side: tensor.to(device) for side, tensor in sides.items()} for name, sides in tensors.items()}
