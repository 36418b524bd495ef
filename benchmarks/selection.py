"""Which cases of which rooms a request means, and what to say where it means none. Nothing is built here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import torch
from cl_kernels.benchmarks import harness, records
from cl_kernels.benchmarks.options import Options, nearest

from cl_kernels.errors import BackendUnavailableError

__all__ = ["SHAPES", "device_of", "listing", "module_of", "refuse_nothing", "room_of", "rooms", "selected", "table"]

HERE: Final = Path(__file__).resolve().parent
PACKAGE: Final = "cl_kernels.benchmarks"
#: Name -> what the name of a case of this model holds: the model's name or a width of its layers.
SHAPES: Final = {
    "vit-b16": r"ViT-B|(?<!\d)(768|3072)(?!\d)",
    "vit-l16": r"ViT-L|(?<!\d)(1024|4096)(?!\d)",
    "vit-s16": r"ViT-S|(?<!\d)(384|1536)(?!\d)",
    "resnet50": r"ResNet-50",
    "embedded": r"embedded|(?<!\d)128(?!\d)",
}


def rooms() -> list[str]:
    return sorted(room_of(path.name) for path in HERE.glob("bench_*.py"))


def room_of(file: str) -> str:
    return Path(file).stem.removeprefix("bench_")


def module_of(room: str) -> ModuleType:
    if room not in rooms():
        raise ValueError(f"unknown room {room!r}{nearest(room, rooms())}")
    return importlib.import_module(f"{PACKAGE}.bench_{room}")


def device_of(wanted: str) -> str:
    """cpu or cuda. Raises `BackendUnavailableError` for a GPU that is not there."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BackendUnavailableError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    return "cuda" if there and wanted != "cpu" else "cpu"


def selected(room: str, given: Options, device: str) -> list[harness.Plan]:
    """The plans of a room that the options ask for; possibly none. Nothing is built.

    Filters look through the table's cases first, and through all where the table has none.
    """
    module = module_of(room)
    if given.sizes:
        custom: Callable[..., Iterable[harness.Plan]] | None = getattr(module, "custom", None)
        return list(custom(given.sizes, given.dtype, device)) if custom else []
    cases = getattr(module, "cuda_cases", None) if device == "cuda" else module.cases
    if cases is None:
        return []
    every = [plan for plan in cases(given.quick) if given.slow or not plan.slow]
    chosen = every if given.quick or given.all or device == "cuda" else table(module, every)
    return _matching(room, chosen, given) or _matching(room, every, given)


def table(module: ModuleType, plans: Sequence[harness.Plan]) -> list[harness.Plan]:
    """The cases that `make bench` takes: those whose names begin as the room's TABLE says."""
    return [plan for plan in plans if plan.name.startswith(tuple(module.TABLE))]


def _matching(room: str, plans: Sequence[harness.Plan], given: Options) -> list[harness.Plan]:
    default = getattr(module_of(room), "SHAPE", "")
    return [
        plan
        for plan in plans
        if given.only in plan.name
        and given.dtype in (None, plan.dtype)
        and (not given.shape or (re.search(SHAPES[given.shape], plan.name) or given.shape == default))
    ]


def refuse_nothing(wanted: dict[str, list[harness.Plan]], given: Options, device: str) -> None:
    """Raise `ValueError` where what was asked for has no case, with what there is."""
    if any(wanted.values()):
        return
    room = given.rooms[0] if len(given.rooms) == 1 else "no room"
    if given.sizes:
        able = [name for name in rooms() if hasattr(module_of(name), "custom")]
        raise ValueError(f"--shape {given.shape}: {room} takes no sizes; known are {', '.join(able)}")
    there = sorted(name for name in SHAPES if any(_shape_cases(one, name, given, device) for one in wanted))
    what = " ".join(given.words())
    raise ValueError(f"{room} has no case for {what or device}; shapes there: {', '.join(there) or 'none'}")


def _shape_cases(room: str, shape: str, given: Options, device: str) -> list[harness.Plan]:
    return selected(room, Options(rooms=(room,), shape=shape, all=True, quick=given.quick), device)


def listing(given: Options) -> str:
    """Rooms and cases; a star before those of the table."""
    device = device_of(given.device)
    lines = [records.CPU_ONLY if device == "cpu" else torch.cuda.get_device_name()]
    for room in given.rooms or rooms():
        every = selected(room, Options(rooms=(room,), all=True, slow=True), device)
        stars = {plan.name for plan in table(module_of(room), every)}
        shown = [plan for plan in selected(room, given, device) if given.shape or given.only or given.dtype] or every
        lines.append(f"{room}:")
        lines += [f"  {'*' if plan.name in stars else ' '} {plan.name}{' (slow)' * plan.slow}" for plan in shown]
    return "\n".join([*lines, f"shapes: {', '.join(SHAPES)}, or sizes such as 25216x768", ""])
