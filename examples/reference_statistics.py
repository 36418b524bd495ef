"""Write the statistics of a backbone's pre-training images, which `cl-kernels compare` measures distances to.

For any backbone and any folder of pictures or ``.npz`` shard:

    python examples/reference_statistics.py --backbone vit_base_patch16_224 --weights w.safetensors \
        --data imagenet/train --source "ImageNet-21k, 5,000 images drawn at random" --out vit_base.safetensors

The two files that ship with the package were made from the drawings their backbones were trained on (Omniglot, MIT
licence), as light ink on a dark ground with strokes of 1, 3, 5 or 7 pixels, which ``--ink`` does; ``--mark`` also
measures the shard's held-out drawings, by drawers the backbone has not seen: the near end of the ruler.

    python examples/reference_statistics.py --backbone embedded --data omniglot_small12.npz --ink \
        --mark "same characters by other drawers" --source "Omniglot, ..." --out embedded.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels import data
from cl_kernels.compare.distance import measure
from cl_kernels.compare.features import extract
from cl_kernels.compare.reference import from_features, reference_images
from cl_kernels.data.preprocess import cover

STROKES = (1, 3, 5, 7)  # as examples/pretrain_backbone.py draws them


def as_drawn(images: Tensor, size: int, seed: int) -> Tensor:
    """Dark ink on white [N, 1, H, W] as light ink on black [N, 1, size, size], each at a random stroke width."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(len(STROKES), (len(images),), generator=generator)
    ink = 255 - images.float()
    made = torch.empty_like(ink)
    for number, width in enumerate(STROKES):
        made[widths == number] = F.max_pool2d(ink[widths == number], width, stride=1, padding=width // 2)
    return cover(made.to(torch.uint8), size)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write reference statistics of a backbone's pre-training images.")
    parser.add_argument("--backbone", default="embedded", help="as for cl-kernels train")
    parser.add_argument("--weights", default=None, help="safetensors file of a timm backbone")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures, or .npz shard")
    parser.add_argument("--out", type=Path, required=True, help="statistics to write (.safetensors)")
    parser.add_argument("--name", default=None, help="what reports call these images; the data's name by default")
    parser.add_argument("--source", required=True, help="in words: which images, from where, under which licence")
    parser.add_argument("--limit", type=int, default=5000, help="images to look at")
    parser.add_argument("--stored", type=int, default=1000, help="of these, features kept for KID and proxy-A distance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ink", action="store_true", help="the images are ink on white: draw them as in pre-training")
    parser.add_argument("--mark", default=None, help="measure the shard's test images too, under this name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    backbone = data.load_backbone(args.backbone, args.weights)
    size = backbone.preprocessing.size
    images, skipped = reference_images(args.data, None if args.ink else size, args.limit, args.seed)
    if args.ink:
        images = as_drawn(images, size, args.seed)
    made = from_features(
        backbone, images, name=args.name or args.data.stem, source=args.source, skipped=skipped, stored=args.stored
    )
    if args.mark is not None:
        held = data.load(args.data, image_size=None if args.ink else size).test.tensors()
        held = as_drawn(held, size, args.seed + 1) if args.ink else held
        found = measure(extract(backbone, held).pooled, made, seed=args.seed)
        made = dataclasses.replace(made, marks={args.mark: found})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(args.out)
    print(f"wrote {args.out}: {made.n} images ({skipped} broken ones passed over), {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
