"""The model of a finished run, from what the run left in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_kernels import data as image_data
from cl_kernels import methods
from cl_kernels.continual import checkpoint
from cl_kernels.continual.claim import CHECKPOINT
from cl_kernels.continual.deployed import Deployed, load_model
from cl_kernels.errors import CheckpointError

__all__ = ["load_run"]

STUDENT = "student.safetensors"


def load_run(folder: str | Path, *, device: str | torch.device = "cpu") -> Deployed:
    """The last model of a finished `cl-kernels train` run: its student.safetensors, else its backbone, loaded anew by
    name or file, with what checkpoints/last.safetensors holds. Executes nothing that is in the files.

    Raises `FileNotFoundError` for a folder without results.json (the run is not finished), without a checkpoint, or
    whose backbone's weights are gone, and `CheckpointError` for files that are damaged or do not belong together.
    """
    folder, where = Path(folder), torch.device(device)
    if (folder / STUDENT).is_file():
        return load_model(folder / STUDENT, device=where)
    found = _results(folder)
    if not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"run {str(folder)!r} has no {CHECKPOINT}, which holds its model; train it again")
    config = found["config"]
    if config.get("teacher") is not None:
        raise FileNotFoundError(f"run {str(folder)!r} learned from a teacher but has no {STUDENT}; train it again")
    backbone = image_data.load_backbone(config["backbone"], config["weights"], image_size=config["image_size"])
    tree = checkpoint.load(folder / CHECKPOINT, fingerprint=found["fingerprint"], device=where)
    options = dict(config["options"]) if config["lr"] is None else {**config["options"], "lr": config["lr"]}
    try:
        method = methods.create(config["method"], backbone.model.to(where), **options)
        method.load_state_dict(tree["method"] | {"optimizer": None, "scheduler": None})
        return Deployed(method, backbone.preprocessing, _class_names(found))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its checkpoint does not fit its results.json ({type(error).__name__}: {error})"
        ) from error


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        begun = (folder / CHECKPOINT).is_file()
        hint = "its run is not finished: go on with `cl-kernels train ... --resume`" if begun else "it holds no run"
        raise FileNotFoundError(f"run {str(folder)!r} has no results.json: {hint}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config, fields = found["config"], ("method", "backbone", "weights", "image_size", "lr", "options")
        missing = [name for name in fields if name not in config]
        if missing or not isinstance(found["fingerprint"], str):
            raise ValueError(f"config lacks {', '.join(missing) or 'a fingerprint'}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the results of a training run ({error})") from error
    result: dict[str, Any] = found
    return result


def _class_names(found: Mapping[str, Any]) -> list[str]:
    """Names by class number; a number that no task has keeps itself as name."""
    named = {
        int(number): str(name)
        for task in found["tasks"]
        for number, name in zip(task["classes"], task["class_names"], strict=True)
    }
    return [named.get(number, str(number)) for number in range(max(named) + 1)]
