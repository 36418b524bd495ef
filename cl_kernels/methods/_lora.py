"""What the methods with one LoRA adapter a task share: the stack, its optimizer, and how a snapshot is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._task import Batches, Task
from cl_kernels.methods._task_inference import TaskInference
from cl_kernels.nn import LoRAStack

__all__ = ["INFERENCES", "LoRAMethod", "LoRAOptions"]

INFERENCES = ("last", "instance", "batch", "known")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(Options):
    """Options of methods with LoRA adapters.

    * rank, alpha: dW = (alpha / rank) A B for every adapter.
    * positions: of each block, some of "q k v proj fc1 fc2", separated by spaces.
    * penalty: factor of the orthogonality term in the loss.
    * inference: which snapshot sees a test image. "last": the newest model for all. "instance": that of the task
      inferred for the image by itself. "batch": one for the whole batch, by vote: since a batch holds one task, this is
      nearly being told the task, and numbers of other protocols may not be compared with it. "known": the task of a
      image is given through `assume_task` (an upper bound).
    * clusters: of each class, for the inference.
    """

    rank: int = 8
    alpha: float = 8.0
    positions: str = "q k v proj fc1 fc2"
    penalty: float = 0.0
    inference: str = "last"
    clusters: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require("rank", count(self.rank, 1, 4096), "an int in [1, 4096]", self.rank)
        require("alpha", number(self.alpha, 1e-6, 1e6), "a number in [1e-6, 1e6]", self.alpha)
        require("penalty", number(self.penalty, 0.0, 1e6), "a number in [0, 1e6]", self.penalty)
        require("inference", self.inference in INFERENCES, f"one of {', '.join(INFERENCES)}", self.inference)
        require("clusters", count(self.clusters, 1, 64), "an int in [1, 64]", self.clusters)
        words = self.positions.split() if isinstance(self.positions, str) else [""]
        known = {"q", "k", "v", "proj", "fc1", "fc2"}
        require("positions", bool(words) and set(words) <= known, "some of q k v proj fc1 fc2", self.positions)


class LoRAMethod(HeadMethod):
    """One adapter a task on a frozen backbone. Timeline of a task: begin the adapters, train, keep a snapshot and the
    clusters of the task's features, evaluate."""

    options_type: ClassVar[type[Options]] = LoRAOptions
    default_lr: ClassVar[float] = 2e-3
    default_weight_decay: ClassVar[float] = 0.0
    composition: ClassVar[str] = "sum"
    orthogonality: ClassVar[str | None] = None
    options: LoRAOptions
    model: LoRAStack

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.inference = TaskInference(self.options.clusters)
        self._assumed: int | None = None
        self._seed = int(torch.randint(2**31, ()))  # adapters of later tasks are drawn alike in a resumed run

    @property
    def protocol(self) -> str:
        """How a test image finds its model; results of different protocols may not be compared."""
        told = {
            "last": "last model for every image",
            "instance": "snapshot of the task inferred for each image alone",
            "batch": "snapshot by vote over a test batch of one task (nearly told the task)",
            "known": "snapshot of the true task",
        }
        return told[self.options.inference]

    def assume_task(self, task: int | None) -> None:
        self._assumed = task

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        return LoRAStack(
            backbone,
            rank=self.options.rank,
            alpha=self.options.alpha,
            positions=self.options.positions.split(),
            composition=self.composition,
            orthogonality=self._enforcement(),
        )

    def _enforcement(self) -> Any:
        return "penalty"

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        return self.model.trainable_parameters() if self.model.training_task else []

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adam(groups, betas=self.options.betas, eps=self.options.eps, foreach=True)

    def _regulariser(self) -> Tensor | None:
        return self.options.penalty * self.model.penalty() if self.options.penalty else None

    def _initial(self, task: Task) -> dict[str, Tensor] | None:
        """Down-projections that the task starts from; None for random ones."""
        return None

    def _start(self, task: Task) -> None:
        self.model.generator = torch.Generator().manual_seed(self._seed + self.model.task + 1)
        self.model.begin_task(self._initial(task))

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        self.model.end_task()
        if self.options.inference in ("instance", "batch"):
            with self.model.at(0):
                self.inference.remember(self.model.task, ((self.model(images), labels) for images, labels in loader))

    def features(self, images: Tensor) -> Tensor:
        """Features of the live model while a task trains; afterwards those of the snapshot that `inference` says."""
        features: Tensor
        if self.model.training_task or self.options.inference == "last" or self.model.task < 1:
            features = self.model(images)
            return features
        return self._by_task(images, self._tasks(images))

    def _tasks(self, images: Tensor) -> Tensor:
        if self.options.inference == "known":
            if self._assumed is None:
                raise RuntimeError("inference: 'known' needs assume_task() before images are shown")
            return torch.full((len(images),), self._assumed, device=images.device)
        with torch.no_grad(), self.model.at(0):
            tasks = self.inference.tasks_of(self.model(images))
        vote = self.options.inference == "batch" and len(tasks) > 0
        return tasks.mode().values.expand_as(tasks) if vote else tasks

    def _by_task(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Each image through the snapshot of its task: one forward pass for every task that occurs."""
        found: Tensor | None = None
        for task in tasks.unique().tolist():
            chosen = (tasks == task).nonzero().flatten()
            with self.model.at(task):
                part: Tensor = self.model(images[chosen])
            found = part.new_empty(len(images), part.shape[1]) if found is None else found
            found = found.index_copy(0, chosen, part)
        if found is None:
            return self.model(images)  # type: ignore[no-any-return]  # an empty batch
        return found

    def _state(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.model.state_dict().items() if _of_adapters(name)}
        return {"stack": kept, "inference": self.inference.state(), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the stack first, whose shapes depend on the tasks so far."""
        self.model.load_state_dict(state["own"]["stack"], strict=False)
        super().load_state_dict(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        self.inference.load(state["inference"], self.device)
        self._seed = state["seed"]


def _of_adapters(name: str) -> bool:
    return ".adapters." in name or name == "_extra_state"
