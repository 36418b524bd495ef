"""From what the user typed to a data set: one function, `load`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from cl_kernels.data.digits import load_digits
from cl_kernels.data.external import load_hugging_face, load_torchvision
from cl_kernels.data.folders import load_folder
from cl_kernels.data.joined import joined
from cl_kernels.data.sets import ImageData
from cl_kernels.data.shards import load_shard

__all__ = ["check", "load", "names"]

FOLDER_VARIABLE = "CL_KERNELS_DATA"


def names() -> list[str]:
    """Names that `load` knows: ``digits``, and every shard and folder in the folder ``CL_KERNELS_DATA`` names."""
    return ["digits", *sorted(_shelf())]


def _shelf() -> dict[str, Path]:
    """Data sets in the user's data folder, by name."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or not Path(folder).is_dir():
        return {}
    found = {}
    for path in Path(folder).iterdir():
        if path.suffix == ".npz":
            found[path.stem] = path
        elif path.is_dir() and not path.name.startswith("."):
            found[path.name] = path
    return found


def load(
    name_or_path: str | os.PathLike[str],
    *,
    split_seed: int = 0,
    strict: bool = False,
    image_size: int | None = None,
) -> ImageData:
    """Load a data set; images come back as uint8 [C, H, W], labels as int64.

    ``name_or_path``: ``digits``; a folder of class folders (with ``train/`` and ``test/`` or ``val/`` above them, or
    split 75:25 by ``split_seed``); an ``.npz`` shard; ``torchvision:CLASS:ROOT``; ``hf:PATH``; or a name in the folder
    that the environment variable ``CL_KERNELS_DATA`` gives; several joined by "+" are one set of all their classes.
    ``image_size``: scale and cut every image to that square.
    Broken images are left out and counted in ``skipped``, or raise where ``strict``.

    Raises ``ValueError`` for an unknown name (the nearest ones are offered), for data without two usable classes, and
    for ``image_size`` outside 1..4096; ``FileNotFoundError`` for a path that is not there.
    """
    if image_size is not None and not 1 <= image_size <= 4096:
        raise ValueError(f"image_size must lie in 1..4096, got {image_size}")
    if not 0 <= split_seed < 2**63:
        raise ValueError(f"split_seed must lie in 0..2**63-1, got {split_seed}")
    text = os.fspath(name_or_path)
    if parts := _joined_names(text):
        return joined([load(part, split_seed=split_seed, strict=strict, image_size=image_size) for part in parts])
    if text == "digits":
        return load_digits(split_seed=split_seed, image_size=image_size)
    if text.startswith("torchvision:"):
        return load_torchvision(text, strict=strict, image_size=image_size)
    if text.startswith("hf:"):
        return load_hugging_face(text, split_seed=split_seed, strict=strict, image_size=image_size)
    path = _find(text)
    if path.is_dir():
        return load_folder(path, split_seed=split_seed, strict=strict, image_size=image_size)
    if path.suffix != ".npz":
        raise ValueError(f"data must be a folder or an .npz shard, got the file {path}")
    return load_shard(path, strict=strict, image_size=image_size)


def check(name_or_path: str | os.PathLike[str]) -> None:
    """Raise what `load` raises for names and paths that are not there, without reading any data."""
    text = os.fspath(name_or_path)
    for part in _joined_names(text) or [text]:
        if part != "digits" and not part.startswith(("torchvision:", "hf:")):
            _find(part)


def _joined_names(text: str) -> list[str]:
    """The names that `text` joins by "+"; empty where it is one."""
    if "+" not in text or Path(text).expanduser().exists():
        return []
    return [part.strip() for part in text.split("+")]


def _find(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists():
        return path
    shelf = _shelf()
    if text in shelf:
        return shelf[text]
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"data {text!r}: there is no such file or folder")
    near = difflib.get_close_matches(text, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(names())}"
    raise ValueError(f"unknown data {text!r}: {hint} (or a folder, an .npz file, torchvision:CLASS:ROOT, hf:PATH)")
