"""Statistics of the images a backbone was trained on: shipped for ours, made from a folder or a shard for others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_kernels import data
from cl_kernels.compare._moments import Moments
from cl_kernels.compare.features import extract, weight_hash
from cl_kernels.data import Backbone
from cl_kernels.data.folders import ENDINGS
from cl_kernels.data.pictures import BrokenImageError, read_picture
from cl_kernels.data.preprocess import cover
from cl_kernels.errors import CheckpointError
from cl_kernels.subspace._files import load_tensors, save_tensors

__all__ = ["Reference", "find", "from_features", "from_path", "load", "reference_images", "shipped"]

KIND, VERSION = "cl_kernels.reference", 1
LIMIT = 5000  # images of a folder or shard that are looked at
STORED = 1000  # reference features kept beside the moments, for KID and proxy-A distance


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean [D], covariance [D, D] (float64) and up to 1000 features [m, D] of n pre-training images.

    ``weight_hash``: of the backbone that made the features; ``source`` says in words which images these are; ``marks``:
    distances of named sets to this reference, as `distance.measure` gives them; ``skipped``: broken images left out.
    """

    name: str
    mean: Tensor
    covariance: Tensor
    n: int
    features: Tensor | None
    weight_hash: str
    data_hash: str = ""
    source: str = ""
    marks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0

    def moments(self) -> Moments:
        return Moments.of_covariance(self.mean, self.covariance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: moments in float32, features in float16, the rest as metadata."""
        tensors = {"mean": self.mean.float(), "covariance": self.covariance.float()}
        if self.features is not None:
            tensors["features"] = self.features.half()
        about = {"name": self.name, "n": self.n, "weight_hash": self.weight_hash, "data_hash": self.data_hash}
        about |= {"source": self.source, "marks": dict(self.marks), "skipped": self.skipped}
        save_tensors(path, tensors, kind=KIND, version=VERSION, metadata={"about": json.dumps(about, sort_keys=True)})


def load(path: str | os.PathLike[str]) -> Reference:
    """Read a file of `Reference.save`. Raises `CheckpointError` naming the path for anything else."""
    tensors, header = load_tensors(path, kind=KIND, version=VERSION)
    try:
        about = json.loads(header["about"])
        mean, covariance, features = tensors["mean"], tensors["covariance"], tensors.get("features")
        fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        fits = fits and (features is None or (features.ndim == 2 and features.shape[1] == len(mean)))
        finite = all(bool(torch.isfinite(value).all()) for value in tensors.values())
        if not fits or not finite:
            raise ValueError("its tensors do not fit each other, or are not finite")
        return Reference(
            str(about["name"]),
            mean.double(),
            covariance.double(),
            int(about["n"]),
            None if features is None else features.float(),
            str(about["weight_hash"]),
            str(about["data_hash"]),
            str(about["source"]),
            dict(about["marks"]),
            int(about["skipped"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{os.fspath(path)}: not reference statistics ({error})") from error


def shipped(weights: str) -> Reference | None:
    """The statistics in the package for a backbone of that weight hash; None where there are none."""
    folder = Path(str(files("cl_kernels.compare") / "references"))
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
        except (SafetensorError, OSError, ValueError):
            continue  # a damaged file in an installation is no reason to stop: the report says what is missing
        if about.get("weight_hash") == weights:
            return load(path)
    return None


def find(
    backbone: Backbone,
    given: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    cache: Path | None = None,
) -> Reference | None:
    """The reference for a backbone: ``given`` (a folder of pictures, a shard, or a file of `Reference.save`), else the
    one that ships with the package, else None.

    Raises `ValueError` for a file that was made with other weights, and what `from_path` raises.
    """
    weights = weight_hash(backbone.model)
    if given is None:
        return shipped(weights)
    path = Path(given).expanduser()
    if path.suffix != ".safetensors":
        return from_path(backbone, path, seed=seed, cache=cache)
    found = load(path)
    if found.weight_hash != weights:
        raise ValueError(f"reference: {path} was made with other weights than this backbone's; make it anew")
    return found


def from_path(
    backbone: Backbone,
    path: str | os.PathLike[str],
    *,
    limit: int = LIMIT,
    seed: int = 0,
    cache: Path | None = None,
    source: str | None = None,
) -> Reference:
    """Statistics of at most ``limit`` images, drawn by ``seed``, of a folder of pictures (at any depth) or a shard.

    Raises `FileNotFoundError` for a path that is not there and `ValueError` for fewer than two images.
    """
    where = Path(path).expanduser()
    images, skipped = reference_images(where, backbone.preprocessing.size, limit, seed)
    return from_features(
        backbone, images, name=where.stem, source=source or str(where.name), cache=cache, skipped=skipped
    )


def reference_images(path: Path, size: int | None, limit: int, seed: int) -> tuple[Tensor, int]:
    """Up to ``limit`` images, uint8 [n, C, size, size], drawn by ``seed``, and how many broken ones were passed over.

    ``size`` None leaves the images of a shard as they are stored.
    """
    if not path.exists():
        raise FileNotFoundError(f"reference {os.fspath(path)!r}: there is no such file or folder")
    if path.is_file():
        part = data.load(path, image_size=size).train
        chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:limit]
        return part.subset(chosen).tensors(), 0
    if size is None:
        raise ValueError("size: pictures in a folder differ in size; give the one to scale them to")
    found = sorted(item for item in path.rglob("*") if item.suffix.lower() in ENDINGS and item.is_file())
    kept: list[Tensor] = []
    skipped = 0
    for number in torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(kept) == limit:
            break
        try:
            kept.append(cover(read_picture(found[number], at_least=size).unsqueeze(0), size))
        except BrokenImageError:
            skipped += 1
    if len(kept) < 2:
        raise ValueError(f"reference {os.fspath(path)!r}: needs two readable pictures or more, found {len(kept)}")
    return torch.cat(kept), skipped


def from_features(
    backbone: Backbone,
    images: Tensor,
    *,
    name: str,
    source: str,
    cache: Path | None = None,
    skipped: int = 0,
    stored: int = STORED,
) -> Reference:
    """Statistics of uint8 images [n, C, H, W] in random order; the first ``stored`` keep their features."""
    made = extract(backbone, images, cache=cache)
    wide = made.pooled.double()
    if len(wide) < 2:
        raise ValueError(f"reference: needs two images or more, got {len(wide)}")
    centred = wide - wide.mean(dim=0)
    covariance = centred.T @ centred / (len(wide) - 1)
    kept = made.pooled[:stored]
    return Reference(
        name, wide.mean(dim=0), covariance, len(wide), kept, made.weight_hash, made.data_hash, source, {}, skipped
    )
