"""The same images through several models: which ones, by rule, and what each model looked at, on one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_kernels.compare.attribution._panels import METHODS, Painter
from cl_kernels.compare.attribution._targets import pieces
from cl_kernels.compare.attribution._view import View, isolated, view_of
from cl_kernels.data.preprocess import Preprocessing

__all__ = ["NOTE", "groups", "pictures"]

NOTE = (
    "Maps say where a model looked, not why it was right, and they do not explain the gap between two models: the "
    "paper that compares prompts with full fine-tuning says so of its own maps. Images are drawn at random by the rule "
    "named above them, none is picked by eye; both models get the same image, the same class and one colour scale."
)


def pictures(
    models: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    *,
    out: Path,
    class_names: Sequence[str],
    pair: tuple[str, str] | None = None,
    numbers: Sequence[int] | None = None,
    preprocess: Preprocessing | None = None,
    log_probabilities: Mapping[str, Tensor] | None = None,
    methods: Sequence[str] = METHODS,
    per_group: int = 2,
    seed: int = 0,
    nodes: int = 50,
    max_nodes: int = 400,
    batch_size: int = 32,
    smooth: bool = False,
    deadline: Callable[[], bool] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw what `models` looked at; PNG files under ``out/figures``, and this dictionary (``results["pictures"]``)::

        arms        [name]: the columns, in the order of `models`
        pair        [first, second]: the two whose answers make the groups ("prompts" and "full" below)
        methods     [{name, title, explains}]: rows; explains: "a class" or "attention, whatever the class"
        groups      [{name, title, available, shown}]; name: "first-right" (second wrong), "second-right",
                    "both-right", "both-wrong"; available: images of the test set in it; shown: how many are below
        images      [{number, group, label, class, file, alt,
                      predicted: {arm: {label, class, probability}},
                      panels: [{method, target, class, why, high, agreement,
                                maps: [{arm, file, alt, empty, completeness, nodes, flagged,
                                        deletion, insertion, random, masses, reads}]}]}]
        sanity      {arm: {method: {spearman, changed}}}: rank correlation (median over the images) with the map of a
                    head of random weights; changed: below 0.5, as it must be
        largest_completeness   {arm: largest error of Integrated Gradients, or null}
        stopped     true where the deadline came first; the images that are there are whole
        seed, smooth, bytes, note

    A panel is one row to show side by side: the same image, `target` (a label; null for attention and rollout) and
    colour scale for all arms. `why` says whose class it is ("true", "true, predicted by full", ...). Each map is scaled
    to add up to one; `high` is the share that the brightest colour stands for (for "ig", of which the pixels that speak
    for the class are drawn, the 98th percentile: what is above is cut). `agreement`: Spearman between the pair's maps;
    it, `deletion` and `insertion` look at patches, of "ig" with their sign. Numbers that do not apply are null.
    `masses`: {cls, prompts, patches} of attention and rollout; `reads`: whose query, see `AttentionMap`.
    `file` is relative to `out`; every file has an `alt` text.

    `images` [N, C, H, W]: normalised for these models, or uint8 with `preprocess`; `labels` [N] their classes, which
    index `class_names`; `numbers` [N]: their numbers in the test set (0..N-1). `pair`: by default the first two models;
    with one model the groups are "right" and "wrong". `log_probabilities` {arm: [N, C]}, columns in label order, saves
    a pass over all images. `methods`: of "gradcam", "ig", "rollout", "attention". `per_group` random images of each
    group by `seed`. `deadline()`: whether to stop now. `on_image(done, total)` after each image.

    Raises `ValueError` for arguments that do not fit, `ImportError` without Pillow. Cost: dominated by "ig", nodes
    passes forward and backward for each model, image and class (2 classes where the answers differ, 3 at most).
    """
    views = _checked(models, images, labels, class_names, methods, per_group, numbers)
    names = tuple(views) if pair is None else tuple(pair)
    if pair is not None and (len(names) != 2 or not set(names) <= views.keys()):
        raise ValueError(f"pair: expected two of {', '.join(views)}, got {pair}")
    names = names[:2]
    if images.dtype == torch.uint8:
        if preprocess is None:
            raise ValueError("preprocess: uint8 images need it")
        prepare: Callable[[Tensor], Tensor] = preprocess
    else:
        prepare = _same
    given = log_probabilities or {}
    answers = {
        name: given[name].argmax(dim=1).cpu() if name in given else _answers(view, images, prepare, batch_size)
        for name, view in views.items()
    }
    found = groups(tuple(answers[name] == labels.cpu() for name in names), names)
    chosen = _drawn(found, per_group, seed)
    painter = Painter(views, names, Path(out), tuple(class_names), tuple(methods), preprocess, nodes, max_nodes,
                      batch_size, smooth, seed)  # fmt: skip
    shown: list[dict[str, Any]] = []
    stopped = False
    for done, (group, row) in enumerate(chosen):
        if deadline is not None and deadline():
            stopped = True
            break
        image = prepare(images[row : row + 1])
        shown.append(painter.image(image, int(labels[row]), int(numbers[row]) if numbers else row, group))
        if on_image is not None:
            on_image(done + 1, len(chosen))
    count = {name: sum(image["group"] == name for image in shown) for name, _, _ in found}
    return {
        "arms": list(views),
        "pair": list(names),
        "methods": painter.legend(),
        "groups": [
            {"name": name, "title": title, "available": len(rows), "shown": count[name]} for name, title, rows in found
        ],
        "images": shown,
        "sanity": painter.sanity(),
        "largest_completeness": painter.largest(),
        "stopped": stopped,
        "seed": seed,
        "smooth": smooth,
        "bytes": painter.bytes,
        "note": NOTE,
    }


def groups(right: tuple[Tensor, ...], names: tuple[str, ...]) -> list[tuple[str, str, Tensor]]:
    """(name, title, rows) of the images by who is right; `right` [N] bool of one model or two."""
    if len(right) == 1:
        (one,) = right
        parts = [("right", f"{names[0]} right", one), ("wrong", f"{names[0]} wrong", ~one)]
    else:
        a, b = right
        first, second = names
        parts = [
            ("first-right", f"{first} right, {second} wrong", a & ~b),
            ("second-right", f"{second} right, {first} wrong", b & ~a),
            ("both-right", "both right", a & b),
            ("both-wrong", "both wrong", ~a & ~b),
        ]
    return [(name, title, mask.nonzero().flatten()) for name, title, mask in parts]


def _drawn(found: list[tuple[str, str, Tensor]], per_group: int, seed: int) -> list[tuple[str, int]]:
    """`per_group` random rows of each group."""
    chosen = []
    for place, (name, _, rows) in enumerate(found):
        generator = torch.Generator().manual_seed((seed << 3) + place)  # a group's draw does not depend on the others
        drawn = rows[torch.randperm(len(rows), generator=generator)[:per_group]]
        chosen += [(name, int(row)) for row in drawn]
    return chosen


def _same(images: Tensor) -> Tensor:
    return images


def _answers(view: View, images: Tensor, prepare: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    """The class that the model gives each image, on the CPU."""
    with isolated(view):
        parts = []
        for piece in pieces(len(images), batch_size):
            logits = view.outputs(view.prepared(prepare(images[piece])))
            parts.append(view.classes(logits.argmax(dim=1)).cpu())
    return torch.cat(parts)


def _checked(
    models: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    methods: Sequence[str],
    per_group: int,
    numbers: Sequence[int] | None,
) -> dict[str, View]:
    if not models:
        raise ValueError("models: expected at least one, got none")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images: expected [N, C, H, W] with N at least 1, got {tuple(images.shape)}")
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise ValueError(f"labels: expected {len(images)} whole numbers, got {labels.dtype} {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"labels: expected 0 to {len(class_names) - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    if isinstance(per_group, bool) or not isinstance(per_group, int) or per_group < 1:
        raise ValueError(f"per_group: expected a whole number of at least 1, got {per_group!r}")
    if numbers is not None and len(numbers) != len(images):
        raise ValueError(f"numbers: expected one for each of the {len(images)} images, got {len(numbers)}")
    return {name: view_of(model) for name, model in models.items()}
