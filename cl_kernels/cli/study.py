"""`cl-kernels study`: methods x streams x seeds from one file, resumable, with tables that say what they can carry."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console, _errors

if TYPE_CHECKING:
    import typer
    from rich.console import Console

    from cl_kernels.continual.study import Job, Plan


def register(app: "typer.Typer") -> None:
    """Add the command. The options stand inside, because declaring them needs typer and importing this must not."""
    from typer import Argument, Option

    @app.command()
    def study(
        config: Annotated[Path, Argument(metavar="CONFIG.toml", help="Tables [study] [run] [[stream]] [[row]]")],
        out: Annotated[Path | None, Option(metavar="DIR", help="All that is written goes there [out/NAME]")] = None,
        seeds: Annotated[int | None, Option(min=1, max=1000, help="Seeds 0 to N-1 [the file's, or 3]")] = None,
        jobs: Annotated[int | None, Option(min=1, max=1024, help="Processes, a thread each [one a core]")] = None,
        only: Annotated[list[str] | None, Option(metavar="LABEL", help="Only this row; may be repeated")] = None,
        against: Annotated[str | None, Option(metavar="LABEL", help="Compare with this row [the file's]")] = None,
        quick: Annotated[bool, Option("--quick", help="One epoch on few images: does everything run?")] = False,
        overwrite: Annotated[bool, Option("--overwrite", help="Run again what has other settings now")] = False,
        plot: Annotated[bool | None, Option("--plot/--no-plot", help="Figures [if matplotlib is there]")] = None,
    ) -> None:
        """Run every method, stream and seed of CONFIG.toml; the same command goes on after an interruption."""
        from cl_kernels.continual import study as studies
        from cl_kernels.continual import workers

        where = Path("out") / config.stem if out is None else out
        plan = studies.load_plan(config, where, seeds=seeds, quick=quick, only=only or ())
        code = run(plan, where, jobs or workers.cores(), against=against, overwrite=overwrite, plot=plot)
        if code:
            import typer

            raise typer.Exit(code)


def run(
    plan: "Plan",
    out: Path,
    processes: int,
    *,
    against: str | None = None,
    overwrite: bool = False,
    plot: bool | None = None,
) -> int:
    """Run a plan and write what it found to `out`; the exit code."""
    from cl_kernels.cli.report import charts
    from cl_kernels.continual import study

    labels = {job.label for job in plan.jobs}
    reference = plan.against if against is None else against
    if reference is not None and against is not None and against not in labels:
        raise _errors.UsageError(f"--against: no row is called {against!r}; known are {', '.join(sorted(labels))}")
    study.settle(plan, out, overwrite=overwrite)
    console = _console.console()
    console.print(f"{len(plan.jobs)} runs, {processes} at a time; results in {out}", markup=False, soft_wrap=True)
    start = time.monotonic()
    results, failures = _execute(plan.jobs, processes, console)
    for job, reason in failures:
        console.print(f"failed: {job.label}, seed {job.seed}: {reason}", style="red", markup=False, soft_wrap=True)
    if results:
        seconds = time.monotonic() - start
        write(plan, results, out, reference, seconds, processes, plot=charts.available() if plot is None else plot)
        _show(results, out, seconds, console)
    return _errors.FAILED if failures or not results else _errors.FINE


def write(
    plan: "Plan",
    results: Sequence[dict[str, Any]],
    out: Path,
    against: str | None,
    seconds: float,
    processes: int,
    *,
    plot: bool,
) -> None:
    """results.json, results.md, report.html and figures/."""
    from cl_kernels.cli.report import versus, write_report
    from cl_kernels.cli.report.summary import sections
    from cl_kernels.continual.checkpoint import write_atomically

    record = {
        "version": 1, "title": plan.title, "seeds": plan.seeds, "against": against,
        "quick": any((run.get("config") or {}).get("quick") for run in results), "seconds": round(seconds, 1),
        "run_seconds": round(sum(run["seconds"]["total"] for run in results), 1), "processes": processes,
        "environment": results[0].get("environment"), "runs": list(results),
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(record, indent=1).encode())
    write_report(results, out / "report.html", title=plan.title or None, plot=plot, against=against)
    found = sections(results)
    head = f"# {plan.title or 'Study'}\n\nPer cent, mean ± sample deviation over seeds.\n\n"
    tables = "\n\n".join(versus.markdown(section, against) for section in found)
    write_atomically(out / "results.md", (head + tables + "\n").encode())
    if plot:
        (out / "figures").mkdir(exist_ok=True)
        for number, section in enumerate(found, 1):
            for name, svg in versus.figures(section, f"stream{number}").items():
                write_atomically(out / "figures" / name, svg.encode())


def _execute(jobs: "Sequence[Job]", processes: int, console: "Console") -> Any:
    """Run the jobs with a bar on a terminal, and a line for each run elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cl_kernels.continual import study

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        done = 0

        def tell(job: "Job", outcome: dict[str, Any] | str) -> None:
            nonlocal done
            if not isinstance(outcome, str):
                done += 1
                if not console.is_terminal:
                    accuracy, lost = 100 * outcome["average_accuracy"], 100 * outcome["forgetting"]
                    text = f"[{done}/{len(jobs)}] {job.label}, seed {job.seed}: {accuracy:.1f} / {lost:.1f}"
                    console.print(text, markup=False, soft_wrap=True)
            progress.advance(bar)

        return study.execute(jobs, processes, tell)


def _show(results: Sequence[dict[str, Any]], out: Path, seconds: float, console: "Console") -> None:
    from rich import box
    from rich.table import Table

    from cl_kernels.cli.report.summary import sections

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
    ended = f"{len(results)} runs in {minutes} min {rest} s. Report: {out / 'report.html'}"
    console.print(ended, markup=False, soft_wrap=True)
