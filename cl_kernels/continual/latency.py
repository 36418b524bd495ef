"""How long a model takes: medians of repeated calls, on the device it is on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["latency"]

CALLS, WARM_UP = 20, 3


def latency(predict: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, float]:
    """Median seconds of `predict` for one image and for the whole batch `images`, after a warm-up: `one`, `batch`."""
    return {"one": _median(predict, images[:1]), "batch": _median(predict, images)}


def _median(predict: Callable[[Tensor], Tensor], images: Tensor) -> float:
    seconds = []
    for call in range(WARM_UP + CALLS):
        _wait(images.device)
        start = time.perf_counter()
        predict(images)
        _wait(images.device)
        if call >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
