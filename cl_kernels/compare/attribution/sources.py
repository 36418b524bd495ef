"""What `cl-kernels explain` is given: the models of a folder or file, images of files, folders and data sets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_kernels import data
from cl_kernels.continual.deployed import Deployed, load_model
from cl_kernels.continual.reopened import load_run
from cl_kernels.data.folders import ENDINGS
from cl_kernels.data.pictures import BrokenImageError, read_picture

__all__ = ["Shown", "chosen_class", "known_classes", "open_models", "read_images"]

BEST = "best_*.safetensors"


@dataclass(frozen=True)
class Shown:
    """One image, uint8 [C, H, W], and the name of its class where its folder or data set tells it."""

    name: str
    image: Tensor
    class_name: str | None


def open_models(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Deployed]:
    """The models at `path`, by name: a model file, a finished run of `cl-kernels train`, or what `cl-kernels compare`
    wrote (the best weights of each arm, prompts and full fine-tuning first).

    Raises `FileNotFoundError` saying what to do where there is none, and `CheckpointError` for damaged files."""
    if path.is_file():
        return {path.stem.removeprefix("best_"): load_model(path, device=device)}
    if not path.is_dir():
        raise FileNotFoundError(f"run {str(path)!r}: there is no such file or folder")
    best = {file.stem.removeprefix("best_"): file for file in sorted(path.glob(BEST))}
    if best:
        first = [name for name in ("vpt-deep", "vpt-shallow", "full") if name in best]
        ordered = dict.fromkeys([*first[:1], *(["full"] if "full" in best else []), *best])
        return {name: load_model(best[name], device=device) for name in ordered}
    if (path / "settings.json").exists() and not (path / "checkpoints").exists():
        raise FileNotFoundError(
            f"run {str(path)!r} is a comparison without its best weights ({BEST}): finish it with "
            "`cl-kernels compare ... --resume`"
        )
    found = load_run(path, device=device)
    return {found.method.name if hasattr(found.method, "name") else path.name: found}


def known_classes(models: Iterable[Deployed]) -> list[str]:
    """Names by class number. Raises `ValueError` where the models do not have the same classes."""
    named: dict[int, str] = {}
    seen: list[dict[int, str]] = []
    for model in models:
        seen.append(dict(zip(model.classes, model.class_names, strict=True)))
        if seen[-1] != seen[0]:
            raise ValueError("models: they do not have the same classes, so their maps cannot be set side by side")
        named = seen[-1]
    return [named.get(number, str(number)) for number in range(max(named) + 1)]


def chosen_class(text: str, names: Sequence[str]) -> int:
    """The number of the class called `text`. Raises `ValueError` with the nearest names."""
    folded = {name.casefold(): number for number, name in enumerate(names)}
    if text in names:
        return list(names).index(text)
    if text.casefold() in folded:
        return folded[text.casefold()]
    near = difflib.get_close_matches(text.casefold(), folded, n=3, cutoff=0.4)
    hint = "nearest: " + ", ".join(names[folded[one]] for one in near) if near else "classes: " + _some(names)
    raise ValueError(f"target: there is no class {text!r}; {hint} (or predicted, or true)")


def read_images(
    sources: Sequence[str], *, size: int, count: int = 8, seed: int = 0
) -> tuple[list[Shown], list[str], int]:
    """Images, messages of the broken ones, and how many there were in all before `count` were drawn by `seed`.

    A source is a picture file, a folder (searched at any depth; a folder's name is taken as the class of its pictures),
    or what `data.load` reads as a data set, whose test images are drawn from. Raises `FileNotFoundError` for paths that
    are not there and `ValueError` for a source without one readable picture."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    files: list[tuple[Path, str | None]] = []
    shown: list[Shown] = []
    total = 0
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = [one for one in sorted(path.rglob("*")) if one.suffix.lower() in ENDINGS and one.is_file()]
            if not found:
                raise ValueError(f"images: {source!r} holds no picture ({', '.join(sorted(ENDINGS))})")
            files += [(one, one.parent.name) for one in found]
        elif path.is_file() and path.suffix.lower() != ".npz":
            files.append((path, path.parent.name))
        elif path.is_file() or source in data.names():
            of_set, available = _from_data(source, size, count, seed)
            shown += of_set
            total += available
        else:
            raise FileNotFoundError(
                f"images {source!r}: there is no such picture, folder or data set (data sets: {_some(data.names())})"
            )
    total += len(files)
    if len(files) > count:
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        files = [files[int(place)] for place in order]
    broken: list[str] = []
    drawn = len(shown)
    for file, folder in files:
        if len(shown) - drawn >= count:
            break
        try:
            shown.append(Shown(os.fspath(file), read_picture(file, at_least=size), folder))
        except BrokenImageError as error:
            broken.append(str(error))
    if len(shown) > count:  # of several sources: each has its chance
        kept = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))[:count]
        shown = [shown[place] for place in sorted(kept.tolist())]
    if not shown:
        raise ValueError(f"images: none of {len(files)} pictures can be read; first: {broken[0] if broken else 'none'}")
    return shown, broken, total


def _from_data(source: str, size: int, count: int, seed: int) -> tuple[list[Shown], int]:
    """Random test images of a data set."""
    found = data.load(source, image_size=size)
    order = torch.randperm(len(found.test), generator=torch.Generator().manual_seed(seed))[:count]
    return [
        Shown(f"{found.name} test image {row}", image, str(found.class_names[label]))
        for row in order.tolist()
        for image, label in [found.test[row]]
    ], len(found.test)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
