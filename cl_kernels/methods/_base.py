"""What all methods share: heads, the loss over a task's own classes, an optimizer per task, and a state to save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cl_kernels.methods._features import FrozenFeatures, feature_dim
from cl_kernels.methods._groups import matrices_apart
from cl_kernels.methods._heads import Heads, class_means
from cl_kernels.methods._options import Options
from cl_kernels.methods._schedule import multipliers
from cl_kernels.methods._task import Batch, Batches, Task, TaskRecord

__all__ = ["HeadMethod"]


class HeadMethod:
    """Base of the methods: a feature extractor with a body that may train, and heads over its features.

    A subclass names its body's parameters and makes its optimizer. `backbone` is taken over, not copied: a method may
    train its weights in place. Parameters are keyed by the names of `trainable_parameters()`.
    """

    name: ClassVar[str] = ""
    options_type: ClassVar[type[Options]] = Options
    default_lr: ClassVar[float] = 1e-2
    default_weight_decay: ClassVar[float] = 5e-5
    phases: tuple[str, ...] = ("train",)
    held_out: float = 0.0
    needs_teacher: bool = False
    scope: str = "task"
    frozen: bool = False

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        self.options = options
        self.model = self._wrap(backbone)
        parameter = next(self.model.parameters())
        self._like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.heads = Heads(feature_dim(backbone), options.head, options.head_scale)
        self.tasks: list[TaskRecord] = []
        self.optimizer: Optimizer | None = None
        self.scheduler: LambdaLR | None = None
        self.phase = 0
        self.teacher: HeadMethod | None = None
        self._current = -1  # number of the head that the current task trains

    # What a subclass says ------------------------------------------------------------------------------------------

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        """The module whose call gives features [B, D]."""
        return FrozenFeatures(backbone)

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters besides the heads, by name."""
        return []

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """An optimizer of the method's kind. `groups`: body, then heads, each with named parameters and its own lr."""
        return torch.optim.Adam(groups, betas=self.options.betas, eps=self.options.eps, foreach=True)

    def _body_groups(self, body: list[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """The optimizer's groups for the body, the highest learning rate first."""
        return [{"params": body, "lr": lr, "weight_decay": self._weight_decay()}] if body else []

    def _undecayed(self) -> set[str]:
        """Parameters of the body that `decay="matrices"` leaves out, besides vectors."""
        return set()

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of one task, with all that the method binds to it."""
        return self._new_optimizer(groups)

    def _regulariser(self) -> Tensor | None:
        """A term added to the loss."""
        return None

    def _start(self, task: Task) -> None:
        """Before the heads of `task` are initialised."""

    def _finish(self, task: Task, loader: Batches) -> None:
        """After `task` was trained; `loader` gives its images in order."""

    def _state(self) -> dict[str, Any]:
        """Further state to save."""
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take back what `_state` gave."""

    def _body_scale(self) -> float:
        """Factor on the body's learning rate in this task."""
        return 1.0

    # The protocol --------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[int]:
        """The labels seen so far, in the order of `predict`'s columns."""
        return self.heads.classes

    @property
    def backbone(self) -> nn.Module:
        """The timm model inside."""
        return self.model.get_submodule("backbone")

    def modules(self) -> list[nn.Module]:
        """All that predicts."""
        return [self.model, self.heads]

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def protocol(self) -> str:
        """How a test image finds its model; numbers of different protocols may not be compared."""
        return "one model for every image"

    def set_teacher(self, backbone: nn.Module, adapt: Callable[[Tensor], Tensor]) -> None:
        """Take over the backbone of a teacher; `adapt` turns this method's images into the teacher's."""
        raise ValueError(f"teacher: {self.name} learns from no teacher")

    def assume_task(self, task: int | None) -> None:
        """Tell which task the next test images are from; only a protocol that says so listens."""

    def begin_task(self, task: Task) -> None:
        """Add the task's head, initialise it, and make a new optimizer: moments are reset at every task."""
        record = TaskRecord.of(task)
        if self.optimizer is not None:
            raise RuntimeError(f"begin_task: task {self.tasks[-1].index} has not been ended")
        self._current, new = self.heads.extend(record.classes, self._like)
        self.tasks.append(record)
        self._start(task)
        self._init_head(task, new)
        self._make_optimizer()

    def resume_task(self, task: Task) -> None:
        """Look at a task again whose state `load_state_dict` has brought back; called in place of `begin_task`."""

    def end_task(self, task: Task, loader: Batches) -> None:
        """Remember what later tasks need, and drop the optimizer."""
        self.optimizer = self.scheduler = None
        self._finish(task, loader)

    def begin_phase(self, phase: int) -> None:
        """Go on to phase `phase` of the task that is being trained."""
        raise RuntimeError(
            f"begin_phase: {self.name} has the phases {', '.join(self.phases)}, and none is number {phase}"
        )

    def per_image(self, images: Tensor) -> tuple[Tensor, ...]:
        """What `loss` needs of each image and this phase's training does not change; empty where there is nothing."""
        return ()

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """Mean cross-entropy over the task's own classes (all seen ones where `scope` is "seen"), logits / temperature,
        in float32 at least, plus the method's own term."""
        images, labels = batch
        loss = self._cross_entropy(self.features(images), labels)
        extra = self._regulariser()
        return loss if extra is None else loss + extra

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of normalised images [B, C, H, W]; a frozen method passes features through."""
        if self.frozen and images.ndim == 2:
            return images
        features: Tensor = self.model(images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, classes seen] of features, columns in the order of `classes`."""
        logits: Tensor = self.heads(features)
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes seen] of normalised images, without gradient."""
        return self.logits(self.features(images))

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the current task trains: the body and its head (all heads where `scope` is "seen")."""
        return [*self._body(), *self._head_parameters()]

    def subspace(self) -> dict[str, dict[str, dict[str, float]]]:
        """What is protected from the next task's updates, for results.json; empty where nothing is."""
        return {}

    def prompt_usage(self) -> dict[str, list[float]]:
        """By block, what share of the last task's images chooses each entry of a prompt pool, for results.json; empty
        for a method without one."""
        return {}

    def anchoring(self) -> dict[str, dict[str, float]]:
        """How far each weight of the body went from its anchor in the last task and what held it, for results.json;
        empty for a method without anchors."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a new method of the same name, options and backbone needs to go on exactly from here."""
        return {
            "tasks": [record.as_dict() for record in self.tasks],
            "parameters": {name: parameter.detach() for name, parameter in self._saved_parameters()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "own": self._state(),
        }

    def inference_state(self) -> dict[str, Any]:
        """The part of `state_dict` that prediction needs, with which `load_state_dict` makes a model that predicts."""
        return self.state_dict() | {"optimizer": None, "scheduler": None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `ValueError` when parameters are missing, unknown or of another shape."""
        self.heads = Heads(self.heads.dim, self.options.head, self.options.head_scale)
        self.tasks = [TaskRecord.from_dict(values) for values in state["tasks"]]
        for record in self.tasks:
            self._current, _ = self.heads.extend(record.classes, self._like)
        mine, saved = dict(self._saved_parameters()), state["parameters"]
        wrong = [name for name in mine.keys() | saved.keys() if not _same_shape(mine.get(name), saved.get(name))]
        if wrong:
            raise ValueError(f"state: parameters missing, unknown or of another shape: {', '.join(sorted(wrong)[:5])}")
        for name, parameter in mine.items():
            parameter.copy_(saved[name])
        self._load_state(state["own"])
        self.optimizer = self.scheduler = None
        if state["optimizer"] is not None:
            self._make_optimizer()
            if self.optimizer is not None and self.scheduler is not None:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])

    # Inside --------------------------------------------------------------------------------------------------------

    def _cross_entropy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of features over the classes that train, in float32 at least."""
        logits, target = self._training_logits(features, labels)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide / self.options.temperature, target)

    def _training_logits(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.scope == "seen":
            return self.heads(features), self.heads.columns(labels)
        head = self.heads.head(self._current)
        return head(features), self.heads.columns(labels) - self.heads.offset(self._current)

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        trained = range(len(self.heads.parts)) if self.scope == "seen" else [self._current] * (self._current >= 0)
        return [
            (f"heads.{index}.{name}", parameter)
            for index in trained
            for name, parameter in self.heads.head(index).named_parameters()
        ]

    def _saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._body()
        for index in range(len(self.heads.parts)):
            for name, parameter in self.heads.head(index).named_parameters():
                yield f"heads.{index}.{name}", parameter

    def _init_head(self, task: Task, new: bool) -> None:
        if new:
            self._init_heads([self._current], task.batches, task.index)

    @torch.no_grad()
    def _init_heads(
        self,
        which: Iterable[int],
        batches: Callable[[], Batches],
        task: int,
        heads: Heads | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Start the heads `which` of `heads` (None: the method's), over `features` (None: the method's)."""
        heads, features = heads or self.heads, features or self.features
        for index in which:
            head = heads.head(index)
            if self.options.head_init == "default":
                head.init_default()
            elif self.options.head_init == "official":
                head.init_official(task, heads.head(0))
            elif self.options.head_init == "kaiming":
                head.init_kaiming()
            elif self.options.head_init == "class-means":
                pairs = ((features(images), labels) for images, labels in batches())
                head.init_class_means(class_means(pairs, heads, index, self.device))

    def _learning_rate(self) -> float:
        return self.default_lr if self.options.lr is None else self.options.lr

    def _weight_decay(self) -> float:
        return self.default_weight_decay if self.options.weight_decay is None else self.options.weight_decay

    def _head_weight_decay(self) -> float:
        return self._weight_decay()

    def _make_optimizer(self) -> None:
        lr = self._learning_rate()
        body, heads = self._body(), self._head_parameters()
        alone = not body and self.options.lr is not None
        head_lr = lr if alone or self.options.head_lr is None else self.options.head_lr
        for _, parameter in self._saved_parameters():
            parameter.requires_grad_(False)
        for _, parameter in [*body, *heads]:
            parameter.requires_grad_(True)
        groups = self._body_groups(body, lr * self._body_scale())
        groups.append({"params": heads, "lr": head_lr, "weight_decay": self._head_weight_decay()})
        if self.options.decay == "matrices":
            groups = matrices_apart(groups, self._undecayed())
        self.optimizer = self._build_optimizer(groups)
        factors = multipliers(self.options.schedule, self.tasks[-1].epochs, self.options.warmup)
        self.scheduler = LambdaLR(self.optimizer, lambda epoch: factors[min(epoch, len(factors) - 1)])


def _same_shape(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape
