"""A comparison that runs in seconds: 60 digits, the small embedded backbone, three arms, three epochs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from cl_kernels import data as image_data
from cl_kernels.compare import runner
from cl_kernels.compare.config import CompareConfig
from cl_kernels.compare.engine import compare

ARMS = ("vpt-deep", "full", "linear")
TRAINED = "trained.txt"  # one line for every trial that was begun


def small_data(train: int = 60, test: int = 60) -> image_data.ImageData:
    data = image_data.load("digits", image_size=32)
    return dataclasses.replace(
        data, train=data.train.subset(torch.arange(train)), test=data.test.subset(torch.arange(test))
    )


def small_config(out: Path | str, **changes: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "backbone": "embedded-small", "budget": "20m", "arms": ARMS, "quick": True, "threads": 1, "pictures": False,
        "device": "cpu",
    }  # fmt: skip
    return CompareConfig(**{**values, "out": out, **changes})


def run_small(
    out: Path | str, data: image_data.ImageData | None = None, *, kill: tuple[int, float] | None = None, **changes: Any
) -> dict[str, Any]:
    """Compare, and note in `out` which trials were trained; the clock is the processor's, so load changes no plan.

    `kill`: the process is ended by SIGKILL so many seconds after so many trials were begun."""
    folder, begun = Path(out), 0
    train = runner.train_trial

    def noting(*args: Any, **options: Any) -> Any:
        nonlocal begun
        with (folder / TRAINED).open("a") as file:
            file.write("trial\n")
        begun += 1
        if kill is not None and begun == kill[0]:
            threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        return train(*args, **options)

    runner.train_trial = noting
    try:
        return compare(small_config(out, **changes), small_data() if data is None else data, clock=time.process_time)
    finally:
        runner.train_trial = train


def trained(out: Path) -> int:
    """How many trials were begun."""
    return len((out / TRAINED).read_text().splitlines())


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same comparison must agree in: everything but times."""
    found: dict[str, Any] = json.loads(json.dumps(results))
    decision = {key: value for key, value in found["decision"].items() if key != "reasons"}
    for run in found["runs"]:
        del run["seconds"]
    for arm in found["arms"]:
        for trial in arm["tuning"]["trials"]:
            del trial["seconds"]
    plan = {key: value for key, value in found["plan"].items() if key != "rates"}
    kept = ("schema", "settings", "data", "sizes", "arms", "runs", "diagnosis", "weights", "missing")
    settings = {key: value for key, value in found["settings"].items() if key != "out"}
    found["missing"] = [note for note in found["missing"] if not note.startswith("quiet timings")]
    return {key: found[key] for key in kept} | {"decision": decision, "plan": plan, "settings": settings}
