"""What a frozen backbone's features are worth: nearest class mean and logistic regression on other data's test set.

python examples/probe_backbone.py --backbone vit_photos.safetensors --data cifar10_1000x200.npz tin32_novel100.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels import data


@torch.no_grad()
def features(backbone: data.Backbone, part: data.ImageSet) -> Tensor:
    """Features [N, D] of all images."""
    chunks = part.tensors().split(500)
    return torch.cat([backbone.model(backbone.preprocessing(images)) for images in chunks])


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """The rows of the first `count` images of each class."""
    return torch.cat([(labels == value).nonzero().flatten()[:count] for value in torch.unique(labels)])


def class_means(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The class whose mean direction is nearest by cosine."""
    unit = F.normalize(train, dim=1)
    means = torch.stack([unit[labels == value].mean(0) for value in range(int(labels.max()) + 1)])
    return (F.normalize(test, dim=1) @ F.normalize(means, dim=1).mT).argmax(1)


def logistic(train: Tensor, labels: Tensor, test: Tensor, strength: float) -> Tensor:
    """scikit-learn's logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(((train - mean) / deviation).numpy(), labels.numpy())
    return torch.from_numpy(model.predict(((test - mean) / deviation).numpy()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", required=True, help="a name or a file that cl_kernels.data.load_backbone reads")
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100, help="training images of a class")
    parser.add_argument("--strength", type=float, default=0.01, help="inverse penalty of the logistic regression")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = data.load_backbone(args.backbone)
    for path in args.data:
        loaded = data.load(path, image_size=backbone.preprocessing.size)
        train = loaded.train.subset(first_of_each(loaded.train.labels, args.images))
        x, held = features(backbone, train), features(backbone, loaded.test)
        found = {"data": loaded.name, "train": len(train), "test": len(loaded.test)}
        for name, guess in (
            ("class_means", class_means(x, train.labels, held)),
            ("logistic_regression", logistic(x, train.labels, held, args.strength)),
        ):
            found[name] = round(float((guess == loaded.test.labels).float().mean()), 4)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
