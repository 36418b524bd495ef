"""The demo: every method of the table on embedded real images over several seeds, one process a core.

    python examples/demo.py --seeds 3 --out out/demo

Writes results.json, report.html and runs/ to --out and prints the table. Finished runs are skipped, an interrupted one
goes on from its checkpoint. All settings are in demo.toml beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One run: a line of the table, a stream, a seed."""

    label: str
    title: str
    out: str
    settings: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it: one thread each, as many processes as cores
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    start = time.monotonic()
    jobs = plan(arguments.settings, arguments.seeds, arguments.out, quick=arguments.quick, only=arguments.only)
    console.print(f"{len(jobs)} runs, {arguments.jobs} at a time; results in {arguments.out}")
    try:
        results, failures = execute(jobs, arguments.jobs, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130
    seconds = time.monotonic() - start
    for job, reason in failures:
        console.print(f"failed: {job.label}, seed {job.settings['seed']}: {reason}", style="red", markup=False)
    if results:
        finish(results, arguments, seconds, console)
    return 1 if failures or not results else 0


def plan(settings: Path, seeds: int, out: Path, *, quick: bool, only: Sequence[str] = ()) -> list[Job]:
    """Every run of the settings file, seeds outermost, so that an interrupted demo has whole seeds to show."""
    with open(settings, "rb") as file:
        wanted = tomllib.load(file)
    streams, rows = wanted.get("stream") or [{}], wanted.get("row", [])
    if set(wanted) - {"run", "stream", "row"} or not all(stream.get("row", rows) for stream in streams):
        names = ", ".join(sorted(wanted))
        raise SystemExit(f"{settings}: expected [run], [[stream]] and [[row]] or [[stream.row]] tables, got {names}")
    jobs = []
    for seed in range(seeds):
        for number, stream in enumerate(streams, 1):
            shared = {name: value for name, value in stream.items() if name != "row"}
            for row in stream.get("row", rows):
                if only and row["label"] not in only:
                    continue
                layers = (wanted.get("run", {}), shared, row)
                options = {name: value for layer in layers for name, value in layer.get("options", {}).items()}
                fields = {k: v for layer in layers for k, v in layer.items()}
                fields.update(options=options, seed=seed, quick=quick)
                title, label = fields.pop("title", ""), fields.pop("label")
                slug = "".join(c if c.isalnum() else "-" for c in f"{number}-{label}")
                jobs.append(Job(label, title, str(out / "runs" / f"{slug}-seed{seed}"), fields))
    return jobs


def execute(jobs: Sequence[Job], processes: int, console: Any) -> tuple[list[dict[str, Any]], list[tuple[Job, str]]]:
    """Run the jobs in worker processes; results in the order of `jobs`, and the failed ones with their reason."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    results: dict[int, dict[str, Any]] = {}
    failures: list[tuple[Job, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        for index, outcome in _outcomes(jobs, processes):
            job = jobs[index]
            if isinstance(outcome, str):
                failures.append((job, outcome))
            else:
                results[index] = outcome
                if not console.is_terminal:
                    accuracy, lost = outcome["average_accuracy"], outcome["forgetting"]
                    text = f"{job.label}, seed {job.settings['seed']}: {100 * accuracy:.1f} / {100 * lost:.1f}"
                    console.print(f"[{len(results)}/{len(jobs)}] {text}", markup=False)
            progress.advance(bar)
    return [results[index] for index in sorted(results)], failures


def _outcomes(jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(index, results or reason of failure) as they finish."""
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started threads
    workers = min(processes, len(jobs))
    with ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_start_worker) as pool:
        waiting: dict[Future[dict[str, Any]], int] = {pool.submit(work, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except Exception as error:  # one failed run must not take the others' results away
                    yield waiting[future], f"{type(error).__name__}: {error}"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Plain(io.TextIOBase):
    """stderr that says it is no terminal, so that runs side by side draw no progress bars over each other."""

    def write(self, text: str) -> int:
        return sys.__stderr__.write(text) if sys.__stderr__ is not None else len(text)


def _start_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers at once and without tracebacks
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stderr = _Plain()


def _end_with_the_parent() -> None:
    """A pool's workers wait for work for ever when the demo is killed; their runs go on from their checkpoints."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(job: Job) -> dict[str, Any]:
    """One run, in a worker process: taken from disk if it is finished, continued if it was interrupted."""
    from cl_kernels import continual
    from cl_kernels.errors import CheckpointError

    config = continual.RunConfig(**job.settings, out=job.out, resume=True, threads=1)
    finished = Path(job.out) / "results.json"
    if finished.is_file():
        results = json.loads(finished.read_text())
        if results.get("config") == config.as_json():
            return {**results, "label": job.label, "title": job.title}
    try:
        results = continual.run(config)
    except CheckpointError:  # what lies there was made with other settings
        results = continual.run(continual.RunConfig(**job.settings, out=job.out, overwrite=True, threads=1))
    return {**results, "label": job.label, "title": job.title}


def finish(results: list[dict[str, Any]], arguments: argparse.Namespace, seconds: float, console: Any) -> None:
    """Write results.json and report.html, print the tables."""
    from rich import box
    from rich.table import Table

    from cl_kernels.cli.report import write_report
    from cl_kernels.cli.report.summary import sections
    from cl_kernels.continual.checkpoint import write_atomically

    out: Path = arguments.out
    record = {
        "version": 1, "seeds": arguments.seeds, "quick": arguments.quick, "seconds": round(seconds, 1),
        "run_seconds": round(sum(r["seconds"]["total"] for r in results), 1), "processes": arguments.jobs,
        "environment": results[0].get("environment"), "runs": results,
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(record, indent=1).encode())
    report = write_report(results, out / "report.html")
    for section in sections(results):
        measures = [m for m in section.measures() if m.key != "seconds"]  # 80 columns hold no more; the report has it
        console.print(f"\n{section.title} (per cent, mean ± deviation over seeds)", markup=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("method", no_wrap=True)
        for measure in measures:
            table.add_column(measure.short, justify="right", no_wrap=True)
        for group in section.groups:
            table.add_row(group.label, *(m.text(group.spread(m)).replace(" ± ", "±") for m in measures))
        console.print(table)
    minutes, rest = divmod(round(seconds), 60)
    console.print(f"{len(results)} runs in {minutes} min {rest} s. Report: {report}", markup=False, soft_wrap=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=_positive, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write (default out/demo)")
    parser.add_argument("--settings", type=Path, default=HERE / "demo.toml", help="default: demo.toml beside this file")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="only this row; may be repeated")
    parser.add_argument("--jobs", type=_positive, default=_cores(), help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: does everything run?")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"expected 1 to 1000, got {number}")
    return number


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
