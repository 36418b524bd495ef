"""`cl-kernels train`: one method on one stream of tasks, from the command line or a TOML file."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console, _errors, _options
from cl_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    import typer


def register(app: "typer.Typer") -> None:
    """Add the command. The options stand inside, because declaring them needs typer and importing this must not."""
    from typer import Argument, Option

    def text(help: str, metavar: str = "TEXT") -> Any:
        return Option(help=help, metavar=metavar)

    def flag(name: str, help: str) -> Any:
        return Option(name, help=help)

    method_help = "Such as nsp2, null-space, sequential; a wrong name lists all"
    file_help = "Settings from a file (fields of RunConfig); the command line overrides it"

    @app.command()
    def train(
        method: Annotated[str | None, Argument(metavar="METHOD", help=method_help)] = None,
        data: Annotated[str | None, text("digits (embedded), an .npz shard, a folder [digits]", "NAME|DIR")] = None,
        tasks: Annotated[int | None, Option(help="Tasks the classes are dealt into [5]")] = None,
        stream: Annotated[str | None, text("What a task brings that is new [class]", "class|source|domain")] = None,
        domains: Annotated[str | None, text("Transforms of the domains: identity,invert,rotate90", "A,B,...")] = None,
        classes: Annotated[str | None, text("Only the classes A to B - 1 of the data [all]", "A:B")] = None,
        images_per_class: Annotated[int | None, Option(help="Training images of a class, at most [all]")] = None,
        backbone: Annotated[str | None, text("embedded, timm ViT or .safetensors [embedded]", "NAME|FILE")] = None,
        weights: Annotated[str | None, text("Local weights for --backbone; nothing is downloaded", "FILE")] = None,
        image_size: Annotated[int | None, Option(help="Resolution of a timm backbone [its own]")] = None,
        teacher: Annotated[str | None, text("Backbone that teaches --backbone (kdp)", "NAME|FILE")] = None,
        teacher_weights: Annotated[str | None, text("Local weights for --teacher", "FILE")] = None,
        epochs: Annotated[int | None, Option(help="Epochs a task [10]")] = None,
        batch_size: Annotated[int | None, Option(help="Images a step [64]")] = None,
        lr: Annotated[float | None, Option(help="Learning rate [the method's own]")] = None,
        option: Annotated[list[str] | None, text("An option of the method; may be repeated", "KEY=VALUE")] = None,
        seed: Annotated[int | None, Option(help="Initialisation, data order and class order [0]")] = None,
        class_seed: Annotated[int | None, Option(help="The class order alone [the seed]")] = None,
        device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1 [auto]")] = None,
        precision: Annotated[str | None, Option(help="auto, float32, bfloat16, float16 [auto]")] = None,
        augment: Annotated[str | None, Option(help="none, flip, crop [none]")] = None,
        eval_batch_size: Annotated[int | None, Option(help="Images a batch of evaluation [250]")] = None,
        eval_shift: Annotated[bool | None, flag("--eval-shift", "Also evaluate on corrupted test images")] = None,
        statistics_batch: Annotated[int | None, Option(help="Images a batch of statistics [100]")] = None,
        threads: Annotated[int | None, Option(help="CPU threads [torch's]")] = None,
        out: Annotated[Path | None, text("All that is written goes there [out/METHOD-DATA-seedS]", "DIR")] = None,
        resume: Annotated[bool, flag("--resume", "Continue from the last checkpoint in --out")] = False,
        overwrite: Annotated[bool | None, flag("--overwrite", "Replace an earlier run in --out")] = None,
        checkpoint_minutes: Annotated[float | None, Option(help="Save this often inside a task [10]")] = None,
        checkpoint_steps: Annotated[int | None, Option(help="Save after this many steps inside a task")] = None,
        config: Annotated[Path | None, text(file_help, "F.toml")] = None,
        quick: Annotated[bool | None, flag("--quick", "One epoch on at most 40 images a class")] = None,
        strict: Annotated[bool | None, flag("--strict", "Stop at the first broken image; deterministic only")] = None,
        tensorboard: Annotated[bool | None, flag("--tensorboard", "Also write event files")] = None,
        plot: Annotated[bool | None, flag("--plot/--no-plot", "Charts in the report [if matplotlib is there]")] = None,
    ) -> None:  # fmt: skip
        """Train METHOD on a stream of tasks, evaluate after each, write results.json and report.html to --out."""
        given: dict[str, Any] = {
            "method": method, "data": data, "tasks": tasks, "stream": stream, "backbone": backbone, "weights": weights,
            "classes": classes, "images_per_class": images_per_class,
            "domains": None if domains is None else tuple(d.strip() for d in domains.split(",") if d.strip()),
            "image_size": image_size, "teacher": teacher, "teacher_weights": teacher_weights,
            "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
            "class_seed": class_seed,
            "device": device, "precision": precision, "augment": augment, "eval_batch_size": eval_batch_size,
            "statistics_batch": statistics_batch, "eval_shift": eval_shift, "threads": threads,
            "out": out, "resume": resume, "overwrite": overwrite, "checkpoint_minutes": checkpoint_minutes,
            "checkpoint_steps": checkpoint_steps, "quick": quick, "strict": strict, "tensorboard": tensorboard,
        }  # fmt: skip
        _execute(given, config, option or [], plot)


def _execute(given: dict[str, Any], file: Path | None, options: list[str], plot: bool | None) -> None:
    from cl_kernels import continual
    from cl_kernels.cli.report import charts, write_report
    from cl_kernels.continual.claim import CHECKPOINT

    config = _options.run_config(given, file, options)
    if plot and not charts.available():
        raise BackendUnavailableError('--plot needs matplotlib, which is not installed: pip install "cl-kernels[plot]"')
    out = Path(str(config.out))
    new = not out.exists()
    if config.resume and not (out / CHECKPOINT).exists():
        _errors.tell(f"{out} holds no checkpoint to resume from; starting from the beginning")
    try:
        results = continual.run(config)
    except BaseException:
        if new:
            _remove_empty(out)
        raise
    report = write_report([results], out / "report.html", plot=plot)
    _show(results, report)


def _remove_empty(out: Path) -> None:
    """A run that ended before its first checkpoint leaves no folders behind, unless something is in them."""
    for folder in (out / "checkpoints", out):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _show(results: dict[str, Any], report: Path) -> None:
    from cl_kernels.cli.report.summary import MEASURES

    table = _console.listing()
    for measure in MEASURES:
        value = measure.pick(results)
        if value is not None:
            table.add_row(measure.title, f"{value * measure.scale:.{measure.digits}f}")
    if results.get("skipped_images"):
        table.add_row("Broken images left out", str(results["skipped_images"]))
    table.add_row("Results", str(report.with_name("results.json")))
    table.add_row("Report", str(report))
    _console.console().print(table)
