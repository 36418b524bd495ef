"""What one comparison is asked to do: `CompareConfig`, checked before anything is read, and budgets in words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_ARMS", "PROMPT_ARMS", "CompareConfig", "describe_seconds", "parse_budget", "unknown"]

PROMPT_ARMS = ("vpt-shallow", "vpt-deep")
DEFAULT_ARMS = ("vpt-shallow", "vpt-deep", "full", "linear", "lora", "ftp")
ON_REQUEST = ("mixed", "ft-then-pt")
GRIDS = ("default", "paper")
PREFERENCES = ("accuracy", "storage", "latency")

_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(sec|min|[smhd])")

_FREE = frozenset({"out", "resume", "overwrite", "threads", "device", "prefer", "pictures"})
"""Fields that a resumed run may change: where it runs, and what its finished trials are used for."""


def parse_budget(text: str | float) -> float:
    """Seconds of "90s", "10m", "1h30m", "1.5h", or of a plain number of seconds. Raises `ValueError`."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        seconds = float(text)
    else:
        words = str(text).strip().lower().replace(" ", "")
        parts = _PART.findall(words)
        if words and "".join(number + unit for number, unit in parts) == words:
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        else:
            try:
                seconds = float(words)
            except ValueError:
                raise ValueError(f'budget: expected a time such as "90s", "10m" or "1h30m", got {text!r}') from None
    if not math.isfinite(seconds) or not 0 < seconds <= 30 * 86400:
        raise ValueError(f"budget: expected more than 0 seconds and at most 30 days, got {text!r}")
    return seconds


def describe_seconds(seconds: float) -> str:
    """ "1h05m", "3m20s", "45s": as `parse_budget` reads it, to the second."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def unknown(option: str, name: object, names: Iterable[str]) -> ValueError:
    """The error for an unknown `name`, with the nearest of `names`, or all where none is near."""
    known = sorted(names)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return ValueError(f"{option}: unknown name {name!r}; {hint}")


@dataclass(frozen=True)
class CompareConfig:
    """One comparison of prompts and full fine-tuning on one data set.

    Every value is checked here (``ValueError`` naming the field, what was wanted and what came); names of data and
    backbones are checked by the parts that know them, with the nearest offered.

    Fields
        data, backbone, weights: as of `cl_kernels.data.load` and `load_backbone`.
        budget: seconds of wall time, or "90s", "10m", "1h30m"; all that is run is chosen to fit into it.
        out: directory of results.json, the report, the weights and the cache of finished trials.
        arms: what is compared; at least one prompt arm and "full".
        reference: a folder, shard or file of pre-training images or statistics for the distance; None takes what ships
            with an embedded backbone.
        seed: of every random choice; `seeds`: how many times subsets are drawn again at the most.
        grid: "default" or "paper" tuning grids.
        future_tasks: for how many tasks the cost of storing is told.
        prefer: what breaks a tie in accuracy: "storage" or "latency"; "accuracy" leaves it too close to call.
        resume: go on with the trials that `out` holds; overwrite: replace them.
        strict: stop at the first broken image instead of counting it.
        threads: torch CPU threads, None leaves torch's; device: "auto", "cpu", "cuda", "cuda:N".
        quick: four small sizes, two seeds and two trials an arm: shows how it works, decides little.
        pictures: whether attribution maps are drawn.
    """

    data: str = "digits"
    backbone: str = "embedded"
    weights: str | None = None
    budget: float | str = 600.0
    out: Path | str = Path("out/compare")
    arms: tuple[str, ...] = DEFAULT_ARMS
    reference: str | None = None
    seed: int = 0
    seeds: int = 3
    grid: str = "default"
    future_tasks: int = 20
    prefer: str = "accuracy"
    resume: bool = False
    overwrite: bool = False
    strict: bool = False
    threads: int | None = None
    device: str = "auto"
    quick: bool = False
    pictures: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", parse_budget(self.budget))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "arms", tuple(dict.fromkeys(self.arms)))
        for arm in self.arms:
            if arm not in (*DEFAULT_ARMS, *ON_REQUEST):
                raise unknown("arms", arm, (*DEFAULT_ARMS, *ON_REQUEST))
        if "full" not in self.arms or not set(self.arms) & set(PROMPT_ARMS):
            wanted = f"full and one of {', '.join(PROMPT_ARMS)}"
            raise ValueError(f"arms: expected at least {wanted}, got {', '.join(self.arms) or 'none'}")
        for name, names in (("grid", GRIDS), ("prefer", PREFERENCES)):
            if getattr(self, name) not in names:
                raise unknown(name, getattr(self, name), names)
        for name, low, high in (("seed", 0, 2**31 - 1), ("seeds", 2, 20), ("future_tasks", 1, 100_000)):
            _check_count(name, getattr(self, name), low, high)
        if self.threads is not None:
            _check_count("threads", self.threads, 1, 1024)
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: go on with the run or replace it, not both")

    @property
    def seconds(self) -> float:
        """The budget."""
        return float(self.budget)

    @property
    def folder(self) -> Path:
        """`out`."""
        return Path(self.out)

    def settings(self) -> dict[str, Any]:
        """Plain values of all fields, for results.json."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("resume", "overwrite")
        }

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed run may not change."""
        return {name: value for name, value in self.settings().items() if name not in _FREE}


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: expected a whole number in {low}..{high}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
