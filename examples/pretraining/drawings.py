"""Ink shards: 1-bit drawings of characters, each batch drawn anew (shift, rotation, scale, shear, stroke width,
inversion, contrast, colour, resolution and noise).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_kernels import data
from pretraining.run import Run, normalise

WHOLE = {"size": 32, "patch": 8, "channels": 3, "width": 128, "depth": 4, "heads": 4}
COUNTS = {"epochs": 180, "batch": 64, "seed": 0, "threads": 1, "save-every": 10}
REALS = {"lr": 1e-3, "weight-decay": 0.05, "label-smoothing": 0.1, "drop-path": 0.0, "ema": 0.999, "invert": 0.0}
CANVAS = 48  # drawings are kept 1.5x the model's size, so that moving and turning them loses no ink
STROKES = (1, 3, 5, 7)  # widths of the max filter on the original drawing; scikit-learn's digits have thick strokes


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, default in WHOLE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pool", choices=("token", "avg"), default="avg")
    for name, whole in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=whole)
    for name, real in (REALS | {"turn": 20.0}).items():
        parser.add_argument(f"--{name}", type=float, default=real)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the written weights")


@dataclass(frozen=True)
class Drawings:
    """Character drawings: ``canvas[s]`` uint8 [N, CANVAS, CANVAS] holds them at stroke width ``STROKES[s]``."""

    canvas: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.numel())


def _drawings(part: data.ImageSet) -> Drawings:
    ink = 1 - part.tensors().float().mean(dim=1, keepdim=True) / 255
    layers = []
    for width in STROKES:
        thick = F.max_pool2d(ink, width, stride=1, padding=width // 2)
        small = F.interpolate(thick, size=(CANVAS, CANVAS), mode="bilinear", antialias=True, align_corners=False)
        layers.append((small.squeeze(1) * 255).round().to(torch.uint8))
    return Drawings(torch.stack(layers), part.labels)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def affine(n: int, turn: float, generator: torch.Generator) -> Tensor:
    """Random maps [n, 2, 3]: rotation up to ``turn`` degrees, scale 0.75-1.3 each way, shear, shift up to 12 %."""
    angle = uniform(n, -turn, turn, generator) * (math.pi / 180)
    wide, tall = uniform(n, 0.75, 1.3, generator), uniform(n, 0.85, 1.15, generator)
    shear = uniform(n, -0.25, 0.25, generator)
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * wide, (shear * cos - sin) * wide * tall, uniform(n, -0.12, 0.12, generator) * 2]
    rows += [sin * wide, (shear * sin + cos) * wide * tall, uniform(n, -0.12, 0.12, generator) * 2]
    return torch.stack(rows, dim=1).view(n, 2, 3)


def augment(images: Tensor, size: int, channels: int, invert: float, turn: float, generator: torch.Generator) -> Tensor:
    """Turn ink [n, 1, CANVAS, CANVAS] in [0, 1] into training images [n, channels, size, size] in [0, 1]."""
    n = len(images)
    grid = F.affine_grid(affine(n, turn, generator), [n, 1, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    for low in (7, 8, 10, 12, 16):  # half of the images lose resolution: a tenth of them each way
        chosen = torch.rand(n, generator=generator) < 0.1
        if bool(chosen.any()):
            small = F.interpolate(images[chosen], size=(low, low), mode="area")
            images[chosen] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    peak = images.amax(dim=(1, 2, 3), keepdim=True).clamp_min(0.2)
    images = (images / peak) ** uniform(n, 0.6, 1.6, generator).view(-1, 1, 1, 1)
    ground = torch.rand(n, channels, 1, 1, generator=generator) * 0.35
    ink = 1 - torch.rand(n, channels, 1, 1, generator=generator) * 0.35
    images = ground + (ink - ground) * images
    flipped = (torch.rand(n, generator=generator) < invert).view(-1, 1, 1, 1)
    images = torch.where(flipped, 1 - images, images)
    noise = uniform(n, 0.0, 0.08, generator).view(-1, 1, 1, 1)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def batches(drawings: Drawings, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, each drawing at a random stroke width; the last short batch is dropped."""
    order = torch.randperm(len(drawings), generator=generator)
    widths = torch.randint(len(STROKES), (len(drawings),), generator=generator)
    for start in range(0, len(drawings) - batch + 1, batch):
        index = order[start : start + batch]
        yield drawings.canvas[widths[index], index].unsqueeze(1).float() / 255, drawings.labels[index]


class DrawingTask:
    """What the training run asks of its data, for drawings of dark ink on white."""

    noun = "characters", "unseen drawings"

    def __init__(self, args: argparse.Namespace) -> None:
        shard = data.load(args.data)
        self.args, self.classes = args, len(shard.class_names)
        self.train, self.test = (_drawings(part) for part in (shard.train, shard.test))

    def __len__(self) -> int:
        return len(self.train)

    def start(self, steps: int) -> Run:
        return Run(self.args, self.classes, steps)

    def epoch(self, run: Run) -> float:
        """Train on every drawing once; returns the mean loss."""
        args, losses = self.args, []
        generator = torch.Generator().manual_seed(args.seed * 100_003 + run.epoch)
        torch.manual_seed(args.seed * 100_003 + run.epoch)  # for drop path
        for ink, labels in batches(self.train, args.batch, generator):
            images = augment(ink, args.size, args.channels, args.invert, args.turn, generator)
            losses.append(float(run.update(images, lambda logits, labels=labels: run.cross_entropy(logits, labels))))
        return sum(losses) / len(losses)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of right answers on plain drawings at stroke width 3."""
        hits, size, held = 0, (self.args.size, self.args.size), self.test
        for start in range(0, len(held), 256):
            images = held.canvas[1, start : start + 256].unsqueeze(1).float() / 255
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
            logits = model(normalise(images.expand(-1, self.args.channels, -1, -1)))
            hits += int((logits.argmax(1) == held.labels[start : start + 256]).sum())
        return hits / len(held)
