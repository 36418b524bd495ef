"""Runs with made-up numbers, and the modules of scripts/ that write docs/results.md from kept ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import results_cost as cost
    import results_data as data
    import results_figures as drawings
    import results_page as page
    import results_tables as tables
    import results_words as words
finally:
    sys.path.remove(str(ROOT / "scripts"))

__all__ = ["BASE", "DOWN", "LOST", "NOISE", "UP", "cost", "data", "drawings", "kept", "page", "record", "run", "sample",
           "shifted", "tables", "words"]  # fmt: skip


def run(label: str, seed: int, accuracy: float, forgetting: float, **extra: Any) -> dict[str, Any]:
    """A run in the format of results.json with made-up numbers: three tasks on the stream `a stream`."""
    matrix = [[0.9, None, None], [0.8, 0.9, None], [0.7, 0.8, accuracy]]
    layers = {
        "blocks.0": {"right": {"dim": 64, "protected": 16, "gain": 1.0, "energy": 0.9, "added": 4, "tasks_left": 3}},
        "blocks.1": {"left": {"dim": 32, "protected": 8, "gain": 1.0, "energy": 0.8, "added": 4, "tasks_left": 3}},
    }
    return {
        "method": label, "label": label, "title": "a stream", "seed": seed, "protocol": "one model",
        "average_accuracy": accuracy, "forgetting": forgetting, "accuracy_matrix": matrix,
        "task_incremental": {"accuracy_matrix": matrix, "average_accuracy": 0.9 + accuracy / 100, "forgetting": 0.0},
        "feature_drift": {"relative": matrix, "cosine": matrix, "final_relative": 0.25, "final_cosine": 1 / 3},
        "subspace": [layers, layers, {}], "prompt_usage": [{"blocks.0": [0.5]}] * 3, "anchoring": [{}] * 3,
        "loss": [[1 / 3, 0.1]] * 3, "parameters": {"trainable": [1, 2, 3], "total": 4}, "skipped_images": 0,
        "tasks": [{"name": "task 1", "class_names": ["a", "b"]}] * 3,
        "seconds": {"data": 0.5, "train": [1.0, 2.0, 3.0], "end_task": [0.5, 0.5, 0.0], "total": 8.0 + seed},
        "config": {"method": label, "data": "digits", "backbone": "embedded", "seed": seed, "epochs": 2, "lr": None,
                   "options": {}, "domains": [], "quick": False, "classes": "20:100"},
        "environment": {"torch": "2.x", "device": "cpu", "threads": 1},
        **extra,
    }  # fmt: skip


def record(*rows: tuple[str, tuple[float, ...], tuple[float, ...]], **extra: Any) -> dict[str, Any]:
    """A study of rows (label, accuracies, forgettings), one a seed."""
    runs = [
        run(label, s, a, f, **extra)
        for label, good, bad in rows
        for s, (a, f) in enumerate(zip(good, bad, strict=True))
    ]
    return {"version": 1, "title": "Study", "seeds": 3, "quick": False, "runs": runs}


def kept(study: dict[str, Any] | None = None, **more: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(data.load(), None)
    found |= {name: one for name, one in {"study": study, **more}.items() if one is not None}
    for name in data.STUDIES:
        if found[name] is not None:
            found[name] = {**found[name], "runs": [data.compact(one) for one in found[name]["runs"]]}
    return found


BASE = (0.50, 0.53, 0.49)
LOST = (0.20, 0.24, 0.19)


def shifted(by: tuple[float, ...], values: tuple[float, ...] = BASE) -> tuple[float, ...]:
    return tuple(value + delta for value, delta in zip(values, by, strict=True))


UP, NOISE, DOWN = (0.050, 0.052, 0.051), (0.03, -0.04, 0.01), (-0.020, -0.022, -0.021)


def sample() -> dict[str, Any]:
    return record(
        ("class-mean", BASE, LOST),
        ("linear", shifted(NOISE), LOST),
        ("sequential, rate of nsp2", shifted(NOISE), LOST),
        ("matched-lr", shifted(UP, shifted(NOISE)), shifted(DOWN, LOST)),
        ("nsp2", shifted(UP, shifted(UP, shifted(NOISE))), shifted(DOWN, shifted(DOWN, LOST))),
        ("nsp2-exact", shifted(DOWN, shifted(UP, shifted(UP, shifted(NOISE)))), shifted(UP, LOST)),
    )
