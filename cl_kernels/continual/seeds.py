"""Random states: seeding, saving, restoring, and the order of an epoch as a pure function of where it is."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive", "get_state", "permutation", "seeded", "set_state"]


def derive(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one place of a run, such as (task, epoch)."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(count: int, seed: int, *place: int | str) -> Tensor:
    """The order of `count` images in one epoch. It needs no state: a resumed run computes the same again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, *place)))


def get_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's global generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `get_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


@contextmanager
def seeded(seed: int, device: torch.device, threads: int | None, *, strict: bool = False) -> Iterator[None]:
    """Seed all generators, ask CUDA for deterministic algorithms, set the CPU threads; everything is undone at the
    end."""
    before, deterministic = get_state(device), torch.are_deterministic_algorithms_enabled()
    warn_only, old_threads = torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_num_threads()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat a sum exactly
        torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(old_threads)
        set_state(before, device)
