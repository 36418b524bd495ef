"""Features of a frozen backbone, computed once: what linear probes, distances and frozen arms look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_kernels.data import Backbone, ImageSet, Preprocessing
from cl_kernels.errors import CheckpointError, NonFiniteError
from cl_kernels.nn._backbone import digest
from cl_kernels.subspace._files import load_tensors, save_tensors

__all__ = ["Features", "extract", "image_hash", "weight_hash"]

KIND, VERSION = "cl_kernels.features", 1
Layers = Literal["all"] | Sequence[int]


@dataclass(frozen=True, eq=False)
class Features:
    """Frozen features of N images, float32 on the CPU, in the images' order.

    ``pooled`` [N, D]: the feature that a head sees (`cl_kernels.methods` "linear" sees the same); ``layers``: block
    number -> [N, D], the class token after that block where the backbone pools by it, else the mean of its patch rows
    (``kind`` "cls" or "mean"); ``data_hash`` and ``weight_hash`` (sha256) say of what; ``cached``: read from a file.
    """

    pooled: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    kind: str = "mean"
    data_hash: str = ""
    weight_hash: str = ""
    cached: bool = False

    def __len__(self) -> int:
        return len(self.pooled)

    def rows(self, index: Tensor) -> Features:
        """The features of the images at ``index``, in that order; the hashes stay those of the whole."""
        layers = {layer: value[index] for layer, value in self.layers.items()}
        return Features(self.pooled[index], layers, self.kind, self.data_hash, self.weight_hash, self.cached)


def image_hash(images: Tensor) -> str:
    """sha256 over the dtype, shape and bytes of an image tensor: the data hash of features and runs."""
    found = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}\n".encode())
    found.update(images.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def weight_hash(backbone: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    return digest(backbone)


def extract(
    backbone: Backbone | nn.Module,
    images: ImageSet | Tensor,
    *,
    layers: Layers | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    cache: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Features:
    """One pass of a frozen backbone over images: the pooled feature and, asked for, one feature a block.

    ``images``: uint8 [N, C, H, W] or an `ImageSet` of one image size, made into what the backbone expects by its
    `Preprocessing` (part of a `Backbone`), or floats [N, C, H, W] that are so already. ``layers``: block numbers, or
    "all" (an empty dictionary for a backbone without ``blocks``). ``cache``: a folder; the file in it is named by the
    data, the weights and the preprocessing, so another run of the same reads it and another data set never does.
    ``on_batch(done, total)`` is called after each batch. Features of the same call are the same to the bit; another
    ``batch_size`` or thread count may change the last one. The backbone is left as it was: mode, gradients, device.

    Raises `ValueError` for images it cannot take and unknown layers, `NonFiniteError` for features that are not finite.
    Cost: one forward pass; N * D * 4 bytes a layer, on disk too.
    """
    model, prepare = _parts(backbone, preprocessing)
    pixels = images.tensors() if isinstance(images, ImageSet) else images
    if pixels.ndim != 4:
        raise ValueError(f"images: expected [N, C, H, W], got shape {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8 and prepare is None:
        raise ValueError("preprocessing: uint8 images need it; give a Backbone, or preprocessing=")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    wanted = _block_numbers(model, layers)
    kind = "cls" if getattr(model, "global_pool", None) == "token" else "mean"
    hashes = image_hash(pixels), digest(model)
    path = None if cache is None else cache / f"features-{_key(hashes, pixels, prepare)}.safetensors"
    if path is not None and (found := _read(path, hashes, wanted, kind)) is not None:
        return found
    batches = _batches(pixels, prepare, batch_size, torch.device(device))
    pooled, by_layer = _forward(model, batches, wanted, kind, len(pixels), torch.device(device), on_batch)
    if not bool(torch.isfinite(pooled).all()):
        bad = int((~torch.isfinite(pooled).all(dim=1)).nonzero()[0])
        raise NonFiniteError(f"backbone: the feature of image {bad} is not finite")
    made = Features(pooled, by_layer, kind, *hashes)
    if path is not None:
        _write(path, made)
    return made


def _parts(
    backbone: Backbone | nn.Module, preprocessing: Preprocessing | None
) -> tuple[nn.Module, Preprocessing | None]:
    if isinstance(backbone, Backbone):
        return backbone.model, preprocessing or backbone.preprocessing
    return backbone, preprocessing


def _block_numbers(model: nn.Module, layers: Layers | None) -> tuple[int, ...]:
    blocks = getattr(model, "blocks", None)
    depth = len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 0
    if layers is None or (layers == "all" and depth == 0):
        return ()
    numbers = tuple(range(depth)) if isinstance(layers, str) else tuple(layers)
    wrong = [number for number in numbers if not 0 <= number < depth]
    if wrong:
        raise ValueError(f"layers: the backbone has blocks 0..{depth - 1}, got {wrong}")
    return numbers


def _batches(pixels: Tensor, prepare: Preprocessing | None, size: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        batch = pixels[start : start + size].to(device)
        yield prepare(batch) if prepare is not None and batch.dtype == torch.uint8 else batch


def _forward(
    model: nn.Module,
    batches: Iterator[Tensor],
    wanted: tuple[int, ...],
    kind: str,
    total: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Pooled features and one per wanted block, gathered through hooks that are gone afterwards."""
    vit: Any = model
    seen: dict[int, list[Tensor]] = {number: [] for number in wanted}
    pooled: list[Tensor] = []
    done = 0
    with _frozen(model, device), ExitStack() as stack, torch.no_grad():
        for number in wanted:
            hook = _keeper(seen[number], kind, int(getattr(model, "num_prefix_tokens", 0)))
            stack.callback(vit.blocks[number].register_forward_hook(hook).remove)
        for batch in batches:
            features: Tensor = vit.forward_head(vit.forward_features(batch), pre_logits=True)
            pooled.append(features.float().cpu())
            done += len(batch)
            if on_batch is not None:
                on_batch(done, total)
    width = int(getattr(model, "num_features", 0))
    whole = torch.cat(pooled) if pooled else torch.empty(0, width)
    return whole, {number: torch.cat(parts) if parts else torch.empty(0, width) for number, parts in seen.items()}


def _keeper(kept: list[Tensor], kind: str, prefix: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_module: nn.Module, _inputs: Any, rows: Tensor) -> None:
        one = rows[:, 0] if kind == "cls" else rows[:, prefix:].mean(dim=1)
        kept.append(one.float().cpu())

    return hook


@contextmanager
def _frozen(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode on ``device``; afterwards every submodule's mode and the model's device are as they were."""
    modes = {module: module.training for module in model.modules()}
    first = next(model.parameters(), None)
    home = device if first is None else first.device
    try:
        model.to(device).eval()
        yield
    finally:
        model.to(home)
        for module, training in modes.items():
            module.training = training


def _key(hashes: tuple[str, str], pixels: Tensor, prepare: Preprocessing | None) -> str:
    used = prepare if pixels.dtype == torch.uint8 else None
    return hashlib.sha256(json.dumps([*hashes, repr(used), VERSION]).encode()).hexdigest()[:24]


def _write(path: Path, made: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"pooled": made.pooled, **{f"layer.{number}": value for number, value in made.layers.items()}}
    header = {"data_hash": made.data_hash, "weight_hash": made.weight_hash, "kind": made.kind}
    save_tensors(path, tensors, kind=KIND, version=VERSION, metadata=header)


def _read(path: Path, hashes: tuple[str, str], wanted: tuple[int, ...], kind: str) -> Features | None:
    """The cached features; None where there are none, or not all that are wanted. A damaged cache is made anew."""
    if not path.is_file():
        return None
    try:
        tensors, header = load_tensors(path, kind=KIND, version=VERSION)
    except CheckpointError:
        return None
    layers = {number: tensors.get(f"layer.{number}") for number in wanted}
    found = {number: value for number, value in layers.items() if value is not None}
    same = (header.get("data_hash"), header.get("weight_hash"), header.get("kind")) == (*hashes, kind)
    if not same or "pooled" not in tensors or len(found) != len(wanted):
        return None
    return Features(tensors["pooled"], found, kind, *hashes, cached=True)
