"""One image through all models: maps, numbers, files."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels.compare.attribution import render
from cl_kernels.compare.attribution._view import View, isolated
from cl_kernels.compare.attribution.attention import AttentionMap, attention_map, attention_rollout
from cl_kernels.compare.attribution.cam import gradcam
from cl_kernels.compare.attribution.path_gradients import Attribution, integrated_gradients
from cl_kernels.compare.attribution.sanity import deletion_insertion, randomised_head, spearman
from cl_kernels.data.preprocess import Preprocessing

__all__ = ["METHODS", "TITLES", "Painter"]

TITLES = {
    "gradcam": "GradCAM",
    "ig": "Integrated Gradients",
    "rollout": "Attention rollout",
    "attention": "Attention of the last block",
}
METHODS = tuple(TITLES)
OF_CLASS = ("gradcam", "ig")  # the others do not look at the head
CUT = 0.98  # quantile of an Integrated Gradients map that is the brightest colour: single pixels outshine all others
CHANGED = 0.5  # rank correlation with a random head's map, below which a map depends on the head
STEPS = 8  # of the patches that are taken away
CHECKED = 4  # images on which that is tried


class _Map(NamedTuple):
    """`shown` [h, w] is drawn; `patches` [h, w] is what order and ranks are taken from (of Integrated Gradients with
    its sign); `found` is what else the method says."""

    shown: Tensor
    patches: Tensor
    found: Attribution | AttentionMap | None


@dataclass
class Painter:
    """Draws images one by one and keeps the tally."""

    views: dict[str, View]
    pair: tuple[str, ...]
    out: Path
    class_names: tuple[str, ...]
    methods: tuple[str, ...]
    preprocess: Preprocessing | None
    nodes: int = 50
    max_nodes: int = 400
    batch_size: int = 32
    smooth: bool = False
    seed: int = 0
    bytes: int = 0
    _tried: int = 0
    _ranks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _errors: dict[str, list[float]] = field(default_factory=dict)
    _chance: dict[tuple[str, int], float] = field(default_factory=dict)  # of the current image, by model and class
    _maps: dict[tuple[str, str, int], _Map] = field(default_factory=dict)  # likewise, by method too

    def legend(self) -> list[dict[str, str]]:
        """The rows, in words."""
        said = {True: "a class", False: "attention, whatever the class"}
        return [{"name": name, "title": TITLES[name], "explains": said[name in OF_CLASS]} for name in self.methods]

    def image(
        self,
        image: Tensor,
        label: int | None,
        number: int,
        group: str,
        *,
        title: str | None = None,
        targets: list[tuple[int, str]] | None = None,
    ) -> dict[str, Any]:
        """All panels of one prepared image [1, C, H, W]; `label` None where the true class is not known.

        `targets`: classes to explain and why, by default the true one and those that the pair predicts."""
        picture = render.shown(image[0], self.preprocess)
        predicted = {arm: self._predicted(view, image) for arm, view in self.views.items()}
        what = title or f"image {number}"
        truth = "" if label is None else f", true class {self.class_names[label]}"
        stem = f"{group}-{number}"
        self._chance.clear()
        self._maps.clear()
        panels = []
        classes = targets or self._targets(label, predicted)
        for method in self.methods:
            for target, why in classes if method in OF_CLASS else [(None, "")]:
                shown = label if label is not None else predicted[self.pair[0]]["label"]
                at = shown if target is None else target
                panels.append(self._panel(method, target, at, why, image, picture, stem, what))
        if self._tried < CHECKED:
            self._tried += 1
            for arm, view in self.views.items():
                self._try_random_head(arm, view, image, classes[0][0])
        return {
            "number": number,
            "group": group,
            "label": label,
            "class": None if label is None else self.class_names[label],
            "file": self._write(f"{stem}-input", picture),
            "alt": f"{what[0].upper()}{what[1:]}{truth}, as the models saw it",
            "predicted": predicted,
            "panels": panels,
        }

    def sanity(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Whether maps change with the head, by model and method."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for arm, by_method in self._ranks.items():
            for method, ranks in by_method.items():
                real = torch.tensor([rank for rank in ranks if rank == rank], dtype=torch.float64)
                middle = float(real.median()) if len(real) else None
                changed = None if middle is None else middle < CHANGED
                found.setdefault(arm, {})[method] = {"spearman": middle, "changed": changed}
        return found

    def largest(self) -> dict[str, float | None]:
        """The largest completeness error of Integrated Gradients, by model."""
        return {arm: max(self._errors[arm]) if self._errors.get(arm) else None for arm in self.views}

    # Inside --------------------------------------------------------------------------------------------------------

    def _predicted(self, view: View, image: Tensor) -> dict[str, Any]:
        with isolated(view):
            chances = view.outputs(view.prepared(image))[0].double().softmax(dim=0)
            column = chances.argmax()
            label = int(view.classes(column[None])[0])
        return {"label": label, "class": self.class_names[label], "probability": round(float(chances[column]), 6)}

    def _targets(self, label: int | None, predicted: dict[str, dict[str, Any]]) -> list[tuple[int, str]]:
        """Classes to explain, each once, and whose they are."""
        whose: dict[int, list[str]] = {} if label is None else {label: ["true"]}
        for arm in self.pair:
            whose.setdefault(int(predicted[arm]["label"]), []).append(f"predicted by {arm}")
        return [(target, ", ".join(words)) for target, words in whose.items()]

    def _panel(
        self, method: str, target: int | None, at: int, why: str, image: Tensor, picture: Any, stem: str, what: str
    ) -> dict[str, Any]:
        """The maps of all models for one class, on one scale."""
        results = {arm: self._map(method, view, image, at) for arm, view in self.views.items()}
        self._maps |= {(arm, method, at): one for arm, one in results.items()}
        shares = {arm: one.shown / one.shown.sum().clamp(min=1e-300) for arm, one in results.items()}
        tops = [share.quantile(CUT) if method == "ig" else share.max() for share in shares.values()]
        high = float(torch.stack(tops).max())
        of = f" for {self.class_names[at]}" if target is not None else ""
        drawn = []
        for arm, one in results.items():
            name = f"{stem}-{method}{'' if target is None else f'-class{target}'}-{_slug(arm)}"
            painted = render.legend(picture, shares[arm], high, smooth=self.smooth)
            alt = f"{TITLES[method]} of {arm}{of} on {what}: {_where(one.patches.clamp(min=0))}"
            drawn.append({"arm": arm, "file": self._write(name, painted), "alt": alt,
                          **self._numbers(arm, image, one, at)})  # fmt: skip
        ranks = None
        if len(self.pair) == 2:
            a, b = (results[arm].patches[None] for arm in self.pair)
            ranks = _number(float(spearman(a, b)[0])) if a.shape == b.shape else None
        return {
            "method": method,
            "target": target,
            "class": None if target is None else self.class_names[target],
            "why": why,
            "high": high,
            "agreement": ranks,
            "maps": drawn,
        }

    def _map(self, method: str, view: View, image: Tensor, target: int) -> _Map:
        """One map, in float64 on the CPU."""
        if method == "ig":
            result = self._integrated(view, image, target, self.max_nodes)
            return _Map(result.maps()[0].cpu(), result.on_patches(*_grid(view, image))[0].cpu(), result)
        if method == "gradcam":
            maps = gradcam(view, image, target, batch_size=self.batch_size)[0].double().cpu()
            return _Map(maps, maps, None)
        look = attention_rollout if method == "rollout" else attention_map
        looked = look(view, image, batch_size=self.batch_size)
        maps = looked.maps[0].double().cpu()
        return _Map(maps, maps, looked)

    def _integrated(self, view: View, image: Tensor, target: int, most: int, **extra: Any) -> Attribution:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error is in the numbers, and `flagged` in the picture's caption
            return integrated_gradients(
                view, image, target, nodes=self.nodes, max_nodes=max(most, self.nodes), batch_size=self.batch_size,
                **extra,
            )  # fmt: skip

    def _numbers(self, arm: str, image: Tensor, one: _Map, target: int) -> dict[str, Any]:
        known = (arm, target) in self._chance
        curves = deletion_insertion(
            self.views[arm], image, one.patches[None], target, steps=STEPS, chance=not known, seed=self.seed,
            batch_size=self.batch_size,
        )  # fmt: skip
        if not known:
            self._chance[arm, target] = float(curves.random[0])
        found: dict[str, Any] = {
            "empty": not bool(one.shown.any()),
            "completeness": None,
            "nodes": None,
            "flagged": None,
            "deletion": float(curves.deletion[0]),
            "insertion": float(curves.insertion[0]),
            "random": self._chance[arm, target],
            "masses": None,
            "reads": None,
        }
        result = one.found
        if isinstance(result, Attribution):
            error = float(result.error[0])
            self._errors.setdefault(arm, []).append(error)
            found |= {"completeness": _number(error), "nodes": int(result.nodes[0]), "flagged": bool(result.flagged[0])}
        elif isinstance(result, AttentionMap):
            masses = {"cls": result.cls, "prompts": result.prompts, "patches": result.patches}
            found |= {"masses": {key: float(value[0]) for key, value in masses.items()}, "reads": result.reads}
        return found

    def _try_random_head(self, arm: str, view: View, image: Tensor, label: int) -> None:
        head = randomised_head(view, seed=self.seed)
        column = int(view.columns(torch.tensor([label]))[0])
        ranks = self._ranks.setdefault(arm, {})
        for method in OF_CLASS:
            mine = self._maps.get((arm, method, label))
            if mine is None:
                continue
            if method == "gradcam":
                other = gradcam(view, image, column, head=head, batch_size=self.batch_size).double()
            else:
                other = self._integrated(view, image, column, self.nodes, head=head).on_patches(*_grid(view, image))
            ranks.setdefault(method, []).append(float(spearman(mine.patches[None], other.cpu())[0]))

    def _write(self, name: str, picture: Any) -> str:
        file = f"figures/{name}.png"
        self.bytes += render.write_png(self.out / file, picture)
        return file


def _grid(view: View, image: Tensor) -> tuple[int, int]:
    """Patches in a column and in a row."""
    tall, wide = (int(side) for side in view.backbone.patch_embed.patch_size)
    return image.shape[2] // tall, image.shape[3] // wide


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "model"


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else None


def _where(patches: Tensor) -> str:
    """The brightest part of a map [h, w] in words, for those who do not see it."""
    total = float(patches.sum())
    if total <= 0:
        return "nothing speaks for this class"
    height, width = patches.shape
    top = int(patches.flatten().argmax())
    row, column = (top // width + 0.5) / height, (top % width + 0.5) / width
    vertical = "top" if row < 1 / 3 else "bottom" if row > 2 / 3 else "middle"
    horizontal = "left" if column < 1 / 3 else "right" if column > 2 / 3 else "centre"
    best = patches.flatten().sort(descending=True).values.cumsum(0) / total
    few = int((best < 0.5).sum()) + 1
    return f"brightest at the {vertical} {horizontal}; half of it on {few} of {height * width} patches"
