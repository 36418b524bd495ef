"""What the official repositories do when a task ends, and what they keep: written anew, on float32 tensors as there.

Kept are the steps that cost: inputs laid out, Gram matrices of single images, full SVDs, dense projectors. The rank
rule is the method's own, so that results can be compared with ours. `task_ways` uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from cl_kernels.benchmarks import official
from torch import Tensor, nn

__all__ = ["Cut", "Directions", "InputMoments", "PromptMoments", "Representations"]

Batches = Iterable[tuple[Tensor, Tensor]]


class Cut(NamedTuple):
    """`mix` of the projector onto what `protected` singular values leave, over its norm if `fro`, and the rest of I."""

    protected: Callable[[Tensor], int]
    mix: float
    fro: bool

    def dense(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The dense projector, and the full SVD's basis, which the optimizer goes on holding."""
        vectors, values, _ = torch.linalg.svd(covariance)
        free = vectors[:, self.protected(values.double()) :]
        projector = free @ free.mT
        if self.fro:
            projector = projector / projector.norm()
        if self.mix < 1:
            projector = self.mix * projector + (1 - self.mix) * torch.eye(len(projector))
        return projector, vectors


class PromptMoments:
    """NSP2: sums of both matrices of every block, and dense projectors on both sides."""

    def __init__(self, model: Any, sums: Mapping[int, tuple[Tensor, Tensor]], right: Cut, left: Cut) -> None:
        self.model, self.right, self.left = model, right, left
        self.sums = {block: (c1.float(), c2.float()) for block, (c1, c2) in sums.items()}
        self.dense: dict[str, tuple[Tensor, Tensor]] = {}
        self.previous = [prompt.detach().clone() for prompt in model.prompts]

    @torch.no_grad()
    def end(self, batches: Batches) -> dict[str, Tensor]:
        found: dict[int, tuple[Tensor, Tensor]] = dict(self.sums)
        for images, _ in batches:
            official.nsp2_statistics(self.model, lambda images=images: self.model(images), found)
        self.dense = {
            f"prompts.{block}": (self.left.dense(c2)[0], self.right.dense(c1)[0]) for block, (c1, c2) in found.items()
        }
        return {f"{name} {side}": p for name, both in self.dense.items() for side, p in zip(("left", "right"), both)}

    def tensors(self) -> list[Tensor]:
        both = [*self.sums.values(), *self.dense.values()]
        return [*(t for pair in both for t in pair), *self.previous]


class InputMoments:
    """Adam-NSCL: every layer's inputs laid out, their X^T X added up, a full SVD, a dense projector a parameter.

    `batch_means`: as its code, of the inputs averaged over a batch first; else of all rows, as its paper.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], sums: Mapping[str, Tensor], cut: Cut, *, batch_means: bool
    ) -> None:
        self.model, self.layers, self.cut, self.batch_means = model, layers, cut, batch_means
        self.sums = {name: c.float() for name, c in sums.items()}
        self.dense: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}

    @torch.no_grad()
    def end(self, batches: Batches) -> dict[str, Tensor]:
        found = dict(self.sums)

        def read(name: str, x: Tensor) -> None:
            rows = x.mean(dim=0) if self.batch_means else x.flatten(0, -2)
            found[name] = found[name] + rows.mT @ rows

        with watched(self.model, self.layers, read):
            for images, _ in batches:
                self.model(images)
        for name, c in found.items():
            self.dense[name], self.vectors[name] = self.cut.dense(c)
        return dict(self.dense)

    def tensors(self) -> list[Tensor]:
        return [*self.sums.values(), *self.vectors.values(), *self.dense.values()]


class Representations:
    """GPM: the inputs of one batch of images stored, an SVD of them and one of what the basis leaves, M M^T dense."""

    def __init__(
        self, model: nn.Module, layers: Sequence[str], bases: Mapping[str, Tensor], keep: Callable[[str], float]
    ) -> None:
        self.model, self.layers, self.keep = model, layers, keep
        self.bases = {name: m.float() for name, m in bases.items()}
        self.dense: dict[str, Tensor] = {}

    @torch.no_grad()
    def end(self, batches: Batches) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}

        def read(name: str, x: Tensor) -> None:
            stored[name] = x.flatten(0, -2).mT.contiguous()

        with watched(self.model, self.layers, read):
            self.model(torch.cat([images for images, _ in batches]))
        for name, r in stored.items():
            m = self.bases[name]
            total = torch.linalg.svd(r, full_matrices=False)[1].square().sum()
            vectors, values, _ = torch.linalg.svd(r - m @ m.mT @ r, full_matrices=False)
            grown = torch.cat([m, vectors[:, : needed(values.square(), total, self.keep(name))]], dim=1)[:, : len(r)]
            self.dense[name] = grown @ grown.mT
        return dict(self.dense)

    def tensors(self) -> list[Tensor]:
        return [*self.bases.values(), *self.dense.values()]


class Directions:
    """InfLoRA: a Gram matrix of each image apart, full SVDs of them before the task and twice after it, M M^T dense.

    What M leaves of a Gram matrix is taken on both sides and energy counts as sigma^2, as ours has it.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], bases: Mapping[str, Tensor], rank: int, keep: float
    ) -> None:
        self.model, self.layers, self.rank, self.keep = model, layers, rank, keep
        self.bases = {name: m.float() for name, m in bases.items()}
        self.dense = {name: m @ m.mT for name, m in self.bases.items()}

    @torch.no_grad()
    def _grams(self, batches: Batches) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def read(name: str, x: Tensor) -> None:
            one = torch.bmm(x.mT, x).sum(dim=0)
            found[name] = found[name] + one if name in found else one

        with watched(self.model, self.layers, read):
            for images, _ in batches:
                self.model(images)
        return found

    def begin(self, batches: Batches) -> dict[str, Tensor]:
        """The down-projections of the task, [in, rank]."""
        return {
            name: torch.linalg.svd(self._left(name, c))[0][:, : self.rank] / math.sqrt(3)
            for name, c in self._grams(batches).items()
        }

    def end(self, batches: Batches) -> dict[str, Tensor]:
        made = {}
        for name, c in self._grams(batches).items():
            total = torch.linalg.svd(c)[1].sum()
            vectors, values, _ = torch.linalg.svd(self._left(name, c))
            grown = torch.cat([self.bases[name], vectors[:, : needed(values, total, self.keep)]], dim=1)
            made[name] = grown @ grown.mT
        return made

    def _left(self, name: str, c: Tensor) -> Tensor:
        c = c - self.dense[name] @ c
        return c - c @ self.dense[name]

    def tensors(self) -> list[Tensor]:
        """Bases, projectors, and two Gram matrices a layer that wait for the next pass."""
        waiting = [torch.zeros_like(p) for p in self.dense.values() for _ in range(2)]
        return [*self.bases.values(), *self.dense.values(), *waiting]


def needed(energies: Tensor, total: Tensor, keep: float) -> int:
    """How many directions are added, one by one, until with what was held `keep` of the total is."""
    held, count = 1 - float(energies.sum() / total), 0
    for share in (energies / total).tolist():
        if held >= keep:
            break
        held, count = held + share, count + 1
    return count


@contextmanager
def watched(model: nn.Module, layers: Sequence[str], read: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `read(name of the weight, input)` for every call of the linear layers."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: read(f"{name}.weight", args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
