"""One task of KDP, teacher phase and student phase, by the official schedule and by ours, on two ViTs of 1 : 3.8 cost.

The official code leaves its backbones unfrozen (weight gradients of whole models are computed and pile up), runs the
query of each model by itself, computes a token correlation in every teacher block that nothing reads, runs the last
block whole, and makes the teacher's logits again in every epoch. All variants run the same method on the same batches
in the same order and must end with the same predictions: what is saved is only what was not needed. "frozen, query
shared" caches nothing, as with random augmentation; "ours" computes the query and the teacher's logits once an image
and phase, as `cl-kernels train` does without augmentation. For a ViT-B that teaches a ViT-S, multiplications alone, and
caches filled for nothing, give 0.73 and 0.55 of the official schedule.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from cl_kernels.benchmarks import official
from cl_kernels.benchmarks.harness import Case, Plan, main, planned
from torch import Tensor, nn

from cl_kernels import methods
from cl_kernels._timm import import_timm
from cl_kernels.methods.kdp import KDP

TABLE = ("kdp task",)


@dataclass(frozen=True)
class Sizes:
    """Widths of student and teacher, blocks, pixels of a side, images, epochs, batch size."""

    student: int = 96
    teacher: int = 192
    depth: int = 6
    side: int = 64
    images: int = 24
    epochs: int = 10
    batch: int = 16

    @property
    def name(self) -> str:
        return f"{self.depth} blocks {self.teacher} -> {self.student}, {self.images} images, {self.epochs} epochs"


@dataclass(frozen=True)
class OneTask:
    """The first of two tasks, of random pictures."""

    images: Tensor
    labels: Tensor
    epochs: int
    batch: int
    index: int = 0
    classes: tuple[int, ...] = tuple(range(10))
    last: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ()

    def order(self) -> Iterator[Tensor]:
        """Rows of every batch of every epoch."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.epochs):
            yield from torch.randperm(len(self.images), generator=generator).split(self.batch)


def vit(width: int, sizes: Sizes) -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=sizes.side, patch_size=8, embed_dim=width, depth=sizes.depth, num_heads=width // 32, num_classes=0
    )
    return model


class Schedule:
    """A task that has not begun, as often as it is wanted."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.student, self.teacher = (vit(width, sizes).to(device) for width in (sizes.student, sizes.teacher))
        images = torch.randn(sizes.images, 3, sizes.side, sizes.side, device=device)
        self.task = OneTask(images, torch.arange(sizes.images, device=device) % 10, sizes.epochs, sizes.batch)

    def begun(self) -> KDP:
        torch.manual_seed(0)
        method = methods.create("kdp", copy.deepcopy(self.student), head_init="default", prompt_pool="coda-prompt")
        if not isinstance(method, KDP):
            raise TypeError(f"kdp: expected a KDP, got {type(method).__name__}")
        method.set_teacher(copy.deepcopy(self.teacher), lambda images: images)
        method.begin_task(self.task)
        return method

    def official(self) -> Tensor:
        method = self.begun()
        official.kdp_task(method, self.task.images, self.task.labels, self.task.order, self.step)
        return self.predictions(method)

    def lean(self, cached: bool) -> Tensor:
        method = self.begun()
        for phase in (0, 1):
            if phase:
                method.begin_phase(phase)
            known = method.per_image(self.task.images) if cached else ()
            for rows in self.task.order():
                batch = self.task.images[rows], self.task.labels[rows]
                self.step(method, method.loss(batch, *(fact[rows] for fact in known)))
        return self.predictions(method)

    @staticmethod
    def step(method: KDP, loss: Tensor) -> None:
        if method.optimizer is None:
            raise RuntimeError("kdp: no phase has begun")
        method.optimizer.zero_grad()
        torch.autograd.backward(loss)
        method.optimizer.step()

    @torch.no_grad()
    def predictions(self, method: KDP) -> Tensor:
        return method.logits(method.features(self.task.images[: self.task.batch]))


@planned("kdp task, {sizes.name}")
def one_task(sizes: Sizes, device: str) -> Case:
    schedule = Schedule(sizes, device)
    variants = {
        "ours": lambda: schedule.lean(cached=True),
        "frozen, query shared": lambda: schedule.lean(cached=False),
        "official schedule": schedule.official,
    }
    return Case(variants, schedule.lean(cached=True), 2e-2)


def all_cases(quick: bool, device: str) -> Iterable[Plan]:
    if quick:
        yield one_task(Sizes(32, 64, 2, 16, 12, 2, 6), device)
        yield one_task(Sizes(32, 64, 1, 16, 12, 1, 12), device)
        return
    yield one_task(Sizes(), device)


def cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cpu")


def cuda_cases(quick: bool) -> Iterable[Plan]:
    return all_cases(quick, "cuda")


if __name__ == "__main__":
    sys.exit(main(__name__))
