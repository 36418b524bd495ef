"""Maps of some images as one page: what `cl-kernels explain` writes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cl_kernels import pages
from cl_kernels._version import __version__
from cl_kernels.compare.attribution._panels import METHODS, TITLES, Painter
from cl_kernels.compare.attribution._view import view_of
from cl_kernels.compare.attribution.sources import Shown, chosen_class, known_classes
from cl_kernels.continual.checkpoint import write_atomically
from cl_kernels.continual.deployed import Deployed

__all__ = ["SCHEMA", "explain"]

SCHEMA = "cl_kernels.explain/1"
NOTE = (
    "Dark blue: little of the map; yellow: much. A map adds up to one, and the maps of a row have one colour scale. "
    "Integrated Gradients shows the pixels that speak for the class, against an image of the mean colour. Maps say "
    "where a model looked, not why; attention and rollout do not look at the class at all."
)


def explain(
    models: Mapping[str, Deployed],
    images: Sequence[Shown],
    *,
    out: Path,
    target: str = "predicted",
    methods: Sequence[str] = METHODS,
    nodes: int = 50,
    smooth: bool = False,
    seed: int = 0,
    on_image: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Draw the maps of `images`; write ``figures/*.png``, ``explain.json`` and ``explain.html`` (one file, no network)
    to `out`, and return what explain.json holds: `images` as in `pictures`, `sanity`, `largest_completeness`.

    `target`: "predicted" (of each of the first two models), "true" (the name of an image's folder or its data set's
    label), or the name of a class. `on_image` is called with each finished image. Raises `ValueError` for unknown
    methods and classes, for "true" where an image's class is not known, and where the models' classes or preprocessing
    differ; nothing is written then."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"method: expected some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"nodes: expected a whole number of at least 1, got {nodes!r}")
    names = known_classes(models.values())
    prepare = next(iter(models.values())).preprocess
    if any(model.preprocess != prepare for model in models.values()):
        raise ValueError("models: they take differently prepared images, so their maps cannot be set side by side")
    labels = [names.index(one.class_name) if one.class_name in names else None for one in images]
    wanted = None if target in ("predicted", "true") else chosen_class(target, names)
    if target == "true" and None in labels:
        lost = images[labels.index(None)]
        raise ValueError(
            f"target: the true class of {lost.name} is not known; put it into a folder named after its class, "
            "or use --target predicted"
        )
    views = {name: view_of(model) for name, model in models.items()}
    painter = Painter(views, tuple(views)[:2], out, tuple(names), tuple(methods), prepare, nodes, max(400, nodes),
                      smooth=smooth, seed=seed)  # fmt: skip
    found: list[dict[str, Any]] = []
    for number, (one, label) in enumerate(zip(images, labels, strict=True)):
        pixels: Tensor = prepare(one.image.unsqueeze(0))
        asked = [(wanted, "asked for")] if wanted is not None else None
        if target == "true" and label is not None:
            asked = [(label, "true")]
        told = Path(one.name).name
        found.append(painter.image(pixels, label, number, "image", title=told, targets=asked) | {"name": one.name})
        if on_image is not None:
            on_image(found[-1])
    result = {
        "schema": SCHEMA,
        "models": list(models),
        "target": target,
        "methods": painter.legend(),
        "images": found,
        "sanity": painter.sanity(),
        "largest_completeness": painter.largest(),
        "note": NOTE,
    }
    write_atomically(out / "explain.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write_atomically(out / "explain.html", _page(result, out).encode())
    return result


def _page(result: Mapping[str, Any], out: Path) -> str:
    def uri(file: str) -> str:
        return "data:image/png;base64," + base64.b64encode((out / file).read_bytes()).decode()

    return pages.render(
        Path(__file__).parent, "explain.html.jinja", title="What the model looked at", images=result["images"],
        titles=TITLES, uri=uri, result=result, version=__version__,
    )  # fmt: skip
