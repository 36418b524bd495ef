"""Methods whose updates are projected: after each task a pass over its images, from the next one on no step into what
it used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from cl_kernels.errors import SubspaceMismatchError
from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._memory import Found, Memory
from cl_kernels.methods._options import Options
from cl_kernels.methods._prompts import PromptMethod
from cl_kernels.methods._subspaces import Report, new_store, restored_store, side_report
from cl_kernels.methods._task import Batches, Task
from cl_kernels.methods._weights import WeightMethod
from cl_kernels.ops import Sides
from cl_kernels.optim._base import ProjectedOptimizer
from cl_kernels.subspace import CovarianceCollector, SubspaceStore

__all__ = ["Collector", "Projected", "ProjectedPrompts", "ProjectedWeights"]


class Collector(AbstractContextManager[Any], Protocol):
    """What watches the model during the pass."""

    def covariances(self) -> dict[str, Any]: ...


class Projected(HeadMethod):
    """A method with a memory. Timeline of a task: train, pass, memory, projectors; evaluation follows.

    The pass runs after training, in eval mode, without gradients, and not after the last task. Projectors are keyed by
    parameter name; a trained parameter without one is refused, never left to train freely."""

    def __init__(self, backbone: nn.Module, options: Options) -> None:
        super().__init__(backbone, options)
        self.memory = self._new_memory()
        self.store: SubspaceStore | None = None
        self._report: Report = {}

    def _new_memory(self) -> Memory:
        """The empty memory."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    def _collector(self) -> Collector:
        """What gathers second moments while it is open."""
        raise NotImplementedError(f"{type(self).__name__} has no collector")

    def _found(self, collector: Collector) -> Found:
        """What it gathered, by parameter and side."""
        raise NotImplementedError(f"{type(self).__name__} has no collector")

    def _images(self, loader: Batches) -> Batches:
        """The batches that the pass looks at."""
        return loader

    def _adjusted(self, sides: Sides) -> Sides:
        """The projectors of one parameter as they are used."""
        return sides

    @torch.no_grad()
    def _finish(self, task: Task, loader: Batches) -> None:
        if self.tasks[-1].last:
            return
        seen = 0
        with self._collector() as collector:
            for images, _ in self._images(loader):
                self.model(images)
                seen += len(images)
        made = self.memory.remember(self._found(collector), seen)
        before = self._report
        self._report = {
            name: {side: side_report(*pair, before.get(name, {}).get(side)) for side, pair in sides.items()}
            for name, sides in made.items()
        }
        dtype = self._like.dtype
        projectors = {
            name: self._adjusted(Sides(**{side: projector.to(dtype) for side, (projector, _) in sides.items()}))
            for name, sides in made.items()
        }
        self.store = self._covered(new_store(projectors, self._report, self.store))

    def _covered(self, store: SubspaceStore) -> SubspaceStore:
        missing = [name for name, _ in self._body() if name not in store]
        if missing:
            raise SubspaceMismatchError(
                f"{self.name}: no projector for {', '.join(missing[:5])} of {len(self._body())} trained parameters; "
                "they would train unprojected"
            )
        return store

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = super()._build_optimizer(groups)
        if self.store is not None:
            if not isinstance(optimizer, ProjectedOptimizer):
                raise TypeError(f"{self.name}: {type(optimizer).__name__} cannot project its updates")
            optimizer.set_subspace(self._covered(self.store))  # heads are not in it and train freely
        return optimizer

    def subspace(self) -> Report:
        """Dimension, protected directions, RMS gain, protected energy, growth and room by parameter and side."""
        return self._report

    def _state(self) -> dict[str, Any]:
        stored = None if self.store is None else self.store.state_dict()
        return {"memory": self.memory.state(), "store": stored, "report": self._report}

    def _load_state(self, state: dict[str, Any]) -> None:
        self.memory.load(state["memory"], self.device)
        self.store, self._report = restored_store(state["store"], self.device), state["report"]


class ProjectedPrompts(Projected, PromptMethod):
    """Prompts, both sides: `right` [D, D] of the rows q_h W_k,h of the image queries, `left` [M, M] of the softmax mass
    on the prompts (NSP2, Eqs. 24 and 25)."""

    def _collector(self) -> Collector:
        return CovarianceCollector(self.model, what="prompt")

    def _found(self, collector: Collector) -> Found:
        moments = collector.covariances().items()
        return {name: {"left": moment.left, "right": moment.right} for name, moment in moments}


class ProjectedWeights(Projected, WeightMethod):
    """Weights of linear layers, right side: `right` [in, in] of a layer's inputs."""

    def _collector(self) -> Collector:
        return CovarianceCollector(self.backbone, targets=self._layers())

    def _layers(self) -> list[str]:
        """Names of the linear layers whose weights train."""
        return [name.removesuffix(".weight") for name, _ in self._body()]

    def _found(self, collector: Collector) -> Found:
        return {name: {"right": moment} for name, moment in collector.covariances().items()}
