"""Train a small ViT from scratch on an ``.npz`` shard: the backbones of this package, and others like them.

A plain ``timm`` vision transformer learns to name handwritten characters (ink shards: 1-bit drawings) or photographs
(JPEG shards); the recipes are in ``pretraining/drawings.py`` and ``pretraining/photos.py``. The run is seeded, prints
one line an epoch and can be killed at any moment: the same command continues from the last saved epoch and ends with
the same weights. ``cl_kernels.data.load_backbone`` reads the file it writes.

    python examples/pretrain_backbone.py --data omniglot_small12.npz --out vit_omniglot.safetensors
    python examples/pretrain_backbone.py --data tin32_base100.npz --out vit_photos.safetensors --device auto
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from pretraining import drawings, photos

from cl_kernels import data


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options: which there are depends on the data, and for photographs their defaults on the device."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--data", type=Path, required=True, help="shard (.npz), or whatever cl_kernels.data.load reads")
    first.add_argument("--out", type=Path, required=True, help="weights to write (.safetensors)")
    second = argparse.ArgumentParser(add_help=False)
    second.add_argument("--device", default="auto", help="auto: a CUDA device where there is one")
    second.add_argument("--profile", choices=("auto", "cpu", "gpu"), default="auto", help="sets the defaults below")
    parser = argparse.ArgumentParser(description="Train a small ViT on drawings or on photographs.", parents=[first])
    known, _ = first.parse_known_args(argv)
    if channels(known.data) == 1:
        drawings.add_options(parser)
        return parser.parse_args(argv)
    place, _ = second.parse_known_args(argv)
    device = place.device if place.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    profile = place.profile if place.profile != "auto" else "gpu" if device.startswith("cuda") else "cpu"
    parser = argparse.ArgumentParser(description=parser.description, parents=[first, second])
    photos.add_options(parser, profile, device)
    args = parser.parse_args(argv)
    args.device, args.profile = device, profile
    return args


def channels(path: Path) -> int:
    """1 for an ink shard, 3 for photographs."""
    return int(data.load(path).train[0][0].shape[0])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    task = photos.PhotoTask(args) if hasattr(args, "device") else drawings.DrawingTask(args)
    run = task.start(args.epochs * (len(task) // args.batch))
    checkpoint = args.out.with_name(args.out.name + ".checkpoint")
    before = run.resume(checkpoint) if checkpoint.exists() else 0.0
    start = time.perf_counter()
    run.model.train()
    while run.epoch < args.epochs:
        loss = task.epoch(run)
        run.epoch += 1
        seconds = before + time.perf_counter() - start
        note = ""
        if run.epoch % args.save_every == 0 or run.epoch == args.epochs:
            note = f"  test {task.accuracy(run.averaged()):.4f}"
            run.save(checkpoint, seconds)
        sys.stdout.write(f"epoch {run.epoch:4d}  loss {loss:.4f}{note}  {seconds:7.1f} s\n")
        sys.stdout.flush()
    right = task.accuracy(run.averaged())
    run.export(args.out, right, getattr(torch, args.dtype))
    kind, held = task.noun
    sys.stdout.write(f"wrote {args.out}: {task.classes} {kind}, {right:.4f} of {len(task.test)} {held} right\n")


if __name__ == "__main__":
    main()
