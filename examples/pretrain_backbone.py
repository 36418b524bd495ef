"""Train the small ViT that cl_kernels ships as its embedded backbone.

A plain ``timm`` vision transformer learns to name handwritten characters (any ink shard: bits of pixel == ink, 15
training and 5 test drawers per character). Only the drawings are used, every batch drawn anew: shift, rotation, scale,
shear, stroke width, inversion, contrast, colour, resolution and noise. The run is seeded, prints one line an epoch and
can be killed at any moment: the same command continues from the last finished epoch and ends with the same weights.

    python examples/pretrain_backbone.py --data omniglot_small12.npz --out vit_omniglot.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_kernels import data
from cl_kernels._timm import import_timm

CANVAS = 48  # drawings are kept 1.5x the model's size, so that moving and turning them loses no ink
STROKES = (1, 3, 5, 7)  # widths of the max filter on the original drawing; scikit-learn's digits have thick strokes


@dataclass(frozen=True)
class Drawings:
    """Character drawings: ``canvas[s]`` uint8 [N, CANVAS, CANVAS] holds them at stroke width ``STROKES[s]``."""

    canvas: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.numel())


def load_drawings(path: Path) -> tuple[Drawings, Drawings, int]:
    """Read drawings of dark ink on white and return (train, test, number of classes)."""
    drawings = data.load(path)
    parts = [_drawings(part) for part in (drawings.train, drawings.test)]
    return parts[0], parts[1], len(drawings.class_names)


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


@torch.no_grad()
def accuracy(model: nn.Module, drawings: Drawings, size: int, channels: int) -> float:
    """Share of right answers on plain drawings at stroke width 3."""
    model.eval()
    hits = 0
    for start in range(0, len(drawings), 256):
        images = drawings.canvas[1, start : start + 256].unsqueeze(1).float() / 255
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = model(normalise(images.expand(-1, channels, -1, -1)))
        hits += int((logits.argmax(1) == drawings.labels[start : start + 256]).sum())
    model.train()
    return hits / len(drawings)


def normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.5


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write beside the target, then rename: a kill leaves the old file or the new one, never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    os.replace(temporary, path)


class Run:
    """Model, averaged model and optimizer, with a checkpoint that holds all three."""

    def __init__(self, args: argparse.Namespace, classes: int, steps: int) -> None:
        torch.manual_seed(args.seed)
        import_timm()
        from timm.models.vision_transformer import VisionTransformer

        self.args, self.steps, self.step, self.epoch = args, steps, 0, 0
        self.shape = {
            "img_size": args.size,
            "patch_size": args.patch,
            "in_chans": args.channels,
            "embed_dim": args.width,
            "depth": args.depth,
            "num_heads": args.heads,
            "global_pool": args.pool,
            "class_token": args.pool == "token",
        }
        self.model = VisionTransformer(
            **self.shape, num_classes=classes, weight_init="jax", drop_path_rate=args.drop_path
        )
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))

    def learning_rate(self) -> float:
        """Linear warm-up over 5 % of the steps, then a cosine to 1 % of the peak."""
        warm = max(1, self.steps // 20)
        if self.step < warm:
            return float(self.args.lr) * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return float(self.args.lr) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def update(self, images: Tensor, labels: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = F.cross_entropy(self.model(normalise(images)), labels, label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.args.ema, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def averaged(self) -> nn.Module:
        """A copy of the model that carries the averaged weights."""
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(**self.shape, num_classes=self.model.num_classes)
        model.load_state_dict(self.average)
        return model

    def command(self) -> str:
        """Everything that decides the result; a checkpoint of another command is not continued."""
        ignored = ("data", "out", "threads", "save_every")
        return json.dumps({k: v for k, v in vars(self.args).items() if k not in ignored}, sort_keys=True)

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        meta = {"command": self.command(), "epoch": str(self.epoch), "step": str(self.step), "seconds": str(seconds)}
        save_atomically(tensors, path, meta)

    def resume(self, path: Path) -> float:
        """Continue from ``path`` if it belongs to this command; returns the seconds spent before."""
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("command") != self.command():
                raise SystemExit(f"{path} belongs to another command; remove it or choose another --out")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors handle
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                index, field = name.removeprefix("optimizer.").split(".")
                state.setdefault(int(index), {})[field] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        self.epoch, self.step = int(meta["epoch"]), int(meta["step"])
        return float(meta["seconds"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded backbone on an ink shard.")
    parser.add_argument("--data", type=Path, required=True, help="ink shard (.npz)")
    parser.add_argument("--out", type=Path, required=True, help="weights to write (.safetensors)")
    for name, default in {"size": 32, "patch": 8, "channels": 3, "width": 128, "depth": 4, "heads": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pool", choices=("token", "avg"), default="avg")
    for name, whole in {"epochs": 180, "batch": 64, "seed": 0, "threads": 1, "save-every": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=whole)
    reals = {"lr": 1e-3, "weight-decay": 0.05, "label-smoothing": 0.1, "drop-path": 0.0, "ema": 0.999, "invert": 0.0}
    for name, real in (reals | {"turn": 20.0}).items():
        parser.add_argument(f"--{name}", type=float, default=real)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the written weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    train, test, classes = load_drawings(args.data)
    run = Run(args, classes, args.epochs * (len(train) // args.batch))
    checkpoint = args.out.with_name(args.out.name + ".checkpoint")
    before = run.resume(checkpoint) if checkpoint.exists() else 0.0
    start = time.perf_counter()
    run.model.train()
    while run.epoch < args.epochs:
        generator = torch.Generator().manual_seed(args.seed * 100_003 + run.epoch)
        torch.manual_seed(args.seed * 100_003 + run.epoch)  # for drop path
        losses = []
        for ink, labels in batches(train, args.batch, generator):
            images = augment(ink, args.size, args.channels, args.invert, args.turn, generator)
            losses.append(run.update(images, labels))
        run.epoch += 1
        seconds = before + time.perf_counter() - start
        note = ""
        if run.epoch % args.save_every == 0 or run.epoch == args.epochs:
            note = f"  test {accuracy(run.averaged(), test, args.size, args.channels):.4f}"
            run.save(checkpoint, seconds)
        sys.stdout.write(f"epoch {run.epoch:4d}  loss {sum(losses) / len(losses):.4f}{note}  {seconds:7.1f} s\n")
        sys.stdout.flush()
    right = accuracy(run.averaged(), test, args.size, args.channels)
    dtype = getattr(torch, args.dtype)
    weights = {k: v.to(dtype) for k, v in run.average.items() if not k.startswith("head.")}
    meta = {"architecture": json.dumps(run.shape), "mean": "0.5", "std": "0.5", "command": run.command()}
    save_atomically(weights, args.out, meta | {"format": "pt", "test_accuracy": f"{right:.4f}"})
    sys.stdout.write(f"wrote {args.out}: {classes} characters, {right:.4f} of {len(test)} unseen drawings right\n")


if __name__ == "__main__":
    main()
