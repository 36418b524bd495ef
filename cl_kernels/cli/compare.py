"""`cl-kernels compare`: prompts or full fine-tuning, for one's own images and backbone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console, _errors

if TYPE_CHECKING:
    import typer

TOO_CLOSE = 4


def register(app: "typer.Typer") -> None:
    """Add the command. The options stand inside, because declaring them needs typer and importing this must not."""
    from typer import Exit, Option

    def text(help: str, metavar: str = "TEXT") -> Any:
        return Option(help=help, metavar=metavar)

    def flag(name: str, help: str) -> Any:
        return Option(name, help=help)

    @app.command()
    def compare(
        data: Annotated[str | None, text("digits (embedded), an .npz shard, a folder [digits]", "NAME|DIR")] = None,
        backbone: Annotated[str | None, text("embedded, timm ViT or .safetensors [embedded]", "NAME|FILE")] = None,
        weights: Annotated[str | None, text("Local weights for --backbone; nothing is downloaded", "FILE")] = None,
        budget: Annotated[str | None, text("Wall time for all of it: 90s, 10m, 1h30m [10m]", "TIME")] = None,
        out: Annotated[Path | None, text("Where the report and the weights go [out/compare-DATA-seedN]", "DIR")] = None,
        arms: Annotated[str | None, text("What is compared; also mixed, ft-then-pt [all others]", "A,B,...")] = None,
        reference: Annotated[str | None, text("Pre-training images or statistics", "DIR|FILE")] = None,
        seed: Annotated[int | None, Option(help="Of every random choice [0]")] = None,
        seeds: Annotated[int | None, Option(help="Draws of the training subsets, at the most [3]")] = None,
        grid: Annotated[str | None, text("Settings that are tried [default]", "default|paper")] = None,
        future_tasks: Annotated[int | None, Option(help="Tasks to reckon storage for [20]")] = None,
        prefer: Annotated[str | None, text("What breaks a tie [accuracy]", "accuracy|storage|latency")] = None,
        resume: Annotated[bool, flag("--resume", "Go on with the trials that --out holds")] = False,
        overwrite: Annotated[bool, flag("--overwrite", "Replace what --out holds")] = False,
        strict: Annotated[bool, flag("--strict", "Stop at the first broken image")] = False,
        threads: Annotated[int | None, Option(help="CPU threads [torch's]")] = None,
        device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1 [auto]")] = None,
        quick: Annotated[
            bool, flag("--quick", "Small sizes and few trials: shows how it works, decides little")
        ] = False,
        pictures: Annotated[bool, flag("--pictures/--no-pictures", "Draw attribution maps")] = True,
    ) -> None:
        """Prompts or full fine-tuning? Trains both and others on growing subsets, decides, and shows the evidence.

        Exit code 0 with a verdict, 4 where it is too close to call."""
        given = {
            "data": data, "backbone": backbone, "weights": weights, "budget": budget, "out": out,
            "arms": None if arms is None else tuple(name.strip() for name in arms.split(",") if name.strip()),
            "reference": reference, "seed": seed, "seeds": seeds, "grid": grid, "future_tasks": future_tasks,
            "prefer": prefer, "resume": resume, "overwrite": overwrite, "strict": strict, "threads": threads,
            "device": device, "quick": quick, "pictures": pictures,
        }  # fmt: skip
        raise Exit(_execute({name: value for name, value in given.items() if value is not None}))


def _execute(given: dict[str, Any]) -> int:
    from cl_kernels.compare.config import CompareConfig
    from cl_kernels.compare.engine import compare
    from cl_kernels.compare.progress import Progress

    if "out" not in given:
        name = Path(str(given.get("data", CompareConfig.data))).stem
        given["out"] = Path("out") / f"compare-{name}-seed{given.get('seed', CompareConfig.seed)}"
    config = CompareConfig(**given)
    if config.resume and not (config.folder / "settings.json").exists():
        _errors.tell(f"{config.folder} holds no comparison to resume; starting from the beginning")
    results = compare(config, progress=Progress())
    _show(results, config.folder)
    return TOO_CLOSE if results["decision"]["verdict"] == "too-close" else _errors.FINE


def _show(results: dict[str, Any], out: Path) -> None:
    decision = results["decision"]
    console = _console.console()
    console.print(decision["sentence"], soft_wrap=True)
    titles = {arm["name"]: arm["title"] for arm in results["arms"]}
    cost = {entry["arm"]: entry for entry in results["cost"]}
    table = _console.table("Arm", *(f"{size} images" for size in results["sizes"]), "Trained", "ms an image")
    found = {(entry["arm"], entry["size"]): entry["mean"] for entry in decision["accuracy"]}
    for arm, title in titles.items():
        cells = [f"{100 * found[arm, size]:.1f} %" if (arm, size) in found else "-" for size in results["sizes"]]
        entry = cost.get(arm)
        cells += [f"{entry['trainable_parameters']:,}", f"{entry['latency_ms']:.2f}"] if entry else ["-", "-"]
        table.add_row(title, *cells)
    console.print(table)
    for change in decision["changes"]:
        console.print(f"Would change it: {change}", soft_wrap=True)
    for missing in results["missing"]:
        console.print(f"Note: {missing}", soft_wrap=True)
    files = _console.listing()
    for name in ("report.html", "results.json"):
        if (out / name).exists():
            files.add_row(name, str(out / name))
    console.print(files)
