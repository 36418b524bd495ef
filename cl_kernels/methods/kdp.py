"""KDP: a student with a prompt pool and a KD token follows a teacher from task to task (arXiv 2407.13911, v3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels.methods._heads import Heads
from cl_kernels.methods._options import Options, count, number, require
from cl_kernels.methods._pools import PoolMethod, PoolOptions
from cl_kernels.methods._task import Batch, Batches, Task
from cl_kernels.methods._teacher import Teacher
from cl_kernels.methods.coda_prompt import CODAPromptOptions
from cl_kernels.methods.dualprompt import DualPromptOptions
from cl_kernels.methods.l2p import L2POptions
from cl_kernels.nn import APT, KDHead, KDToken, Pooled, PooledViT, PromptPool
from cl_kernels.nn.kd_token import DECOUPLE
from cl_kernels.ops.distillation import distillation_loss, dkd_loss

__all__ = ["DISTILLATIONS", "KDP", "KDPOptions"]

DISTILLATIONS = ("none", "labels", "logit", "decoupled", "feature", "token", "kdp")
KD_INITS = ("uniform", "class-token")
KD_TASKS = ("all", "first")
_POOLS: dict[str, type[PoolOptions]] = {
    "l2p": L2POptions,
    "dualprompt": DualPromptOptions,
    "coda-prompt": CODAPromptOptions,
}
_APT = {"momentum", "merge"}


@dataclass(frozen=True, kw_only=True)
class KDPOptions(PoolOptions):
    """Options of `kdp`, for teacher and student alike where both have the thing.

    * prompt_pool: "coda-prompt", "l2p", "dualprompt" or "apt"; pool_options: a mapping of that pool's own options.
    * distillation: "kdp" (KD token, KD prompts, KD head); "token" (without the KD prompts, as DeiT); "logit" (the class
      head learns from the teacher, nothing is added); "decoupled" (DKD, its temperature 4); "feature" (logit, and
      `feature_weight` times the mean squared error of a projection of the last rows). Without a teacher: "none", and
      "labels", whose KD head learns the labels too: what a second head gives by itself.
    * alpha: weighs labels against teacher, (1 - alpha) CE + alpha T^2 KL, and the two heads in the prediction.
    * kd_temperature: T.
    * kd_length, kd_blocks: rows of a KD prompt, half keys and half values, and the blocks that may have one (None:
      all; the first never has).
    * kd_init: of the KD token and prompts. "uniform": U[0, 1), as published. "class-token": the token starts as the
      backbone's class token with its position, so that its feature is the class feature at the first step (with
      decouple="none" exactly), and the prompts as zeros; a backbone without a class token is refused.
    * kd_lr: their learning rate; None takes `lr`. Every task has the same ones, so what they learn later moves the
      features that earlier tasks' KD heads read.
    * kd_tasks: the tasks that train them. "all", as published, or "first": fixed after the first task, while KD heads
      go on learning from the teacher.
    * decouple: what image rows and KD token see of each other, see `nn.KDToken`.
    """

    prompt_pool: str = "coda-prompt"
    pool_options: Mapping[str, Any] | None = None
    distillation: str | None = "kdp"
    alpha: float = 0.5
    kd_temperature: float = 2.0
    kd_length: int = 6
    kd_blocks: int | None = None
    kd_init: str = "uniform"
    kd_lr: float | None = None
    kd_tasks: str = "all"
    decouple: str = "none"
    feature_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation is None:  # what the command line makes of the word none
            object.__setattr__(self, "distillation", "none")
        known = (*_POOLS, "apt")
        require("prompt_pool", self.prompt_pool in known, f"one of {', '.join(known)}", self.prompt_pool)
        require("pool_options", isinstance(self.pool_options, Mapping | None), "a mapping", self.pool_options)
        wanted = f"one of {', '.join(DISTILLATIONS)}"
        require("distillation", self.distillation in DISTILLATIONS, wanted, self.distillation)
        require("alpha", number(self.alpha, 0.0, 1.0), "a number in [0, 1]", self.alpha)
        warm = number(self.kd_temperature, 1e-6, 1e6)
        require("kd_temperature", warm, "a number in [1e-6, 1e6]", self.kd_temperature)
        ok = count(self.kd_length, 0, 4096) and self.kd_length % 2 == 0
        require("kd_length", ok, "an even int in [0, 4096], half keys and half values", self.kd_length)
        require("kd_blocks", self.kd_blocks is None or count(self.kd_blocks, 0, 4096), "None or an int", self.kd_blocks)
        require("kd_init", self.kd_init in KD_INITS, f"one of {', '.join(KD_INITS)}", self.kd_init)
        slow = self.kd_lr is None or number(self.kd_lr, 0.0, 1e3)
        require("kd_lr", slow, "None or a number in [0, 1000]", self.kd_lr)
        require("kd_tasks", self.kd_tasks in KD_TASKS, f"one of {', '.join(KD_TASKS)}", self.kd_tasks)
        require("decouple", self.decouple in DECOUPLE, f"one of {', '.join(DECOUPLE)}", self.decouple)
        fine = number(self.feature_weight, 0.0, 1e6)
        require("feature_weight", fine, "a number in [0, 1e6]", self.feature_weight)
        self._pool_options()

    def pool(self, backbone: nn.Module, *, query_dim: int | None = None) -> PromptPool:
        """The pool for a backbone."""
        inner = self._pool_options()
        if inner is None:
            return APT.of(backbone, **dict(self.pool_options or {}), query_dim=query_dim)
        return inner.pool(backbone, query_dim=query_dim)

    def _pool_options(self) -> PoolOptions | None:
        """The options of the pool by themselves, checked; None for APT, which has no method of its own."""
        given = dict(self.pool_options or {})
        if self.prompt_pool == "apt":
            require("pool_options", set(given) <= _APT, f"options among {', '.join(sorted(_APT))}", given)
            return None
        kind = _POOLS[self.prompt_pool]
        own = set(kind.__dataclass_fields__) - set(Options.__dataclass_fields__)
        require("pool_options", set(given) <= own, f"options among {', '.join(sorted(own))}", given)
        return kind(**given)


class KDP(PoolMethod):
    """Each task is learned by the teacher, then by the student from it; only the student is needed afterwards.

    Student loss: (1 - alpha) CE(class head) + alpha T^2 KL(teacher || KD head), both over the task's own classes, plus
    the pool's. The KD head reads the KD token; prediction blends both heads' raw logits. The teacher is frozen while it
    teaches, uses the prompts that inference chooses, and forgets like any continual learner. Without augmentation the
    query (shared by both pools) is computed once an image and phase, and the teacher's logits once an image and task.
    """

    name: ClassVar[str] = "kdp"
    options_type: ClassVar[type[Options]] = KDPOptions
    options: KDPOptions
    teacher: Teacher | None

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.needs_teacher = self.options.distillation not in ("none", "labels")
        self.phases = ("teacher", "student") if self.needs_teacher else ("student",)
        self.kd_heads = self._new_heads()
        self.projection: nn.Linear | None = None

    @property
    def _reads_token(self) -> bool:
        return self.options.distillation in ("labels", "token", "kdp")

    def _new_heads(self) -> Heads:
        return Heads(self.heads.dim, self.options.head, self.options.head_scale)

    def _wrap(self, backbone: nn.Module) -> nn.Module:
        chosen, token = self.options, None
        pool = chosen.pool(backbone)
        if self._reads_token:
            blocks = pool.blocks if chosen.kd_blocks is None else chosen.kd_blocks
            token = KDToken(
                int(backbone.embed_dim),  # type: ignore[arg-type]  # timm's models are typed as modules
                blocks,
                pool.heads,
                chosen.kd_length,
                prompts=chosen.distillation != "token",
                decouple=chosen.decouple,
            )
            if chosen.kd_init == "class-token":
                token.start(_class_token(backbone))
        return PooledViT(backbone, pool, token, prune=chosen.distillation != "feature")

    def _body(self) -> list[tuple[str, nn.Parameter]]:
        token = () if self.model.kd is None else self.model.kd.named_parameters()
        linear = () if self.projection is None else self.projection.named_parameters()
        kd = [(f"kd.{name}", parameter) for name, parameter in token]
        return [*super()._body(), *kd, *((f"projection.{name}", parameter) for name, parameter in linear)]

    def _body_groups(self, body: list[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """The published one group; with `kd_lr` or `kd_tasks` the KD token and prompts have their own, or none."""
        kd = [(name, parameter) for name, parameter in body if name.startswith("kd.")]
        if not kd or (self.options.kd_lr is None and not self._kd_fixed):
            return super()._body_groups(body, lr)
        groups = super()._body_groups([pair for pair in body if not pair[0].startswith("kd.")], lr)
        if self._kd_fixed:
            for _, parameter in kd:
                parameter.requires_grad_(False)
            return groups
        return [*groups, *super()._body_groups(kd, lr if self.options.kd_lr is None else self.options.kd_lr)]

    @property
    def _kd_fixed(self) -> bool:
        return self.options.kd_tasks == "first" and len(self.tasks) > 1

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """As every method's, without the KD token and prompts where an earlier task has fixed them."""
        found = super().trainable_parameters()
        return [pair for pair in found if not (self._kd_fixed and pair[0].startswith("kd."))]

    # The teacher ---------------------------------------------------------------------------------------------------

    def set_teacher(self, backbone: nn.Module, adapt: Callable[[Tensor], Tensor]) -> None:
        """Take over the teacher's backbone. Raises `ValueError` where `distillation` is "none" or tasks have begun."""
        if not self.needs_teacher:
            raise ValueError(f"teacher: kdp with distillation={self.options.distillation!r} learns from no teacher")
        if self.tasks:
            raise ValueError("teacher: it must be there before the first task")
        compared = self.options.distillation == "feature"
        mine, its = _rows(self.model.backbone), _rows(backbone)
        if compared and its not in (None, mine):
            raise ValueError(f"teacher: distillation='feature' compares rows, of which it has {its}, not {mine}")
        self.teacher = Teacher(
            backbone,
            self.options,
            query=self.model.query,
            query_dim=self.pool.query_dim,
            adapt=adapt,
            whole=self.options.distillation == "feature",
        )
        if compared:
            self.projection = nn.Linear(self.heads.dim, self.teacher.heads.dim).to(self._like)

    def _teacher(self) -> Teacher:
        if self.teacher is None:
            raise RuntimeError("kdp: set_teacher must come before the first task")
        return self.teacher

    # A task --------------------------------------------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        """Begin it for both models; the teacher trains first."""
        if self.needs_teacher:
            self._teacher()
        super().begin_task(task)
        if self.needs_teacher:
            teacher = self._teacher()
            teacher.begin_task(task)
            self.phase, self.optimizer, self.scheduler = 0, teacher.optimizer, teacher.scheduler

    def begin_phase(self, phase: int) -> None:
        """The teacher rests, and the student gets an optimizer of its own."""
        if (self.phase, phase) != (0, 1) or not self.needs_teacher:
            super().begin_phase(phase)
        self._teacher().rest()
        self.phase = phase
        self._make_optimizer()

    def end_task(self, task: Task, loader: Batches) -> None:
        """End it for both models. Raises `RuntimeError` where the student's phase has not begun."""
        if self._of_teacher():
            raise RuntimeError(
                f"end_task: the student has not learned task {self.tasks[-1].index}; begin_phase(1) first"
            )
        super().end_task(task, loader)

    def _start(self, task: Task) -> None:
        super()._start(task)
        if self._reads_token:
            self.kd_heads.extend(self.tasks[-1].classes, self._like)

    def _init_head(self, task: Task, new: bool) -> None:
        super()._init_head(task, new)
        if new and self._reads_token:
            self._init_heads([self._current], task.batches, task.index, self.kd_heads, self._token_features)

    def _init_heads(
        self,
        which: Any,
        batches: Any,
        task: int,
        heads: Heads | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super()._init_heads(which, batches, task, heads, features or self._class_features)

    def _class_features(self, images: Tensor) -> Tensor:
        found: Pooled = self.model(images, train=self._training)
        return found.cls

    def _token_features(self, images: Tensor) -> Tensor:
        return _token(self.model(images, train=True))

    def per_image(self, images: Tensor) -> tuple[Tensor, ...]:
        """The query, and in the student's phase the teacher's logits over the task's classes."""
        query = self.model.query(images) if self.pool.needs_query else images.new_empty((len(images), 0))
        return (query,) if self._of_teacher() else (query, self._targets(images, query))

    def _of_teacher(self) -> bool:
        return self.needs_teacher and self.phase == 0

    def _targets(self, images: Tensor, query: Tensor) -> Tensor:
        return self._teacher().targets(images, query) if self.needs_teacher else query.new_empty((len(query), 0))

    def loss(self, batch: Batch, *facts: Tensor) -> Tensor:
        """The loss of the current phase; `facts` holds what `per_image` gave, and is computed where it is missing."""
        images, labels = batch
        if self._of_teacher():
            return self._teacher().loss(batch, *facts)
        query, taught = facts if facts else self.per_image(images)
        with _last_rows(self.model, self.options.distillation == "feature") as rows:
            found: Pooled = self.model(images, query, train=True)
        if self.options.distillation == "none":
            return self._cross_entropy(found.cls, labels) + found.loss
        return self._student_loss(found, labels, taught) + found.loss + self._feature_loss(images, query, rows)

    def _student_loss(self, found: Pooled, labels: Tensor, taught: Tensor) -> Tensor:
        chosen = self.options
        local = self.heads.columns(labels) - self.heads.offset(self._current)
        hard: Tensor = self.heads.head(self._current)(found.cls)
        alpha, wide = chosen.alpha, hard.float() if hard.dtype.itemsize < 4 else hard
        if chosen.distillation == "decoupled":
            alone = wide.shape[1] == 1  # then both divergences are of certainties
            soft = wide.new_zeros(()) if alone else dkd_loss(wide, taught, local)
            return (1 - alpha) * F.cross_entropy(wide / chosen.temperature, local) + alpha * soft
        signal = self.kd_heads.head(self._current)(_token(found)) if self._reads_token else hard
        if not self.needs_teacher:
            of_class, of_token = (F.cross_entropy(z / chosen.temperature, local) for z in (wide, signal.to(wide.dtype)))
            return (1 - alpha) * of_class + alpha * of_token
        loss: Tensor = distillation_loss(
            hard / chosen.temperature, signal, taught, local, alpha=alpha, temperature=chosen.kd_temperature
        )
        return loss

    def _feature_loss(self, images: Tensor, query: Tensor, rows: list[Tensor]) -> Tensor | float:
        if self.projection is None:
            return 0.0
        teacher = self._teacher()
        with torch.no_grad(), _last_rows(teacher.model, True) as wanted:
            teacher.look(images, query)
        return self.options.feature_weight * F.mse_loss(self.projection(rows[0]), wanted[0])

    # Prediction ----------------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of the image rows; with a KD token [B, 2 D], its own behind them."""
        found: Pooled = self.model(images, train=self._training)
        return torch.cat((found.cls, _token(found)), dim=1) if self._reads_token else found.cls

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, classes seen]; with a KD token (1 - alpha) class head + alpha KD head."""
        if not self._reads_token:
            return super().logits(features)
        of_class, of_token = features.split(self.heads.dim, dim=1)
        return KDHead.blend(self.heads(of_class), self.kd_heads(of_token), self.options.alpha)

    def modules(self) -> list[nn.Module]:
        """All that predicts."""
        return [*super().modules(), *([self.kd_heads] if self._reads_token else [])]

    # State ---------------------------------------------------------------------------------------------------------

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*super()._head_parameters(), *self._kd_parameters([self._current] if self._current >= 0 else [])]

    def _saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super()._saved_parameters()
        yield from self._kd_parameters(range(len(self.kd_heads.parts)))

    def _kd_parameters(self, which: Any) -> list[tuple[str, nn.Parameter]]:
        if not self._reads_token:
            return []
        return [(f"kd_heads.{i}.{name}", p) for i in which for name, p in self.kd_heads.head(i).named_parameters()]

    def _state(self) -> dict[str, Any]:
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return super()._state() | {"phase": self.phase, "teacher": teacher}

    def state_dict(self) -> dict[str, Any]:
        """As every method's; the optimizer of the teacher's phase is the teacher's."""
        state = super().state_dict()
        return state | {"optimizer": None, "scheduler": None} if self._of_teacher() else state

    def inference_state(self) -> dict[str, Any]:
        """The student alone: `load_state_dict` needs no teacher for it."""
        state = super().inference_state()
        kept = {name: value for name, value in state["parameters"].items() if not name.startswith("projection.")}
        return state | {"parameters": kept, "own": state["own"] | {"teacher": None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, the teacher with it."""
        self.kd_heads = self._new_heads()
        if self._reads_token:
            for record in state["tasks"]:
                self.kd_heads.extend(tuple(record["classes"]), self._like)
        super().load_state_dict(state)
        if self.teacher is not None and self._of_teacher():
            self.optimizer, self.scheduler = self.teacher.optimizer, self.teacher.scheduler

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.phase = state["phase"]
        if state["teacher"] is not None:
            teacher = self._teacher()
            teacher.load_state_dict(state["teacher"])


def _token(found: Pooled) -> Tensor:
    if found.kd is None:
        raise RuntimeError("kdp: the model has no KD token")
    return found.kd


def _class_token(backbone: Any) -> Tensor:
    """The row [D] that enters block 0 as the class token."""
    row = getattr(backbone, "cls_token", None)
    if row is None:
        raise ValueError("kd_init: 'class-token' needs a backbone with a class token, and this one has none")
    place = None if getattr(backbone, "no_embed_class", False) else getattr(backbone, "pos_embed", None)
    first: Tensor = row.detach()[:, :1] if place is None else row.detach()[:, :1] + place.detach()[:, :1]
    placed: Tensor = backbone.norm_pre(first)[0, 0]
    return placed


def _rows(backbone: Any) -> int | None:
    """Rows that a model's blocks see; None for what is no ViT, which is refused elsewhere."""
    patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", None)
    return None if patches is None else int(patches) + int(getattr(backbone, "num_prefix_tokens", 1))


@contextmanager
def _last_rows(model: PooledViT, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the last block's output [B, rows, D] of every forward pass inside, where `wanted`."""
    rows: list[Tensor] = []
    norm: nn.Module = model.backbone.get_submodule("norm")
    handle = norm.register_forward_pre_hook(lambda _, given: rows.append(given[0])) if wanted else None
    try:
        yield rows
    finally:
        if handle is not None:
            handle.remove()
