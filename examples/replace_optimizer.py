"""An ordinary timm training loop in which one line changes: the optimizer.

    python examples/replace_optimizer.py            # needs timm and scikit-learn; about 30 seconds on one core

A small ViT learns the digits 0-4, then the digits 5-9. The second task is trained three times from the same weights,
with `torch.optim.AdamW`, `ProjectedAdamW` and `FTPAdamW`; then each is asked about the first task again.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cl_kernels as clk
from cl_kernels._timm import import_timm
from cl_kernels.subspace import build_store

TASKS = (range(5), range(5, 10))


def make_model() -> nn.Module:
    import_timm()  # `import timm` that also works where torchvision's operators do not load
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4)


def load(classes: range, train: bool) -> TensorDataset:
    """A task's images [n, 1, 8, 8] and labels 0-9; every fifth image is for testing."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()
    chosen = torch.isin(labels, torch.tensor(list(classes))) & ((torch.arange(len(labels)) % 5 != 0) == train)
    return TensorDataset(images[chosen], labels[chosen])


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, classes: range) -> Tensor:
    logits = model(images)[:, classes.start : classes.stop]
    return nn.functional.cross_entropy(logits, labels - classes.start)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, classes: range, epochs: int) -> None:
    """Nothing here knows which optimizer it is."""
    loader = DataLoader(load(classes, train=True), batch_size=64, shuffle=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss_of(model, images, labels, classes).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, classes: range) -> float:
    """Among the task's own classes."""
    images, labels = load(classes, train=False).tensors
    model.eval()
    predicted = model(images)[:, classes.start : classes.stop].argmax(1) + classes.start
    return float((predicted == labels).float().mean())


@torch.no_grad()
def remember(model: nn.Module, classes: range, keep: float) -> clk.SubspaceStore:
    """What the inputs of every linear and convolutional layer span: `keep` of their energy is protected."""
    with clk.CovarianceCollector(model, "all", eval_mode=True) as collector:
        for images, _ in DataLoader(load(classes, train=True), batch_size=256):
            model(images)
    return build_store(collector.covariances(), clk.rules.Energy(keep), dtype=torch.float32)


def run(epochs: int = 15, keep: float = 0.99, lr: float = 3e-3, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train and test; by optimizer, the accuracies and what of the movement lies in the protected directions."""
    torch.manual_seed(seed)
    first, second = TASKS
    model = make_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=lr), first, epochs)
    learned = accuracy(model, first)
    store = remember(model, first, keep)

    results = {}
    for name in ("AdamW", "ProjectedAdamW", "FTPAdamW"):
        copied = copy.deepcopy(model)
        if name == "AdamW":
            optimizer = torch.optim.AdamW(copied.parameters(), lr=lr)
        elif name == "FTPAdamW":
            optimizer = clk.optim.FTPAdamW(copied.named_parameters(), lr=lr)  # near the first task's weights, softly
        else:
            optimizer = clk.optim.ProjectedAdamW(copied.named_parameters(), lr=lr, subspace=store)  # the one line
        torch.manual_seed(seed)
        start = time.perf_counter()
        train(copied, optimizer, second, epochs)
        results[name] = {
            "first": accuracy(copied, first),
            "forgotten": learned - accuracy(copied, first),
            "second": accuracy(copied, second),
            "inside": inside(model, copied, store),
            "seconds": time.perf_counter() - start,
        }
    return results


def inside(before: nn.Module, after: nn.Module, store: clk.SubspaceStore) -> float:
    """The largest share, over the layers, of the movement that lies in protected directions."""
    parts = []
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name in store:
        moved = (new[name] - old[name]).detach().flatten(1)
        kept = store[name].apply(moved, side="right")
        parts.append(float((moved - kept).norm() / moved.norm().clamp_min(1e-12)))
    return max(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--keep", type=float, default=0.99, help="share of the inputs' energy that is protected")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    results = run(**vars(parser.parse_args()))
    print("                 digits 0-4   forgotten   digits 5-9   movement in protected directions   seconds")
    for name, row in results.items():
        print(
            f"{name:16} {row['first']:10.3f} {row['forgotten']:11.3f} {row['second']:12.3f} "
            f"{row['inside']:34.1e} {row['seconds']:9.1f}"
        )


if __name__ == "__main__":
    main()
