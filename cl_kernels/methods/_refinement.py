"""Refinement of the heads by pseudo-features: a Gaussian for every class seen, sampled when heads are trained again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.errors import NonFiniteError
from cl_kernels.methods._heads import Heads
from cl_kernels.methods._options import Options, count, number, require

__all__ = ["GaussianReplay", "RefineOptions"]

RIDGE = 1e-4  # added to the diagonal of every covariance (official code); makes few samples positive definite
COVARIANCES = ("full", "shared", "diagonal")


@dataclass(frozen=True, kw_only=True)
class RefineOptions(Options):
    """Training the heads again after each task on pseudo-features of all classes seen.

    * refine: "gaussian" does it, "none" does not.
    * refine_covariance: "full" keeps one [D, D] factor a class (4 D^2 bytes in float32: 2.4 MB at D = 768, 470 MB for
      200 classes), "shared" one for all, "diagonal" D numbers a class.
    * refine_samples: a class and epoch; refine_epochs; refine_batch.
    * refine_lr, refine_momentum (Nesterov), refine_weight_decay (not on biases): of the SGD.
    """

    refine: str = "none"
    refine_covariance: str = "full"
    refine_samples: int = 256
    refine_epochs: int = 50
    refine_batch: int = 256
    refine_lr: float = 1e-3
    refine_momentum: float = 0.9
    refine_weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require("refine", self.refine in ("none", "gaussian"), "none or gaussian", self.refine)
        known = ", ".join(COVARIANCES)
        require("refine_covariance", self.refine_covariance in COVARIANCES, f"one of {known}", self.refine_covariance)
        for name, low in (("refine_samples", 1), ("refine_epochs", 0), ("refine_batch", 1)):
            require(name, count(getattr(self, name), low, 10**6), f"an int in [{low}, 10^6]", getattr(self, name))
        for name, high in (("refine_lr", 1e3), ("refine_momentum", 1.0), ("refine_weight_decay", 1e3)):
            value = getattr(self, name)
            require(name, number(value, 0.0, high), f"a number in [0, {high:g}]", value)


class Component(NamedTuple):
    """Features of one class in one task: `factor` F [D, D] with F F^T the covariance, [D] of deviations, or None."""

    label: int
    images: int
    mean: Tensor
    factor: Tensor | None


class GaussianReplay:
    """What is kept of the features of every class, and the training of heads on samples of it (NSP2's App. B, after
    SLCA).

    `remember` takes mean m and unbiased covariance S of every class of a task, in float64, and keeps m and the Cholesky
    factor of S + 1e-4 I, made once, on the device and in the dtype of the features. Samples are m + F z. A class that
    comes again in another domain gets a second Gaussian, in proportion to its images.

    The official code factorises every class in every epoch, on the CPU (27 500 times for 100 classes in 10 tasks; here
    100), and keeps D^2 float64 numbers a class (T20 and T21 of method-null-space.md). As there, what is kept is not
    corrected for the drift of the features.
    """

    def __init__(self, covariance: str) -> None:
        self.covariance = covariance
        self.components: list[Component] = []
        self.scatter: Tensor | None = None  # of all classes, for "shared"
        self.freedom = 0

    @torch.no_grad()
    def remember(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add a task: (features [B, D], labels [B]) of its images. Raises `NonFiniteError` naming the class."""
        pairs = list(batches)
        features, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        for label in labels.unique().tolist():
            rows = features[labels == label]
            wide = rows.double()
            if not torch.isfinite(wide).all():
                raise NonFiniteError(f"features of class {label}: some are NaN or infinite; heads cannot be refined")
            mean = wide.mean(dim=0)
            factor = self._factor(wide - mean)
            kept = None if factor is None else factor.to(rows.dtype)
            self.components.append(Component(label, len(rows), mean.to(rows.dtype), kept))

    def _factor(self, centred: Tensor) -> Tensor | None:
        free = len(centred) - 1
        if self.covariance == "diagonal":
            return (centred.square().sum(dim=0) / max(free, 1) + RIDGE).sqrt()
        scatter = centred.mT @ centred
        if self.covariance == "full":
            return _cholesky(scatter / max(free, 1))
        self.scatter = scatter if self.scatter is None else self.scatter + scatter
        self.freedom += free
        return None

    @torch.no_grad()
    def sample(self, per_class: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n], `per_class` of every class seen, drawn on the device."""
        common = None if self.scatter is None else _cholesky(self.scatter / max(self.freedom, 1))
        return self._draw(per_class, common, generator)

    def _draw(self, per_class: int, common: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for component, size in zip(self.components, self._sizes(per_class), strict=True):
            mean, factor = component.mean, component.factor if common is None else common.to(component.mean.dtype)
            z = torch.randn(size, len(mean), dtype=mean.dtype, device=mean.device, generator=generator)
            if factor is not None:
                z = z * factor if factor.ndim == 1 else z @ factor.mT
            features.append(mean + z)
            labels.append(torch.full((size,), component.label, device=mean.device))
        return torch.cat(features), torch.cat(labels)

    def _sizes(self, per_class: int) -> list[int]:
        """Samples of every component: `per_class` a class, shared out by numbers of images."""
        total: dict[int, int] = {}
        for component in self.components:
            total[component.label] = total.get(component.label, 0) + component.images
        done: dict[int, int] = {}
        sizes = []
        for component in self.components:
            start = done.get(component.label, 0)
            done[component.label] = end = start + component.images
            whole = total[component.label]
            sizes.append(per_class * end // whole - per_class * start // whole)
        return sizes

    def refine(self, heads: Heads, options: RefineOptions) -> None:
        """Train all heads on samples of all classes: cross-entropy of the concatenated logits over the temperature.

        The random numbers come from torch's global state, of which one number is taken, so that a resumed run goes on
        exactly."""
        parameters = list(heads.parameters())
        asked = [parameter.requires_grad for parameter in parameters]
        device = parameters[0].device
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        common = None if self.scatter is None else _cholesky(self.scatter / max(self.freedom, 1))
        for parameter in parameters:
            parameter.requires_grad_(True)
        decays = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(decays, (options.refine_weight_decay, 0.0), strict=True)
            if group
        ]
        momentum = options.refine_momentum
        optimizer = torch.optim.SGD(groups, options.refine_lr, momentum, nesterov=momentum > 0)
        with torch.enable_grad():
            for _ in range(options.refine_epochs):
                features, labels = self._draw(options.refine_samples, common, generator)
                order = torch.randperm(len(labels), device=device, generator=generator)
                for rows in order.split(options.refine_batch):
                    logits = heads(features[rows]) / options.temperature
                    optimizer.zero_grad()
                    F.cross_entropy(logits, heads.columns(labels[rows])).backward()
                    optimizer.step()
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.grad = None
            parameter.requires_grad_(before)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers for a checkpoint."""
        return {
            "components": [list(component) for component in self.components],
            "scatter": self.scatter,
            "freedom": self.freedom,
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state` gave."""
        self.components = [
            Component(label, number, mean.to(device), None if factor is None else factor.to(device))
            for label, number, mean, factor in state["components"]
        ]
        self.scatter = None if state["scatter"] is None else state["scatter"].to(device)
        self.freedom = state["freedom"]


def _cholesky(covariance: Tensor) -> Tensor:
    ridge = RIDGE * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor: Tensor = torch.linalg.cholesky(covariance + ridge)
    return factor
