"""Which task an image belongs to, from the features of the first snapshot: clusters with Mahalanobis distances."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TaskInference"]

RIDGE = 1e-4
ROUNDS = 50


class TaskInference:
    """argmin over clusters of every class of every task of (f - mu)^T P (f - mu), f the feature scaled to length one.

    Each class of a task is divided into `clusters` by k-means, with the covariance S of each, S + 1e-4 I, then
    S + mean(diag S) I (shrinkage), normalised to a correlation matrix; P is its inverse, kept as a Cholesky factor that
    is made once (the official code inverts anew in every evaluation). Features must come from one fixed model, the
    snapshot after task 0, so that what is kept never ages. Classes that come again, in another domain, get clusters of
    their own there. State: D^2 + D numbers a cluster. Source: LoRAC-IPC's task inference, after FeCAM;
    method-lora-composition.md 7.
    """

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self.means: list[Tensor] = []
        self.factors: list[Tensor] = []  # W with W^T W = P
        self.tasks: list[int] = []

    @torch.no_grad()
    def remember(self, task: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add a task: (features [B, D], labels [B]) of its images."""
        pairs = list(batches)
        features, labels = torch.cat([_unit(x) for x, _ in pairs]), torch.cat([y for _, y in pairs])
        for label in labels.unique().tolist():
            rows = features[labels == label]
            for members in _k_means(rows, self.clusters):
                self.means.append(members.mean(dim=0))
                self.factors.append(_whitener(members))
                self.tasks.append(task)

    @torch.no_grad()
    def tasks_of(self, features: Tensor) -> Tensor:
        """The task of every row of features [B, D], int64 [B]."""
        rows = _unit(features)
        distances = torch.stack(
            [((rows - mean) @ factor.mT).square().sum(dim=1) for mean, factor in zip(self.means, self.factors)]
        )
        return torch.tensor(self.tasks, device=rows.device)[distances.argmin(dim=0)]

    def state(self) -> dict[str, Any]:
        """Tensors and numbers for a checkpoint."""
        return {"means": list(self.means), "factors": list(self.factors), "tasks": list(self.tasks)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state` gave."""
        self.means = [mean.to(device) for mean in state["means"]]
        self.factors = [factor.to(device) for factor in state["factors"]]
        self.tasks = list(state["tasks"])


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)


def _whitener(members: Tensor) -> Tensor:
    """W with W^T W the inverse of the shrunk correlation matrix of `members` [n, D], in float64."""
    centred = members - members.mean(dim=0)
    identity = torch.eye(members.shape[1], dtype=members.dtype, device=members.device)
    covariance = centred.mT @ centred / max(len(members) - 1, 1) + RIDGE * identity
    covariance = covariance + covariance.diagonal().mean() * identity
    deviations = covariance.diagonal().sqrt()
    factor = torch.linalg.cholesky(covariance / torch.outer(deviations, deviations))
    whitener: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return whitener


def _k_means(rows: Tensor, clusters: int) -> list[Tensor]:
    """The members of at most `clusters` clusters: Lloyd's rounds from the points farthest from those chosen before,
    so that nothing is drawn. Clusters of fewer than two rows are not made."""
    count = min(clusters, max(len(rows) // 2, 1))
    chosen = [int((rows - rows.mean(dim=0)).square().sum(dim=1).argmin())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(rows, rows[chosen]).amin(dim=1).argmax()))
    centres = rows[chosen]
    owner = torch.cdist(rows, centres).argmin(dim=1)
    for _ in range(ROUNDS):
        held = [rows[owner == index] for index in range(len(centres))]
        centres = torch.stack([members.mean(dim=0) for members in held if len(members) > 1] or [rows.mean(dim=0)])
        moved = torch.cdist(rows, centres).argmin(dim=1)
        if torch.equal(moved, owner):
            break
        owner = moved
    held = [rows[owner == index] for index in range(len(centres))]
    return [members for members in held if len(members)]
