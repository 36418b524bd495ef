"""What a comparison compares: a method, the settings all arms share, and the grid from which each is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn

from cl_kernels import methods
from cl_kernels.nn._prompts import init_bound

__all__ = ["ARMS", "Arm", "Scale", "arm_named"]

GRIDS = ("default", "paper")
TRIALS = 8  # of every arm on the default grid

EQUAL: dict[str, Any] = {
    "schedule": "warmup-cosine",
    "warmup": 0.1,
    "decay": "matrices",
    "head": "linear",
    "head_init": "class-means",
    "head_lr": None,
}
"""Of every arm. No arm has dropout in its backbone, which stays in eval mode; all see the same batches. Heads start at
the class means: on 200 inverted digits that took full fine-tuning from 95.8 to 98.4 % and VPT-deep from 48 to 93 over
the official code's Kaiming-normal start (15 epochs), so a comparison without it would measure the start of the head."""


@dataclass(frozen=True)
class Scale:
    """What a grid depends on: the backbone's width, number of image tokens and bound of new prompts, the batch size."""

    width: int = 768
    tokens: int = 196
    batch_size: int = 64
    bound: float = 0.0625

    @classmethod
    def of(cls, backbone: nn.Module, batch_size: int = 64) -> Scale:
        """Read off a timm vision transformer; ViT-B/16's numbers where it does not say."""
        embed = getattr(backbone, "patch_embed", None)
        patches = getattr(embed, "num_patches", cls.tokens)
        bound = init_bound("vpt", backbone) if hasattr(embed, "patch_size") else cls.bound
        return cls(int(getattr(backbone, "embed_dim", cls.width)), int(patches), batch_size, bound)

    def weight_lrs(self, rates: Iterable[float]) -> list[float]:
        """Rates for weights of a model of width 768, for this width: an Adam step moves a feature in proportion to the
        width, so rates grow as 768 / width; rounded to two digits. On 200 inverted digits the best rate was then inside
        the grid at width 128 (0.0018 of 0.00006 to 0.0018; 0.005 lost 3 points) and 64 (0.0036; 0.01 lost 18)."""
        return [_two_digits(rate * 768 / self.width) for rate in rates]

    def prompt_lrs(self, rates: Iterable[float]) -> list[float]:
        """Rates for prompts of ViT-B/16, whose entries start within 0.0625, in proportion to where these start: a step
        of Adam is a share of that. On inverted digits the best were 0.01 to 0.02 at width 128, 0.02 to 0.04 at 64."""
        return [_two_digits(rate * self.bound / 0.0625) for rate in rates]

    def lengths(self, prompts: Iterable[int]) -> list[int]:
        """Prompt lengths for 196 tokens, as the same share of this many, at least 1 and all different."""
        found: list[int] = []
        for count in prompts:
            length = max(1, round(count * self.tokens / 196))
            found.append(length if not found else max(length, found[-1] + 1))
        return found

    def published(self, rates: Iterable[float]) -> list[float]:
        """Rates that the published code multiplies by batch size / 256 (what its configurations list is multiplied
        already, T7)."""
        return [rate * self.batch_size / 256 for rate in rates]


Grid = Callable[[Scale], list[dict[str, Any]]]


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    `method` is a name of `cl_kernels.methods`; `fixed` are options of it that are not tuned; `frozen_features`: the
    backbone never changes and is read once. `first`: an arm that trains before, whose backbone this one then freezes.
    """

    name: str
    title: str
    method: str
    tuned: Grid
    published: Grid | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    frozen_features: bool = False
    first: str | None = None

    def grid(self, kind: str = "default", scale: Scale | None = None) -> list[dict[str, Any]]:
        """The settings to try; each is what `train_trial` takes as `options`.

        "default": `TRIALS` of every arm (document 8.5), in an order of which evenly spread samples hold every value of
        the learning rate (four) or two that differ (two). "paper": section 3's, 16 for `full` and 240 for prompts; arms
        that the paper has not are as in "default". Raises `ValueError` for another name."""
        if kind not in GRIDS:
            raise ValueError(f"grid: expected one of {', '.join(GRIDS)}, got {kind!r}")
        make = self.published if kind == "paper" and self.published is not None else self.tuned
        return make(scale or Scale())

    def method_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """All options of the method: the shared ones, the arm's own, and `options` of a trial; "first" holds those of
        the arm that trains before."""
        own = {key: value for key, value in options.items() if key != "first" or self.first is None}
        return {**EQUAL, **self.fixed, **own}

    def check(self, options: dict[str, Any]) -> None:
        """Raise `ValueError` for options that the method does not take."""
        methods.check(self.method, **self.method_options(options))
        if self.first is not None:
            arm_named(self.first).check(options.get("first", {}))


def arm_named(arm: Arm | str) -> Arm:
    """The arm of that name. Raises `ValueError`."""
    if isinstance(arm, Arm):
        return arm
    if arm not in ARMS:
        raise ValueError(f"arm: expected one of {', '.join(ARMS)}, got {arm!r}")
    return ARMS[arm]


def _two_digits(value: float) -> float:
    if not value:
        return 0.0
    digits = 1 - math.floor(math.log10(abs(value)))
    return round(value, digits)


def _every(**values: Iterable[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


_TWO_OF_FOUR = (0, 1, 5, 6, 7, 3, 2, 4)  # of a grid of two rows of four; see `Arm.grid` for what the order is for


def _four_of_two(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """A grid of four rows of two, likewise."""
    grid = _every(**values)
    return [grid[index] for index in (1, 2, 3, 4, 5, 7, 6, 0)]


def _prompts(scale: Scale) -> list[dict[str, Any]]:
    """Of the document's three rates for SGD the smallest: with heads that start at class means 1.0 is too high (200
    inverted digits, 1 and 4 prompts: 88.9 and 91.8 %; at 0.1 93.8 and 93.8; AdamW at 0.01 95.3 and 94.7)."""
    ways = [*(("adamw", rate) for rate in scale.prompt_lrs((1e-3, 3e-3, 1e-2))), ("sgd", 0.25)]
    grid = [
        {"prompts": count, "optimizer": optimizer, "lr": lr}
        for count in scale.lengths((10, 50))
        for optimizer, lr in ways
    ]
    return [grid[index] for index in _TWO_OF_FOUR]


def _published_prompts(scale: Scale) -> list[dict[str, Any]]:
    rates = scale.published((0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50))
    lengths = (1, 5, 10, 50, 100, 200)
    return _every(prompts=lengths, optimizer=("sgd",), lr=rates, weight_decay=_DECAYS, head_init=("kaiming",))


def _full(scale: Scale) -> list[dict[str, Any]]:
    return _four_of_two(lr=scale.weight_lrs((1e-5, 3e-5, 1e-4, 3e-4)), layer_decay=(1.0, 0.75))


def _published_full(scale: Scale) -> list[dict[str, Any]]:
    return _every(lr=scale.published((1e-4, 5e-4, 1e-3, 5e-3)), weight_decay=_DECAYS, head_init=("kaiming",))


def _mixed(scale: Scale) -> list[dict[str, Any]]:
    prompts, weights = scale.prompt_lrs((1e-3, 3e-3, 1e-2, 3e-3)), scale.weight_lrs((1e-5, 3e-5, 1e-4, 1e-4))
    pairs = [{"lr": lr, "backbone_lr": rest} for lr, rest in zip(prompts, weights, strict=True)]
    grid = [{"prompts": count, **pair} for count in scale.lengths((10, 50)) for pair in pairs]
    return [grid[index] for index in _TWO_OF_FOUR]


def _published_mixed(scale: Scale) -> list[dict[str, Any]]:
    return [{**options, "backbone_lr": options["lr"], "dropout": 0.0} for options in _published_prompts(scale)]


def _tuned_then_prompts(scale: Scale) -> list[dict[str, Any]]:
    first = _every(lr=scale.weight_lrs((3e-5, 1e-4)), layer_decay=(1.0, 0.75))
    prompts = [{"prompts": scale.lengths((10,))[0], "lr": lr} for lr in scale.prompt_lrs((1e-3, 1e-2))]
    return [{**after, "first": before} for before, after in product(first, prompts)]


_DECAYS = (1e-2, 1e-3, 1e-4, 0.0)
_ADAMW = {"weight_decay": 0.01}

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("vpt-shallow", "VPT-shallow", "vpt-shallow", _prompts, _published_prompts, _ADAMW),
        Arm("vpt-deep", "VPT-deep", "vpt-deep", _prompts, _published_prompts, _ADAMW),
        Arm("full", "Full fine-tuning", "full", _full, _published_full, {"targets": "all", **_ADAMW}),
        Arm(
            "linear", "Linear probe", "linear",
            lambda scale: _four_of_two(lr=(3e-4, 1e-3, 3e-3, 1e-2), weight_decay=(0.0, 1e-3)), frozen_features=True,
        ),
        Arm("lora", "LoRA", "sequential-lora", lambda scale: _four_of_two(lr=(3e-4, 1e-3, 3e-3, 1e-2), rank=(16, 4))),
        Arm(
            "ftp", "FTP", "ftp",
            lambda scale: _four_of_two(lr=scale.weight_lrs((1e-5, 3e-5, 1e-4, 3e-4)), kappa=(1.0, 0.0)),
            fixed={"targets": "all", **_ADAMW},
        ),
        Arm("mixed", "Mixed: prompts and backbone together", "vpt-deep", _mixed, _published_mixed, _ADAMW),
        Arm(
            "ft-then-pt", "Fine-tuned, then prompts", "vpt-deep", _tuned_then_prompts, fixed=_ADAMW, first="full",
        ),
    )
}  # fmt: skip
"""By name. The last two are trained on request only."""
