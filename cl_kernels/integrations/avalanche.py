"""An Avalanche plugin: what earlier experiences need is protected while later ones are learned."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cl_kernels.ops.rules import Rule
from cl_kernels.optim import ProjectedOptimizer, ProjectedUpdates, project_updates
from cl_kernels.subspace import CovarianceCollector, SubspaceStore, build_store

__all__ = ["SubspacePlugin"]


class SubspacePlugin:
    """Project the updates of an Avalanche strategy off what earlier experiences' inputs span.

        plugin = SubspacePlugin(rules.Energy(0.97))
        Naive(model, ProjectedAdamW(model.named_parameters(), lr=1e-3), CrossEntropyLoss(), plugins=[plugin])

    Before an experience, after Avalanche rewrote the optimizer's groups, names are read anew and `store` is put in
    force; after it, one pass over its data in eval mode collects the second moments of the inputs of `targets` (see
    `CovarianceCollector`), and what `rule` protects in them is merged into `store`. Any torch optimizer will do: one
    that does not project by itself goes through `project_updates`.

    `mix`, `normalize` and `on_full` as in `build_store`; `options` go to the collector (`token_rate`, `skip_tokens`,
    `max_bytes`, `device` ...). `max_batches` bounds the pass. The store lives here, not in the optimizer's state, which
    Avalanche clears. Avalanche calls plugins by method name, so that this class needs no Avalanche to be imported.
    """

    supports_distributed = True

    def __init__(
        self,
        rule: Rule,
        *,
        targets: Any = "linear",
        mix: float = 1.0,
        normalize: Literal["fro"] | None = None,
        on_full: Literal["freeze", "raise", "relax"] = "freeze",
        max_batches: int | None = None,
        store: SubspaceStore | None = None,
        **options: Any,
    ) -> None:
        self.rule, self.targets, self.max_batches = rule, targets, max_batches
        self.store = SubspaceStore() if store is None else store
        self._cut: dict[str, Any] = {"mix": mix, "normalize": normalize, "on_full": on_full}
        self._options = {"eval_mode": True, **options}
        self._handle: ProjectedUpdates | None = None
        self._handled: Any = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Names anew, then the subspace so far. Raises what `set_subspace` raises."""
        optimizer, model = strategy.optimizer, strategy.model
        if isinstance(optimizer, ProjectedOptimizer):
            optimizer.bind(model)
            optimizer.set_subspace(self.store)
            return
        if self._handle is None or self._handled is not optimizer:
            self._handle, self._handled = project_updates(optimizer), optimizer
        self._handle.bind(model)
        self._handle.set_subspace(self.store)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """One pass over the experience, then the merge: the optimizer follows the store by itself."""
        model: nn.Module = strategy.model
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        collector = CovarianceCollector(model, self.targets, process_group=group, **self._options)
        with collector, torch.no_grad():
            for number, batch in enumerate(self._batches(strategy)):
                if self.max_batches is not None and number >= self.max_batches:
                    break
                self._forward(strategy, model, batch)
        device = next(model.parameters()).device
        moments = collector.covariances()
        found = build_store(moments, self.rule, **self._cut, dtype=torch.float32)
        self.store.merge(found.to(device))

    def _batches(self, strategy: Any) -> DataLoader[Any]:
        dataset = strategy.experience.dataset
        collate = getattr(dataset, "collate_fn", None)
        return DataLoader(dataset, batch_size=getattr(strategy, "train_mb_size", 32), collate_fn=collate)

    def _forward(self, strategy: Any, model: nn.Module, batch: Any) -> None:
        x: Tensor = batch[0].to(next(model.parameters()).device)
        try:
            models = importlib.import_module("avalanche.models.utils")
        except ImportError:  # a strategy that only behaves like Avalanche's
            model(x)
            return
        models.avalanche_forward(model, x, batch[-1].to(x.device))
