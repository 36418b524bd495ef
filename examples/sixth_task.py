"""What the sixth task costs each method in time and memory, against the official way of doing it.

    python examples/sixth_task.py --data tin32_novel100 --backbone benchmarks/backbones/vit_tin32_small.safetensors \\
        --out benchmarks/results/sixth_task.json

Five tasks of ten classes are learned for an epoch each, then the sixth: its steps, its end and what is kept after it
are measured for ours and for the official way, written anew from formulas, at the same state
(`benchmarks/task_costs.py`). Every result of the two is compared, and a row whose results differ ends the run. Then the
methods' own part of a step at the shapes of ViT-B/16. Process CPU seconds of one thread. Shards are found through
CL_KERNELS_DATA. About two minutes; --quick takes the embedded digits and seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS: list[tuple[str, str, int | None]] = [
    ("title", "Method", None),
    ("step_ms", "A step of ours (ms)", 1),
    ("own_ms", "of it the method's own part (ms)", 2),
    ("official_own_x", "the official way of that part takes (times ours)", 2),
    ("end_s", "End of the task (s)", 2),
    ("official_end_x", "the official way takes (times ours)", 2),
    ("kept_mb", "Kept for the next task (MB)", 2),
    ("official_kept_mb", "the official way keeps (MB)", 2),
    ("difference", "Largest relative difference", None),
]
#: Title, method, options beside its defaults. floor: above the rounding of the float32 sums of the official way, which
#: would otherwise place the cut of "times" elsewhere.
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("nsp2", "nsp2", {}),
    ("adam-nscl", "adam-nscl", {"floor": 1e-5}),
    ("adam-nscl, batch means", "adam-nscl", {"floor": 1e-5, "statistic": "batch-mean", "accumulation": "sum"}),
    ("gpm", "gpm", {"samples_per_task": 125}),
    ("ftp", "ftp", {}),
    ("lorac", "lorac", {}),
    ("inf-lora", "inf-lora", {}),
]
FIXED = [
    "A step is forward, backward and optimizer; the own part is the optimizer's step, the method's terms of the loss "
    "and, for adapters, what they add to the layers: a layer's frozen product, which both ways have, is not in it.",
    "adam-nscl sums all rows of a layer's inputs as its paper does, or batch means as its code does, which is less "
    "work and another statistic; gpm looks at 125 images in both ways. Rank rules are ours in both ways, so that "
    "results can be compared.",
    "Ours keeps second moments and bases in float64, the official way in float32. While a task is trained our "
    "projected optimizers hold one more copy of the weights that they project, for violations(), which is not counted.",
    "ftp: instead of what is kept, what is held beside weights and Adam's moments while the task is trained; it keeps "
    "nothing. lorac: adapters, shares and snapshots alone; the official pools are as long as the whole stream, here "
    "counted up to this task. Its end and ftp's have no official counterpart here.",
    "inf-lora's end holds the pass before the task too.",
]


@dataclass(frozen=True)
class Task:
    """A task as a method sees it."""

    index: int
    classes: tuple[int, ...]
    feed: Any
    batch_size: int
    statistics_batch: int
    epochs: int = 1
    last: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.feed.batches(self.statistics_batch)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())

    def training(self) -> list[Tensor]:
        """Positions of one epoch, batch by batch."""
        order = torch.randperm(len(self.feed), generator=torch.Generator().manual_seed(self.index))
        return list(order.split(self.batch_size))


def stream_row(config: Any, rounds: int, ends: int, peaks: bool) -> tuple[dict[str, Any], Any]:
    """Learn all tasks but the last, measure the last; the row, and the method."""
    from cl_kernels.benchmarks import task_costs, task_ways

    from cl_kernels.continual.session import open_session

    torch.manual_seed(config.seed)
    session = open_session(config)
    method: Any = session.method
    count = len(session.tasks)
    for index in range(count):
        feed = session.training(index)
        task = Task(index, session.tasks[index].classes, feed, config.batch_size, config.statistics_batch)
        if index == count - 1:
            batches = [functools.partial(feed.batch, rows) for rows in task.training()]
            way = task_ways.WAYS[config.method]
            return task_costs.measured(method, task, batches, way, rounds=rounds, ends=ends, peaks=peaks), method
        method.begin_task(task)
        for rows in task.training():
            method.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(method.loss(feed.batch(rows)))
            method.optimizer.step()
        method.end_task(task, task.batches())
    raise ValueError("tasks: expected at least one")


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the table shows of it."""
    gaps = [row[key] for key in ("step_difference", "forward_difference", "end_difference") if key in row]
    shown = {
        key.replace("_bytes", "_mb"): row[key] / 1e6 for key in ("kept_bytes", "official_kept_bytes") if key in row
    }
    return {key: None for key, _, _ in COLUMNS} | row | shown | {"difference": f"{max(gaps):.0e}"}


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, from the numbers."""
    steps = [row for row in rows if row["step_ms"] is not None]
    share = ", ".join(f"{row['title']} {100 * row['own_share']:.0f} %" for row in steps)
    found = [f"Share of the own part in a step: {share}."]
    small = [row["title"] for row in steps if row["own_share"] < 0.1]
    if small:
        found.append(
            f"For {', '.join(small)} the own part is less than a tenth of a step on this small model: how it is done "
            "makes little difference to a step here."
        )
    for key, what in (("official_own_x", "own part"), ("official_end_x", "end of the task")):
        slower = [f"{row['title']} ({row[key]:.2f} x)" for row in rows if row[key] is not None and row[key] < 0.95]
        if slower:
            found.append(f"Quicker the official way, {what}: {', '.join(slower)}.")
    found += [
        f"{row['title']}: forward and backward as the official code has them, prompts as rows and the attention map in "
        f"memory, take {row['official_forward_x']:.2f} times ours."
        for row in rows
        if "official_forward_x" in row
    ]
    peaks = [
        f"{row['title']} {row['peak_bytes'] / 1e6:.0f} and {row['official_peak_bytes'] / 1e6:.0f}"
        for row in rows
        if row.get("peak_bytes") is not None and row.get("official_peak_bytes") is not None
    ]
    if peaks:
        found.append(
            "Peak memory of the end of the task beyond what was in use (MB), ours and the official way: "
            f"{', '.join(peaks)}."
        )
    return [*found, *FIXED]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    from cl_kernels.benchmarks import records, task_shapes

    from cl_kernels.continual import RunConfig

    rounds, ends = (3, 1) if given.quick else (25, 4)
    shapes = task_shapes.Shapes("a tiny ViT", 64, 2, 5, 2) if given.quick else task_shapes.VIT_B
    settings: dict[str, Any] = {
        "data": given.data, "backbone": str(given.backbone), "classes": given.classes, "tasks": given.tasks,
        "images_per_class": given.images_per_class, "batch_size": 8 if given.quick else 32, "seed": given.seed,
    }  # fmt: skip
    rows, large, seconds = [], [], []
    for title, name, options in METHODS:
        start = time.process_time()
        config = RunConfig(name, **settings, epochs=1, threads=1, options=options)
        row, method = stream_row(config, rounds, ends, not given.quick)
        rows.append(told({"title": title, "method": name, "options": options, **row}))
        if title == name:
            kept = task_shapes.shares(method.subspace())
            found = task_shapes.own_part(name, shapes, kept, rounds=3 if given.quick else 7)
            large.append(told({"title": f"{name}, {found['shapes']}", "method": name, "protected": kept, **found}))
        seconds.append(time.process_time() - start)
    everything = [*rows, *large]
    told_settings = settings | {
        "backbone": Path(settings["backbone"]).name,
        "rounds": rounds,
        "ends": ends,
        "seconds": sum(seconds),
    }
    shape_note = (
        f"Rows of {shapes.name}: random weights and gradients; each projector protects the share of its layer's "
        "directions that the stream's did on the small model; forward and backward of the model are not measured. Few "
        "images flatter ours in lorac's row: what the official way forms once a step weighs less in a training batch."
    )
    return {
        "rows": everything, "columns": COLUMNS, "notes": [*notes(everything), shape_note],
        "environment": records.environment(), "settings": told_settings,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="default: tin32_novel100, with --quick the embedded digits")
    parser.add_argument("--backbone", default=None, help="default: vit_tin32_small, with --quick the embedded one")
    parser.add_argument("--classes", default=None, help="A:B of the data's classes (default 20:80, with --quick all)")
    parser.add_argument("--tasks", type=int, default=None, help="the last is measured (default 6, 3 with --quick)")
    parser.add_argument("--images-per-class", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    parser.add_argument("--quick", action="store_true", help="does everything run? few images, small shapes")
    given = parser.parse_args(argv)
    large = ("tin32_novel100", "benchmarks/backbones/vit_tin32_small.safetensors", "20:80", 6, 100)
    defaults = ("digits", "embedded-small", None, 3, 10) if given.quick else large
    for name, value in zip(("data", "backbone", "classes", "tasks", "images_per_class"), defaults, strict=True):
        if getattr(given, name) is None:
            setattr(given, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = measure(given)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report["rows"]:
        sys.stdout.write(line(row) + os.linesep)
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    cells = []
    for key, _, digits in COLUMNS:
        value = row[key]
        cells.append("–" if value is None else str(value) if digits is None else f"{value:.{digits}f}")
    return " | ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
