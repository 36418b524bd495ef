"""JPEG shards: photographs, decoded once into memory, with augmentation by the batch (see ``photo_augment``).

Two profiles set the defaults. ``gpu``: patch 4, 9 blocks, resized crops, RandAugment, MixUp and CutMix for 200 epochs
of 50,000 images at 32x32, planned for 8 minutes on an H200 and not yet run there. ``cpu``: patch 8, 6 blocks,
whole-pixel shifts and some CutMix, because 40 minutes of one thread are 10 to 30 epochs, too few to need more; patch 8
was better than patch 4 at every equal budget of a CPU.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cl_kernels import data
from pretraining import photo_augment
from pretraining.run import Run, normalise

WHOLE = {"size": 32, "width": 192, "heads": 3, "seed": 0, "threads": 1, "save-every": 1}
COUNTS = {
    "cpu": {"patch": 8, "depth": 6, "epochs": 20, "batch": 128, "shift": 4, "operations": 0},
    "gpu": {"patch": 4, "depth": 9, "epochs": 200, "batch": 512, "shift": 0, "operations": 2},
}
REALS = {
    "cpu": {"lr": 1e-3, "ema": 0.999, "drop-path": 0.0, "crop": 1.0, "magnitude": 0.5, "mixup": 0.0, "cutmix": 0.3},
    "gpu": {"lr": 2e-3, "ema": 0.9998, "drop-path": 0.1, "crop": 0.3, "magnitude": 0.5, "mixup": 0.4, "cutmix": 0.4},
}
HELP = {
    "shift": "pixels that images are moved by, where --crop is 1",
    "operations": "RandAugment's operations an image",
    "crop": "smallest share of the area that a resized crop keeps; 1 means none",
    "magnitude": "RandAugment's strength, 0 to 1",
    "mixup": "share of the batches that are mixed",
    "cutmix": "share of the batches with a box of other images",
}


def add_options(parser: argparse.ArgumentParser, profile: str, device: str) -> None:
    whole, real = WHOLE | COUNTS[profile], {"weight-decay": 0.05, "label-smoothing": 0.1} | REALS[profile]
    for name, value in whole.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=HELP.get(name))
    for name, share in real.items():
        parser.add_argument(f"--{name}", type=float, default=share, help=HELP.get(name))
    parser.add_argument("--channels", type=int, choices=(3,), default=3)
    parser.add_argument("--pool", choices=("token", "avg"), default="token")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float16", help="of the written weights")
    precision = "bf16" if device.startswith("cuda") else "float32"
    parser.add_argument("--precision", choices=("float32", "bf16"), default=precision, help="of the matrix products")


class Photos:
    """Decoded photographs uint8 [N, 3, H, W] and their labels, on the device: 154 MB for 50,000 at 32x32."""

    def __init__(self, part: data.ImageSet, device: torch.device) -> None:
        self.images, self.labels = part.tensors().to(device), part.labels.to(device)

    def __len__(self) -> int:
        return int(self.labels.numel())


class PhotoTask:
    """What the training run asks of its data, for photographs."""

    noun = "classes", "test photographs"

    def __init__(self, args: argparse.Namespace) -> None:
        shard = data.load(args.data, image_size=args.size)
        self.args, self.classes = args, len(shard.class_names)
        self.device = torch.device(args.device)
        self.train, self.test = (Photos(part, self.device) for part in (shard.train, shard.test))

    def __len__(self) -> int:
        return len(self.train)

    def start(self, steps: int) -> Run:
        return Run(self.args, self.classes, steps, device=self.args.device, bf16=self.args.precision == "bf16")

    def _batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, augmented; the last short batch is dropped."""
        args, images, labels = self.args, self.train.images, self.train.labels
        order = torch.randperm(len(labels), generator=generator, device=self.device)
        for start in range(0, len(labels) - args.batch + 1, args.batch):
            index = order[start : start + args.batch]
            batch = images[index].float() / 255
            if args.crop < 1:
                batch = photo_augment.crop_and_turn(batch, args.crop, args.magnitude, args.operations, generator)
            else:
                batch = photo_augment.flip_and_shift(batch, args.shift, generator)
            if args.operations:
                batch = photo_augment.colour(batch, args.magnitude, args.operations, generator)
            yield batch, labels[index]

    def epoch(self, run: Run) -> float:
        """Train on every photograph once; returns the mean loss."""
        args, losses = self.args, []
        seed = args.seed * 100_003 + run.epoch
        generator, host = torch.Generator(self.device).manual_seed(seed), random.Random(seed)
        torch.manual_seed(seed)  # for drop path
        for images, labels in self._batches(generator):
            other, share, draw = labels.roll(1), 1.0, host.random()
            if draw < args.mixup:
                share = host.betavariate(0.8, 0.8)
                images = images * share + images.roll(1, 0) * (1 - share)
            elif draw < args.mixup + args.cutmix:
                images, share = photo_augment.cut_in(images, images.roll(1, 0), host.random(), host)

            def loss(logits: Tensor, a: Tensor = labels, b: Tensor = other, share: float = share) -> Tensor:
                return share * run.cross_entropy(logits, a) + (1 - share) * run.cross_entropy(logits, b)

            losses.append(run.update(images, loss))
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of right answers on the test photographs, in float32."""
        images, labels = self.test.images, self.test.labels
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(labels), 500):
            logits = model(normalise(images[start : start + 500].float() / 255))
            hits += (logits.argmax(1) == labels[start : start + 500]).sum()
        return int(hits) / len(labels)
