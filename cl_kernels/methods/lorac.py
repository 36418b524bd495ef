"""LoRAC and LoRAC-IPC: orthogonal adapters with learnable shares, and freezing of what matters (arXiv 2504.13407)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.methods._lora import LoRAMethod, LoRAOptions
from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._task import Batch, Batches, Task

__all__ = ["LoRAC", "LoRACIPC", "LoRACIPCOptions", "LoRACOptions"]


@dataclass(frozen=True, kw_only=True)
class LoRACOptions(LoRAOptions):
    """As `LoRAOptions`, and:

    * orthogonality: "penalty" as published, "qr" exactly at every step, "absorb" the penalty and a QR at a task's end.
    * omega_scale: factor on the learning rate of the shares of earlier adapters.
    * inference: "instance" by default. The paper's headline is of "batch".
    """

    penalty: float = 0.5
    inference: str = "instance"
    orthogonality: str = "penalty"
    omega_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("penalty", "qr", "absorb")
        require("orthogonality", self.orthogonality in known, f"one of {', '.join(known)}", self.orthogonality)
        require("omega_scale", number(self.omega_scale, 0.0, 1e6), "a number in [0, 1e6]", self.omega_scale)


class LoRAC(LoRAMethod):
    """Task t trains A_t, B_t and the shares omega_i of all earlier adapters; a snapshot of the shares is kept.

    With the snapshot of its task an old image sees exactly the backbone it was learned with, so what is forgotten is
    what the inference of the task and the heads get wrong. The orthogonality term lambda sum ||[A_old, A]^T
    [A_old, A] - I||_F is the official code's; "qr" makes it unnecessary (a variant of ours: the official code has no
    QR). Traps of the official code that cannot occur (method-lora-composition.md 8): K gated by Q's mask (1); dense
    updates formed in every forward pass (16, 17); weight decay that reaches earlier tasks (8); evaluation that votes
    over a batch of one task unless asked to (7). Its head re-alignment (TAP) is not here."""

    name: ClassVar[str] = "lorac"
    options_type: ClassVar[type[Options]] = LoRACOptions
    composition: ClassVar[str] = "lorac"
    options: LoRACOptions

    def _enforcement(self) -> Any:
        return self.options.orthogonality

    def _regulariser(self) -> Tensor | None:
        return None if self.options.orthogonality == "qr" else super()._regulariser()

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return super()._new_optimizer(_with_omega_apart(groups, self.options.omega_scale))


@dataclass(frozen=True, kw_only=True)
class LoRACIPCOptions(LoRACOptions):
    """As `LoRACOptions`, and:

    * share: of all positions that each task freezes for good, int(share * positions) of them.
    * window: steps at the end of a task in which importance is measured; 96 differ from all by less than 1.5e-5 of a
      score.
    """

    share: float = 0.05
    window: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        require("share", number(self.share, 0.0, 1.0), "a number in [0, 1]", self.share)
        require("window", count(self.window, 1, 10**9), "an int >= 1", self.window)


class LoRACIPC(LoRAC):
    """LoRAC that after each task freezes for good the positions whose weights matter most to it.

    Importance of a position: the running mean of mean |W * dL/dW| times its running deviation, W = W_0 + dW, over the
    last steps of the task. A frozen position keeps its update bit for bit in all later tasks: no new adapter, shares
    pinned, no penalty. Traps of the official code that cannot occur: int(share * n) = 0 fails, ties freeze more than
    asked for, fewer scores than asked for freeze everything (5); a host synchronisation a matrix and step (6)."""

    name: ClassVar[str] = "lorac-ipc"
    options_type: ClassVar[type[Options]] = LoRACIPCOptions
    options: LoRACIPCOptions

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self._steps = [0]  # of this task, by epoch
        self.frozen_by_task: list[list[str]] = []

    def _start(self, task: Task) -> None:
        super()._start(task)
        self._steps = [0]

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """As `LoRAC`; in the last steps of a task its backward pass measures importance."""
        epoch = 0 if self.scheduler is None else int(self.scheduler.last_epoch)
        while len(self._steps) <= epoch:
            self._steps.append(0)
        self._steps[epoch] += 1
        with self.model.record_importance() if self._near_the_end(epoch) else nullcontext():
            return super().loss(batch, *facts)

    def _near_the_end(self, epoch: int) -> bool:
        """Whether no more than `window` steps are left, counted by the length of the first epoch."""
        epochs = self.tasks[-1].epochs
        if epochs <= 1 or epoch == 0:
            return epochs <= 1
        return (epochs - epoch) * self._steps[0] - self._steps[epoch] < self.options.window

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        share = 0.0 if self.tasks[-1].last else self.options.share
        if int(share * len(self.model.places())) and self.model.importance is None:
            raise RuntimeError(
                f"end_task: no step of the last {self.options.window} was seen, so importance is not known; train all "
                f"{self.tasks[-1].epochs} epochs of the task and call scheduler.step() after each"
            )
        super()._finish(task, loader)
        self.frozen_by_task.append(self.model.freeze_important(share))

    def _state(self) -> dict[str, Any]:
        importance = self.model.importance
        return super()._state() | {
            "steps": list(self._steps),
            "frozen": [list(names) for names in self.frozen_by_task],
            "importance": None if importance is None else importance.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._steps, self.frozen_by_task = list(state["steps"]), [list(names) for names in state["frozen"]]
        if state["importance"] is not None:
            moved = {name: value.to(self.device) for name, value in state["importance"].items()}
            with self.model.record_importance() as importance:
                importance.load_state_dict(moved)


def _with_omega_apart(groups: list[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """The shares of earlier adapters in a group of their own, at `scale` times the rate."""
    made: list[dict[str, Any]] = []
    for group in groups:
        named = [(name, parameter) for name, parameter in group["params"]]
        omegas = [pair for pair in named if pair[0].endswith(".omega")]
        made.append(group | {"params": [pair for pair in named if not pair[0].endswith(".omega")]})
        if omegas:
            made.append(group | {"params": omegas, "lr": group["lr"] * scale})
    return [group for group in made if group["params"]]
