"""One LoRA adapter a task on a frozen timm vision transformer, composed without a dense update for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.errors import NonFiniteError
from cl_kernels.nn._adapters import Adapters, kaiming_bound
from cl_kernels.nn._composition import (
    Composition,
    checked_composition,
    checked_positions,
    checked_rank,
)
from cl_kernels.nn._importance import Importance
from cl_kernels.nn._lora_linear import POSITIONS, LoRALinear, places
from cl_kernels.nn._orthogonality import Enforcement, Orthogonality

__all__ = ["LoRAStack"]


class LoRAStack(nn.Module):
    """A frozen timm ViT whose linear layers carry one low-rank adapter a task; `forward(images)` gives features [B, D].

        y = x W + b + s (sum_{i<t} omega_i (x A_i) B_i + (x A_t) B_t),   s = alpha / rank

    `positions`: which weights are adapted; q, k and v are apart even where timm fuses them. `composition` is one of
    `COMPOSITIONS` or a `Composition`. `orthogonality` acts on A: "penalty" (the term of `penalty()`), "qr" (A_t is the
    Q factor of what trains, projected off the earlier A_i, so that it is orthogonal to them at every step and no
    penalty is needed), "absorb" (A_t, B_t <- Q, R B_t at the end of a task: the same function) or None.

    A task is ``begin_task()``, any training loop over ``trainable_parameters()``, ``end_task()``. Earlier factors are
    buffers: no optimizer, weight decay or gradient clipping reaches them. ``at(task)`` shows the model as it was at the
    end of a task. `module` is taken over: frozen, in eval mode, its head dropped, its linear layers wrapped.

    Raises `ValueError` for unknown positions or compositions and for layers that are not there. Cost of a layer:
    2 N (in + out) K operations for K columns in all, beside 2 N in out of the frozen product; memory: the factors. From
    N = 2 in out / (in + out) rows on, one weight for all adapters together is formed in each forward pass instead, with
    2 K in out operations, and the graph keeps it: half the operations or less, differentiable once.
    Source: LoRAC-IPC (arXiv 2504.13407), O-LoRA, InfLoRA, SD-LoRA; method-lora-composition.md 3, 4, 12.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int = 16,
        alpha: float = 16.0,
        positions: Sequence[str] = POSITIONS,
        composition: str | Composition = "lorac",
        *,
        orthogonality: Enforcement | None = "penalty",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        backbone: Any = module
        self.rank, self.scale = checked_rank(rank), alpha / rank
        self.positions = checked_positions(positions)
        self.composition = checked_composition(composition)
        if self.composition.penalty is None and orthogonality == "penalty":
            orthogonality = None
        found = list(places(backbone, self.positions))
        self.orthogonality = Orthogonality(orthogonality, self.composition.penalty)
        if hasattr(backbone, "reset_classifier"):
            backbone.reset_classifier(0)
        self.backbone = backbone.requires_grad_(False).eval()
        self.num_features = int(getattr(backbone, "num_features", 0))
        for owner, attribute, linear, slices in found:
            wrapped = LoRALinear(linear, slices, self.scale, normalized=self.composition.normalized)
            setattr(owner, attribute, wrapped)
        self.task = -1  # number of the task that trains or trained last
        self.training_task = False
        self.generator = generator  # of random down-projections, drawn on the CPU; None: torch's own state
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]  # torch's own
        self._importance: Importance | None = None

    # ------------------------------------------------------------------------------------------------ layers
    def layers(self) -> Iterator[tuple[str, LoRALinear]]:
        """The wrapped layers by their name in the backbone, "blocks.0.attn.qkv"."""
        for name, module in self.backbone.named_modules():
            if isinstance(module, LoRALinear):
                yield name, module

    def places(self) -> dict[str, Adapters]:
        """Every adapted weight by name: "blocks.0.attn.qkv.q", "blocks.0.mlp.fc1"."""
        return {
            layer.place(name, part): adapters
            for name, layer in self.layers()
            for part, adapters in layer.named_adapters()
        }

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the current task trains, by full name."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> LoRAStack:
        """As `nn.Module.train`, but the frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    # ------------------------------------------------------------------------------------------------ tasks
    @torch.no_grad()
    def begin_task(self, initial: Mapping[str, Tensor] | None = None) -> None:
        """Start an adapter at every position that is not frozen: B = 0, so the function does not change.

        A [in, r] is uniform in +-1/sqrt(r) (LoRAC's law), or `initial[name]` for names of `places()`, such as
        InfLoRA's directions. Raises `RuntimeError` when a task is open, `ValueError` for a shape that does not fit.
        """
        if self.training_task:
            raise RuntimeError(f"begin_task: task {self.task} has not been ended")
        if self._merged():
            raise RuntimeError("begin_task: adapters are merged into the weights; call unmerge() first")
        named = self.places()
        given = dict(initial or {})
        for name, a in given.items():
            wanted = (named[name].past_a.shape[0], self.rank) if name in named else None
            if wanted is None or tuple(a.shape) != wanted:
                raise ValueError(f"initial: {name!r} expected a matrix of shape {wanted}, got {tuple(a.shape)}")
        composition = self.composition
        self.orthogonality.check({name: one for name, one in named.items() if not one.frozen}, self.rank)
        for name, adapters in named.items():
            if adapters.frozen:
                continue
            a = given[name].to(adapters.past_a) if name in given else self._random_a(adapters)
            b = adapters.past_b.new_zeros(a.shape[1], adapters.past_b.shape[1])
            adapters.start(
                a.clone(memory_format=torch.contiguous_format),  # as a state dict gives it back: the same last bits
                b,
                train_a=composition.trains == "ab",
                train_gain=composition.normalized,
                train_omega=composition.omega,
            )
        self.task += 1
        self.training_task = True
        self.orthogonality.forget()

    @torch.no_grad()
    def end_task(self) -> None:
        """The current adapters join the history, and a snapshot of all coefficients is kept."""
        if not self.training_task:
            raise RuntimeError("end_task: no task is open")
        named = self.places()
        self.orthogonality.end(named)
        for adapters in named.values():
            adapters.absorb(self.task)
            adapters.snapshot()
        self.training_task = False

    def forward(self, images: Tensor) -> Tensor:
        """Pooled, normalised features [B, D] of `images`, as timm's ``forward_head(pre_logits=True)``."""
        self.orthogonality.refresh(self.places())
        features: Tensor = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return features

    def penalty(self) -> Tensor:
        """The orthogonality term of the loss, summed over positions: see `Composition`. 0 where there is none."""
        return self.orthogonality.penalty(self.places())

    @contextmanager
    def at(self, task: int) -> Iterator[None]:
        """While open, the model is what it was at the end of `task` (from 0)."""
        named = self.places()
        ended = len(next(iter(named.values())).snapshots)
        if not 0 <= task < ended:
            raise ValueError(f"task: expected one of the {ended} tasks that ended, 0 to {ended - 1}, got {task}")
        before = {name: adapters.shown for name, adapters in named.items()}
        for adapters in named.values():
            adapters.shown = task
        try:
            yield
        finally:
            for name, adapters in named.items():
                adapters.shown = before[name]

    def get_extra_state(self) -> dict[str, Any]:
        """Which task is open; it travels with the state dict. Raises `RuntimeError` while adapters are merged: who
        loads merged weights would add the adapters once more."""
        if self._merged():
            raise RuntimeError("state_dict: adapters are merged into the weights; call unmerge() first")
        return {"task": self.task, "training_task": self.training_task}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.task, self.training_task = int(state["task"]), bool(state["training_task"])

    # ------------------------------------------------------------------------------------------------ importance
    @property
    def importance(self) -> Importance | None:
        """The statistics since the last `freeze_important`; None before the first recorded pass."""
        return self._importance

    @contextmanager
    def record_importance(self, *, beta1: float = 0.85, beta2: float = 0.85) -> Iterator[Importance]:
        """While open, forward and backward passes update the sensitivity of each adapted weight; see `Importance`.

        The window of the averages is about 7 steps: opening it for the last 96 steps of a task changes a score by less
        than 1.5e-5 and saves the weight gradients of all others (method-lora-composition.md 5).
        """
        if self._importance is None:
            self._importance = Importance(self.places(), beta1, beta2)
        importance = self._importance
        for name, layer in self.layers():
            layer.watch = importance.watcher(name)
        try:
            yield importance
        finally:
            for _, layer in self.layers():
                layer.watch = None

    @torch.no_grad()
    def freeze_important(self, share: float) -> list[str]:
        """Freeze for good the `share` of all positions whose weights matter most, and forget the statistics (IPC).

        int(share * positions) are newly frozen, or as many as are left; equal scores go by name order, so ties freeze
        no more. A frozen position gets no new adapter, its coefficients never train again, and it leaves the penalty.
        Returns their names. Raises `ValueError` for a share outside [0, 1], `RuntimeError` without statistics or while
        a task is open.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"Invalid share value: {share} (expected 0 <= share <= 1)")
        if self.training_task:
            raise RuntimeError("freeze_important: end the task first")
        named = self.places()
        count = int(share * len(named))
        if count and self._importance is None:
            raise RuntimeError("freeze_important: no statistics; train the last steps inside record_importance()")
        chosen: list[str] = []
        if count and self._importance is not None:
            scores = self._importance.scores()
            open_names = [name for name, adapters in named.items() if not adapters.frozen]
            chosen = sorted(open_names, key=lambda name: -scores[name])[:count]
        for name in chosen:
            named[name].frozen_after = self.task
        self._importance = None
        return [name for name in named if name in chosen]

    # ------------------------------------------------------------------------------------------------ merging
    @torch.no_grad()
    def merge(self, task: int | None = None, *, safe: bool = True) -> None:
        """Add the update into the frozen weights, for inference at the price of the plain model.

        `task`: the snapshot to merge, None the live state. `safe` checks every merged weight to be finite before any is
        changed (`NonFiniteError`). The original weights are kept, so that `unmerge` restores them bit for bit.
        """
        if self._merged():
            raise RuntimeError("merge: adapters are merged already; call unmerge() first")
        self.orthogonality.refresh(self.places())  # a step may have come after the last forward pass
        fresh: list[tuple[LoRALinear, Tensor]] = []
        with self.at(task) if task is not None else nullcontext():
            for name, layer in self.layers():
                weight = layer.base.weight.clone()
                for part, adapters in layer.named_adapters():
                    weight[layer.slices[part]] += adapters.delta().mT
                bad = int((~torch.isfinite(weight)).sum()) if safe else 0
                if bad:
                    raise NonFiniteError(f"{name}: {bad} of {weight.numel()} merged weights are NaN or infinite")
                fresh.append((layer, weight))
        for layer, weight in fresh:
            layer.merged = layer.base.weight.clone()
            layer.base.weight.copy_(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for _, layer in self.layers():
            if layer.merged is not None:
                layer.base.weight.copy_(layer.merged)
                layer.merged = None

    def _merged(self) -> bool:
        return any(layer.merged is not None for _, layer in self.layers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAStack:
        """As `nn.Module._apply`; what the orthogonality keeps stacked is made anew, on the new device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.orthogonality.forget()
        return self

    def _mark_trainable(self) -> None:
        """`requires_grad` as `begin_task` sets it; a state dict does not carry it."""
        for adapters in self.places().values():
            adapters.omega.requires_grad_(
                self.training_task and self.composition.omega and not adapters.frozen and adapters.omega.numel() > 0
            )
            if adapters.lora_a is not None:
                adapters.lora_a.requires_grad_(self.composition.trains == "ab")

    def _random_a(self, adapters: Adapters) -> Tensor:
        size, bound = adapters.past_a.shape[0], kaiming_bound(self.rank)
        drawn = torch.empty(size, self.rank).uniform_(-bound, bound, generator=self.generator)
        return drawn.to(adapters.past_a)


def _after_loading(stack: Any, _: Any) -> None:
    stack.orthogonality.forget()
    stack._mark_trainable()
