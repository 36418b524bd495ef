"""The words of `cl-kernels bench`, and what they mean."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import torch
from cl_kernels.benchmarks import cpu_timing

__all__ = ["Options", "expect", "nearest", "parse", "seconds"]

DTYPES: Final = {
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
TABLE_S: Final = 570.0  # of `make bench`, so that it stays under ten minutes
LONG_S: Final = 6 * 3600.0


@dataclass(frozen=True)
class Options:
    """One request. `limit`: seconds for everything; `share`: seconds that a process should take; `case_budget`: seconds
    of timing for a case, fewer where the share asks for it.
    """

    rooms: tuple[str, ...] = ()
    shape: str = ""
    sizes: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    only: str = ""
    device: str = "auto"
    quick: bool = False
    all: bool = False
    slow: bool = False
    list: bool = False
    passes: int = 1
    limit: float = LONG_S
    share: float = LONG_S
    case_budget: float = cpu_timing.BUDGET_S
    peaks: bool = True
    progress: bool = False
    json: Path | None = None
    out: Path | None = None
    compare: Path | None = None
    fail_above: str | None = None
    sweep: bool = False
    end_to_end: bool = False

    def words(self) -> list[str]:
        """What selects cases, as it stands on a command line."""
        found = ["--device", self.device] if self.device != "auto" else []
        found += ["--shape", self.shape] if self.shape else []
        found += ["--dtype", str(self.dtype).removeprefix("torch.")] if self.dtype else []
        found += ["--only", self.only] if self.only else []
        return found + [f"--{name}" for name in ("quick", "all", "slow") if getattr(self, name)]


class _Parser(argparse.ArgumentParser):
    """One that raises instead of printing its usage: the caller says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(program: str) -> argparse.ArgumentParser:
    made = _Parser(
        prog=program,
        description="Check every variant's output, then time them against each other. Exit code 1: an output is wrong, "
        "or --fail-above is exceeded.",
        allow_abbrev=False,
    )
    made.add_argument("rooms", nargs="*", metavar="ROOM", help="every room if none is named; --list shows them")
    made.add_argument("--shape", default="", help="vit-b16, vit-l16, vit-s16, resnet50, embedded, or sizes: 25216x768")
    made.add_argument("--dtype", help=f"only cases of this dtype: {', '.join(list(DTYPES)[:4])}")
    made.add_argument("--only", default="", help="only cases whose name contains this")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto: a GPU if there is one]")
    made.add_argument("--quick", action="store_true", help="tiny shapes, one pass: does it run, are outputs right")
    made.add_argument("--all", action="store_true", help="every case instead of the table's")
    made.add_argument("--slow", action="store_true", help="the cases that take minutes too")
    made.add_argument("--list", action="store_true", help="show rooms and cases, the table's with a star; run nothing")
    made.add_argument("--json", type=Path, metavar="F", help="write all numbers and the environment to this file")
    made.add_argument("--out", type=Path, metavar="DIR", help="a JSON file for each room, and table.md, to this folder")
    made.add_argument("--compare", type=Path, metavar="OLD.json", help="compare with an earlier --json of this machine")
    made.add_argument(
        "--fail-above",
        metavar="5%",
        help="with --compare: exit 1 where ours is slower by more than this, than both spreads (10 %% with one pass) "
        "and than the baselines, or gave no time",
    )
    made.add_argument("--passes", type=int, help="processes each room is measured in [2; 1 on a GPU and with --quick]")
    made.add_argument("--budget", help=f"time for everything, such as 9m or 90s [{TABLE_S:.0f}s for the table]")
    made.add_argument("--sweep", action="store_true", help="scaling curves, with figures in --out, not the table")
    made.add_argument("--end-to-end", action="store_true", help="what share of a ViT's training step each part costs")
    made.add_argument("--share", type=float, default=LONG_S, help=argparse.SUPPRESS)
    made.add_argument("--no-peaks", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--progress", action="store_true", help=argparse.SUPPRESS)
    return made


def parse(words: Sequence[str], program: str = "bench") -> Options:
    """The options that a command line gives. Raises `ValueError` for one that asks for what does not exist."""
    given = parser(program).parse_args(list(words))
    if given.fail_above is not None and given.compare is None:
        raise ValueError("--fail-above needs --compare OLD.json")
    if given.dtype is not None and given.dtype not in DTYPES:
        raise ValueError(f"--dtype: unknown {given.dtype!r}{nearest(given.dtype, DTYPES)}")
    once = given.quick or given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    passes = (1 if once else 2) if given.passes is None else given.passes
    if passes < 1:
        raise ValueError(f"--passes: expected at least 1, got {passes}")
    limit = seconds(given.budget) if given.budget else (LONG_S if given.all or once or given.rooms else TABLE_S)
    is_sizes = re.fullmatch(r"\d+([x,]\d+)*", given.shape)
    return Options(
        rooms=tuple(given.rooms), shape=given.shape,
        sizes=tuple(int(size) for size in re.split("[x,]", given.shape)) if is_sizes else (),
        dtype=DTYPES[given.dtype] if given.dtype else None, only=given.only, device=given.device, quick=given.quick,
        all=given.all, slow=given.slow, list=given.list, passes=passes, limit=limit,
        case_budget=0.15 if given.quick else cpu_timing.BUDGET_S, peaks=not (given.no_peaks or given.quick),
        progress=given.progress, share=given.share, json=given.json, out=given.out,
        compare=given.compare, fail_above=given.fail_above,
        sweep=given.sweep, end_to_end=given.end_to_end,
    )  # fmt: skip


def expect(room: str, sizes: Sequence[int], names: str) -> None:
    """Raise `ValueError` unless --shape gave a size of at least 1 for each of the names, such as "n x d"."""
    wanted = len(names.split(" x "))
    if len(sizes) != wanted:
        raise ValueError(f"--shape {'x'.join(map(str, sizes))}: {room} takes {names}, got {len(sizes)} sizes")
    if min(sizes) < 1:
        raise ValueError(f"--shape {'x'.join(map(str, sizes))}: sizes must be at least 1")


def seconds(text: str) -> float:
    """540, 540s and 9m as 540.0. Raises `ValueError` for what is no time above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if value <= 0:
        raise ValueError(f"--budget: expected a time such as 90s or 9m, got {text!r}")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean a or b?`, or all that is known where nothing is near."""
    there = sorted(known)
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(there)}"
