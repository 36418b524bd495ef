"""`cl-kernels explain`: what a trained model looked at, as pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cl_kernels.cli import _console, _errors

if TYPE_CHECKING:
    import typer


def register(app: "typer.Typer") -> None:
    """Add the command. The options stand inside, because declaring them needs typer and importing this must not."""
    from typer import Argument, Option

    def text(help: str, metavar: str = "TEXT") -> Any:
        return Option(help=help, metavar=metavar)

    @app.command()
    def explain(
        more: Annotated[list[str] | None, Argument(metavar="[IMAGES]...", help="Further pictures or folders")] = None,
        run: Annotated[Path | None, text("Folder of train or compare, or a model file", "DIR|FILE")] = None,
        images: Annotated[list[str] | None, text("Pictures, folders, data sets; may be repeated", "FILE|DIR")] = None,
        method: Annotated[str | None, text("rollout, gradcam, ig, attention [all]", "A,B,...")] = None,
        target: Annotated[str, text("predicted, true, or a class", "CLASS")] = "predicted",
        out: Annotated[Path | None, text("Where the page and figures/ go [explain/ beside the model]", "DIR")] = None,
        nodes: Annotated[int, Option(help="Of Integrated Gradients; up to 400 where they do not suffice")] = 50,
        count: Annotated[int, Option(help="Images at most; more are drawn from at random")] = 8,
        seed: Annotated[int, Option(help="Of that draw")] = 0,
        smooth: Annotated[
            bool, Option("--smooth", help="Blur the maps' blocks; it makes up what lies between")
        ] = False,
        device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    ) -> None:
        """Show what a trained model looked at: attention rollout, GradCAM and Integrated Gradients of your images.

        Writes explain.html, explain.json and figures/ to --out."""
        if run is None:
            raise _errors.UsageError("--run is missing: a folder of train or compare, or a model's .safetensors file")
        sources = [*(images or []), *(more or [])]
        if not sources:
            raise _errors.UsageError("--images is missing: picture files, folders, or a data set such as digits")
        _execute(run, sources, method, target, out, nodes, count, seed, smooth, device)


def _execute(
    run: Path, sources: list[str], method: str | None, target: str, out: Path | None, nodes: int, count: int,
    seed: int, smooth: bool, device: str,
) -> None:  # fmt: skip
    from cl_kernels.compare.attribution import sheet
    from cl_kernels.compare.attribution import sources as given
    from cl_kernels.compare.attribution._panels import METHODS
    from cl_kernels.continual.environment import pick_device

    methods = METHODS if method is None else tuple(name.strip() for name in method.split(",") if name.strip())
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise _errors.UsageError(f"--method: expected some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    models = given.open_models(run, device=pick_device(device))
    size = next(iter(models.values())).preprocess.size
    shown, broken, total = given.read_images(sources, size=size, count=count, seed=seed)
    for message in broken:
        _errors.tell(f"skipped: {message}")
    if total > len(shown) + len(broken):
        _errors.tell(f"{len(shown)} of {total} images, drawn by --seed {seed}; --count shows more")
    folder = out or (run / "explain" if run.is_dir() else run.parent / f"{run.stem}-explain")
    console = _console.console()
    sheet.explain(
        models, shown, out=folder, target=target, methods=methods, nodes=nodes, smooth=smooth, seed=seed,
        on_image=lambda image: console.print(_line(image), soft_wrap=True, markup=False),
    )  # fmt: skip
    table = _console.listing()
    table.add_row("Images", str(len(shown)))
    if broken:
        table.add_row("Broken images left out", str(len(broken)))
    table.add_row("Page", str(folder / "explain.html"))
    console.print(table)


def _line(image: dict[str, Any]) -> str:
    """What was said of an image, and how complete Integrated Gradients are."""
    words = [f"{image['name']}:"]
    words.append("; ".join(
        f"{arm} says {said['class']} ({100 * said['probability']:.1f} %)" for arm, said in image["predicted"].items()
    ))  # fmt: skip
    for panel in image["panels"]:
        for one in panel["maps"]:
            if panel["method"] == "ig":
                error = "infinite" if one["completeness"] is None else f"{one['completeness']:.1e}"
                warning = ", INCOMPLETE: do not trust this map" if one["flagged"] else ""
                words.append(
                    f"\n  integrated gradients of {one['arm']} for {panel['class']}: completeness error {error} "
                    f"at {one['nodes']} nodes{warning}"
                )
    return " ".join(words).replace(" \n", "\n")
