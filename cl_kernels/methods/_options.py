"""Options of methods: frozen dataclasses that check their values, so that a wrong one is refused before any work."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cl_kernels.methods._heads import HEAD_INITS, HEADS
from cl_kernels.methods._schedule import SCHEDULES

__all__ = ["Options", "count", "number", "option_defaults", "require"]


def require(name: str, ok: bool, wanted: str, value: object) -> None:
    """Raise `ValueError` naming the option, what was wanted and what came."""
    if not ok:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every method with heads.

    * lr: of the body; None takes the method's default. Heads that train alone take it too when it is given.
    * head_lr: of the heads; None takes `lr`. At 1e-2 cosine heads overshoot: alone, on digits, 87 % instead of 97.
    * weight_decay: None takes the method's default.
    * head, head_scale: "cosine" gives logits `head_scale * cos`, "linear" ordinary ones.
    * head_init: "class-means" starts as the nearest class mean, "default" with torch's law for linear layers,
      "official" as NSP2's code (method-null-space.md T6), "zeros".
    * temperature: logits are divided by it, in the loss only.
    * schedule: of the learning rate, see `multipliers`; warmup: share of the epochs in which "warmup-cosine" climbs.
    * decay: what weight_decay applies to: "all", or "matrices": not norm scales, biases and what else timm leaves out.
    """

    lr: float | None = None
    head_lr: float | None = 1e-3
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    head: str = "cosine"
    head_scale: float = 16.0
    head_init: str = "class-means"
    temperature: float = 1.0
    schedule: str = "constant"
    warmup: float = 0.1
    decay: str = "all"

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "weight_decay"):
            value = getattr(self, name)
            require(name, value is None or number(value, 0.0, 1e3), "None or a number in [0, 1000]", value)
        require("head", self.head in HEADS, f"one of {', '.join(HEADS)}", self.head)
        require("head_init", self.head_init in HEAD_INITS, f"one of {', '.join(HEAD_INITS)}", self.head_init)
        require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}", self.schedule)
        require("warmup", number(self.warmup, 0.0, 0.9), "a number in [0, 0.9]", self.warmup)
        require("decay", self.decay in ("all", "matrices"), "all or matrices", self.decay)
        require("temperature", number(self.temperature, 1e-6, 1e6), "a number in [1e-6, 1e6]", self.temperature)
        require("head_scale", number(self.head_scale, 1e-6, 1e6), "a number in [1e-6, 1e6]", self.head_scale)
        require("eps", number(self.eps, 0.0, 1.0), "a number in [0, 1]", self.eps)
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        ok = pair and all(number(beta, 0.0, 1.0) and beta < 1 for beta in self.betas)
        require("betas", ok, "two numbers in [0, 1)", self.betas)


def option_defaults(options: type[Options]) -> dict[str, Any]:
    """Name and default of every option."""
    return {field.name: field.default for field in dataclasses.fields(options)}


def count(value: object, low: int, high: int) -> bool:
    """True for an int in [low, high]; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(value: object, low: float, high: float) -> bool:
    """True for a finite number in [low, high]; a bool is none."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
