"""The cache of a comparison: one file per unit of work, written atomically, so that a kill loses at most one unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_kernels.compare.config import describe_seconds
from cl_kernels.continual import checkpoint
from cl_kernels.continual.claim import locked
from cl_kernels.errors import CheckpointError

__all__ = ["Budget", "Cache", "opened"]

SETTINGS = "settings.json"
FOLDER = "cache"
_WRITTEN = ("results.json", "report.html", "report.md", "curves.csv", SETTINGS)


class Budget:
    """Wall time, counted on through a resume: `spent` starts where the cache's last unit was written."""

    def __init__(self, seconds: float, clock: Callable[[], float], spent: float = 0.0) -> None:
        self.seconds, self._clock = seconds, clock
        self._start = clock() - spent
        self.stages: dict[str, float] = {}

    def now(self) -> float:
        """The clock, for differences."""
        return self._clock()

    def spent(self) -> float:
        """Seconds since the beginning, earlier processes of the same comparison included."""
        return self._clock() - self._start

    def left(self) -> float:
        """Seconds until the budget is used up; negative afterwards."""
        return self.seconds - self.spent()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a stage."""
        start = self._clock()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + self._clock() - start


class Cache:
    """Units of work by kind and key: a JSON object each, and tensors beside it.

    `fingerprint` (of settings, data and weights) is part of every key, so that a foreign unit is never read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self.hits = 0

    def get(self, kind: str, key: Any) -> dict[str, Any] | None:
        """The unit stored for `key` (anything JSON can hold), or None. An unreadable file is as good as none."""
        path = self._path(kind, key)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self.hits += 1
        return found

    def tensors(self, kind: str, key: Any) -> dict[str, Tensor]:
        """The tensors of a unit. Raises `CheckpointError` for a missing or damaged file."""
        path = self._path(kind, key).with_suffix(".safetensors")
        tree = checkpoint.load(path, fingerprint=self._fingerprint, device=torch.device("cpu"))
        return {str(name): value for name, value in tree.items()}

    def put(
        self, kind: str, key: Any, value: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, *,
        spent: float = 0.0, stages: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Store a unit; its JSON file comes last and says that the unit is whole."""
        path = self._path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            checkpoint.save_atomically(path.with_suffix(".safetensors"), dict(tensors), fingerprint=self._fingerprint)
        unit = {"key": key, "spent": spent, "stages": dict(stages or {}), "value": dict(value)}
        checkpoint.write_atomically(path, json.dumps(unit, indent=1).encode())

    def last(self) -> tuple[float, dict[str, float]]:
        """The spent seconds and stages that the youngest unit noted, zeros for an empty cache."""
        best: tuple[float, dict[str, float]] = (0.0, {})
        for path in sorted(self.folder.glob("*.json")):
            try:
                unit = json.loads(path.read_text(encoding="utf-8"))
                if unit["spent"] > best[0]:
                    best = (float(unit["spent"]), dict(unit["stages"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return best

    def _path(self, kind: str, key: Any) -> Path:
        text = json.dumps([self._fingerprint, kind, key], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}.json"


@contextmanager
def opened(out: Path, fixed: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Cache]:
    """Hold `out` for one comparison whose settings, data and weights are `fixed`.

    Raises `FileExistsError` where it holds one that nobody asked to go on with or to replace, or where another process
    is writing; `ValueError` naming every difference where it is resumed with other settings; `OSError` when it cannot
    be written to."""
    settings = out / SETTINGS
    if settings.exists() and not (resume or overwrite):
        raise FileExistsError(f"out: {out} holds a comparison already; resume it, overwrite it, or choose another")
    checkpoint.probe(out)
    with locked(out):
        if settings.exists() and resume:
            _compare(settings, fixed)
        else:
            _clear(out)
            checkpoint.write_atomically(settings, json.dumps(dict(fixed), indent=1).encode())
        digest = hashlib.blake2b(json.dumps(dict(fixed), sort_keys=True).encode(), digest_size=16).hexdigest()
        yield Cache(out / FOLDER, digest)


def _compare(settings: Path, fixed: Mapping[str, Any]) -> None:
    try:
        before = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{settings}: not readable ({error}); start over with overwrite") from error
    now = json.loads(json.dumps(dict(fixed)))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name}: {_told(name, before.get(name))} -> {_told(name, now.get(name))}" for name in changed)
        raise ValueError(f"resume: {settings.parent} was begun with other settings ({told}); overwrite it instead")


def _told(name: str, value: Any) -> str:
    if name == "budget" and isinstance(value, (int, float)):
        return describe_seconds(value)
    return ",".join(map(str, value)) if isinstance(value, list) else repr(value)


def _clear(out: Path) -> None:
    """Remove what an earlier comparison wrote, and nothing else."""
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    for path in (
        *out.glob("best_*.safetensors"),
        *(out / FOLDER).glob("*.json"),
        *(out / FOLDER).glob("*.safetensors"),
    ):
        path.unlink(missing_ok=True)
